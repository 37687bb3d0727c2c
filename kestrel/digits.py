"""Signed binary digits: products as shifts and additions."""

from __future__ import annotations


def signed_digits(multiplier: int) -> list[tuple[int, int]]:
    """The multiplier as a sum of signed powers of two, no two of them adjacent: (sign, exponent), largest first."""
    digits, exponent = [], 0
    while multiplier:
        if multiplier & 1:
            digit = 2 - (multiplier & 3)
            digits.append((digit, exponent))
            multiplier -= digit
        multiplier >>= 1
        exponent += 1
    return digits[::-1]

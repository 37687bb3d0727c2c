"""Pieces of C source: numbers, comments, strings, blocks."""

from __future__ import annotations

from collections.abc import Iterable

COLUMNS = 108  # of lines with constants


def c_type(bits: int) -> str:
    """Integer type of `bits`."""
    return f"int{bits}_t"


def comment(text: str) -> str:
    """`text` for a comment, which it cannot end."""
    return text.replace("*/", "* /")


def numbers(values: Iterable[int]) -> str:
    """Comma-separated integers in lines of at most COLUMNS characters. INT32_MIN has no literal of its own."""
    lines, line = [], ""
    for value in values:
        word = "-2147483647 - 1" if value == -(1 << 31) else str(value)
        if line and len(line) + len(word) + 2 > COLUMNS:
            lines.append(line + ",")
            line = word
        else:
            line = f"{line}, {word}" if line else word
    return "".join(f"    {text}\n" for text in [*lines, line])


def literal(value: int) -> str:
    """An int32 literal; INT32_MIN has none of its own."""
    return "(-2147483647 - 1)" if value == -(1 << 31) else str(value)


def listed(values: Iterable[int]) -> str:
    """Integers in one line."""
    return ", ".join(literal(v) for v in values)


def block(lines: Iterable[str]) -> str:
    """Lines, indented."""
    return "".join(f"    {line}\n" for line in lines)


def escaped(name: str) -> str:
    """`name` for a string literal."""
    return "".join(c if c.isprintable() and ord(c) < 128 and c not in '"\\?' else f"\\{ord(c) & 255:03o}" for c in name)

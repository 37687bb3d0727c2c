"""Integer codes as text: hex memory images for simulators ($readmemh) and C arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

_PER_ROW = 20  # values in a row of a C array
_DIGITS = ((8, 2), (16, 4), (32, 8))  # bits of a word up to -> hex digits


def _digits(bits: int) -> int:
    for most, digits in _DIGITS:
        if 1 <= bits <= most:
            return digits
    raise ValueError(f"memory images have words of 1 to 32 bits, not {bits}")


def hex_image(codes: npt.ArrayLike, bits: int) -> str:
    """One word per line: two's complement of `bits`, 2, 4 or 8 upper-case digits for up to 8, 16 or 32 bits.

    Codes are taken in row-major order; transpose a matrix first for column-major order. Raises ValueError where a code
    fits neither as a signed nor as an unsigned number of `bits`.
    """
    digits = _digits(bits)
    flat = np.asarray(codes).reshape(-1).astype(np.int64)
    if flat.size and (flat.min() < -(1 << (bits - 1)) or flat.max() >= 1 << bits):
        raise ValueError(f"a code does not fit in {bits} bits")
    if flat.size and flat.min() < 0 and flat.max() >= 1 << (bits - 1):
        raise ValueError(f"the codes are neither all signed nor all unsigned numbers of {bits} bits")
    return "".join(f"{int(code) & ((1 << bits) - 1):0{digits}X}\n" for code in flat)


def read_hex_image(text: str, bits: int, signed: bool = True) -> np.ndarray:
    """The codes of a hex image, int64. Raises ValueError for a word that is too wide."""
    words = np.array([int(line, 16) for line in text.split()], np.int64)
    if words.size and words.max() >= 1 << bits:
        raise ValueError(f"a word has more than {bits} bits")
    return np.where(words >= 1 << (bits - 1), words - (1 << bits), words) if signed else words


def _type(bits: int) -> str:
    for width in (8, 16, 32):
        if 2 <= bits <= width:
            return f"int{width}_t"
    raise ValueError(f"C arrays hold codes of 2 to 32 bits, not {bits}")


def c_arrays(
    name: str, arrays: Mapping[str, tuple[npt.ArrayLike, int]], constants: Mapping[str, int] | None = None
) -> tuple[str, str]:
    """Header and source of C arrays {name: (integer codes, bits)}, with `#define`s for constants and dimensions.

    A matrix stands column by column (Fortran order), as accelerators stream it. Raises ValueError where a code does not
    fit in its bits.
    """
    guard = f"{name.upper()}_H"
    header = [f"#ifndef {guard}", f"#define {guard}", "", "#include <stdint.h>", ""]
    header += [f"#define {key} {value}" for key, value in (constants or {}).items()]
    source = [f'#include "{name}.h"', ""]
    for key, (codes, bits) in arrays.items():
        array = np.asarray(codes).astype(np.int64)
        half = 1 << (bits - 1)
        if array.size and (array.min() < -half or array.max() >= half):
            raise ValueError(f"a code of {key} does not fit in {bits} bits")
        sizes = [f"{key.upper()}_{part}" for part in ("ROWS", "COLUMNS", "DEPTH")[: array.ndim]]
        if len(sizes) < array.ndim:
            raise ValueError(f"{key} has {array.ndim} dimensions; C arrays here have at most 3")
        header += [f"#define {macro} {size}" for macro, size in zip(sizes, array.shape, strict=True)]
        declared = f"const {_type(bits)} {key}[{' * '.join(sizes) or '1'}]"
        header.append(f"extern {declared};")
        flat = array.reshape(-1, order="F")
        source.append(f"{declared} __attribute__((aligned(64))) = {{")
        source += [
            "    " + ", ".join(str(code) for code in flat[start : start + _PER_ROW]) + ","
            for start in range(0, len(flat), _PER_ROW)
        ]
        source += ["};", ""]
    return "\n".join([*header, "", "#endif", ""]), "\n".join(source)


def read_c_array(source: str, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The codes of array `key` in a source that `c_arrays` made, int64 in its `shape`. Raises ValueError."""
    found = re.search(rf"\b{re.escape(key)}\[[^\]]*\][^=]*=\s*{{([^}}]*)}}", source)
    if found is None:
        raise ValueError(f"the source has no array {key}")
    codes = np.array([int(text) for text in found.group(1).replace(",", " ").split()], np.int64)
    return codes.reshape(shape, order="F")

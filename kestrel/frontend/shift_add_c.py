"""Constants and tables of the shift-add front end as a C header: the same settings give the same bytes on every machine."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike

from kestrel.digits import signed_digits
from kestrel.frontend.fixed_c import _comment
from kestrel.frontend.shift_add_tables import QUARTER, TWIDDLE_DIGITS, ShiftAddTables
from kestrel.store.atomic import write_text

HEADER_NAME = "kestrel_shift_frontend_tables.h"
_NEGATIVE, _LAST = 0x40, 0x80
_PER_LINE = 16


def twiddle_bytes(value: int) -> list[int]:
    """Signed digits of a factor, four bytes: exponent, 0x40 for a negative digit, 0x80 for the last one. Unused bytes are 0."""
    codes = [exponent | (_NEGATIVE if sign < 0 else 0) for sign, exponent in signed_digits(value)]
    if codes:
        codes[-1] |= _LAST
    return codes + [0] * (TWIDDLE_DIGITS - len(codes))


def header(tables: ShiftAddTables) -> str:
    """The text of kestrel_shift_frontend_tables.h."""
    spec = tables.spec
    cosines = [code for value in tables.cosine.tolist() for code in twiddle_bytes(value)]
    lines = [
        f"/* Shift-add front end {_comment(spec.name)}. Generated; do not edit.",
        " *",
        f" * {spec.sample_rate} Hz in, every {spec.decimation}. kept; window 256, hop {spec.hop}; {spec.mel_bands} mel bands of "
        f"{spec.f_min:g}..{spec.f_max:g} Hz; log2, floor {spec.log_floor:g}",
        " */",
        "#ifndef KESTREL_SHIFT_FRONTEND_TABLES_H",
        "#define KESTREL_SHIFT_FRONTEND_TABLES_H",
        "",
        "#include <stdint.h>",
        "",
        f"#define KSF_SAMPLE_RATE {spec.sample_rate}",
        f"#define KSF_DECIMATION {spec.decimation}",
        f"#define KSF_HOP {spec.hop}",
        f"#define KSF_BANDS {spec.mel_bands}",
        f"#define KSF_FLOOR ({tables.floor})",
        "",
        "#ifdef KSF_WITH_TABLES",
        *_array("uint8_t", "kestrel_shift_cosine", f"cos(2 pi i / 256) in signed digits, i = 0 .. {QUARTER}", cosines),
        *_array("uint8_t", "kestrel_shift_corners", "bins of the filters' corners", tables.corners.tolist()),
        *_array("uint16_t", "kestrel_shift_reciprocals", "1024 / distance of corners", tables.reciprocal.tolist()),
        *_array("uint8_t", "kestrel_shift_log", "64 log2(1 + (i + 0.5) / 64)", tables.log_table.tolist()),
        "#endif",
        "",
        "#endif",
        "",
    ]
    return "\n".join(lines)


def write_header(tables: ShiftAddTables, path: str | PathLike) -> None:
    """Write the header; nothing is left under `path` where that fails."""
    write_text(path, header(tables))


def _array(kind: str, name: str, about: str, values: Iterable[int]) -> list[str]:
    held = list(values)
    rows = [
        "    " + ", ".join(map(str, held[start : start + _PER_LINE])) + "," for start in range(0, len(held), _PER_LINE)
    ]
    return [f"/* {about} */", f"static const {kind} {name}[{len(held)}] = {{", *rows, "};"]

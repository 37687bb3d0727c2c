"""Constants and tables of the fixed-point front end as a C header, and the memory that the C code takes.

The text depends on nothing but the settings: the same front end gives the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np

from kestrel.frontend.filters import padding
from kestrel.frontend.fixed_tables import LOG_SEGMENTS, WEIGHT_BITS, Tables
from kestrel.frontend.spec import FrontendSpec
from kestrel.store.atomic import write_text

HEADER_NAME = "kestrel_frontend_tables.h"
_PREFIX = "KFE_"
_PER_LINE = 16


@dataclass(frozen=True)
class Memory:
    """Bytes that the C front end takes: static RAM of its state, constant tables, and scratch for the logs of a clip."""

    state: int
    tables: int
    clip_logs_per_frame: int  # only front ends with top_db need it, see kestrel_frontend_clip


@dataclass(frozen=True)
class _Stream:
    """Sizes of the sample buffer. After `delay` blocks of hop samples every block completes one frame."""

    delay: int
    history: int


@dataclass(frozen=True)
class _Array:
    kind: str
    size: int  # bytes of an element
    name: str
    comment: str
    values: Sequence[int]


def _stream(tables: Tables) -> _Stream:
    hop, lead = tables.spec.hop, tables.lead
    # Reflected samples are read from the buffer: `lead` of them before the first sample, as many after the last.
    least = max(tables.taps, hop, hop + 2 * lead)
    delay = max(1, -((lead - least) // hop))
    return _Stream(delay, delay * hop + lead)


def _stored_bins(tables: Tables) -> tuple[int, int]:
    """First bin and number of bins of the spectrum's buffer; the FFT works in place and needs all of them."""
    if tables.transform.dense:
        return tables.filters.low_bin, tables.filters.high_bin - tables.filters.low_bin + 1
    return 0, tables.spec.n_fft // 2 + 1


def memory(tables: Tables) -> Memory:
    """Memory of the C front end; the state's size is checked by the C compiler."""
    words = 2 * _stored_bins(tables)[1] + 2
    if tables.transform.dense:
        words += 2 * ((tables.taps + 1) // 2)
    halves = _stream(tables).history + tables.spec.mel_bands
    return Memory(
        state=4 * words + 4 * ((halves + 1) // 2),
        tables=sum(array.size * len(array.values) for array in _arrays(tables)),
        clip_logs_per_frame=2 * tables.spec.mel_bands if tables.top_codes else 0,
    )


def header(tables: Tables) -> str:
    """The text of kestrel_frontend_tables.h."""
    use = memory(tables)
    lines = [
        f"/* Fixed-point front end {_comment(tables.spec.name)}. Generated; do not edit.",
        " *",
        *(f" * {line}" for line in _settings(tables.spec)),
        " *",
        f" * {use.state} bytes of RAM (kestrel_frontend), {use.tables} bytes of tables.",
        " */",
        "#ifndef KESTREL_FRONTEND_TABLES_H",
        "#define KESTREL_FRONTEND_TABLES_H",
        "",
        "#include <stdint.h>",
    ]
    for title, constants in _constants(tables).items():
        lines += ["", f"/* {title} */"]
        lines += [f"#define {_PREFIX + name} {value}" for name, value in constants.items()]
    lines += ["", "#ifdef KFE_WITH_TABLES"]
    for array in _arrays(tables):
        lines += ["", f"/* {array.comment} */", f"static const {array.kind} {array.name}[{len(array.values)}] = {{"]
        for start in range(0, len(array.values), _PER_LINE):
            lines.append("    " + ", ".join(str(value) for value in array.values[start : start + _PER_LINE]) + ",")
        lines.append("};")
    lines += ["", "#endif /* KFE_WITH_TABLES */", "", "#endif", ""]
    return "\n".join(lines)


def write_header(tables: Tables, path: str | PathLike) -> None:
    """Write the header; nothing is left under `path` where that fails."""
    write_text(path, header(tables))


def _comment(text: str) -> str:
    """`text` without anything that could end a comment or a line."""
    return "".join(sign if sign.isprintable() and sign not in "*/\\?" else "_" for sign in text)


def _settings(spec: FrontendSpec) -> list[str]:
    top = "" if spec.top_db is None else f", top_db {spec.top_db:g}"
    start = "centred" if spec.center else "not centred"
    last = f"{spec.coefficients} cosine coefficients" if spec.coefficients else "no cosine transform"
    return [
        f"{spec.sample_rate} Hz, {spec.window_function} window {spec.window}, hop {spec.hop}, transform {spec.n_fft}, "
        f"framing {spec.framing}, {start}",
        f"{spec.mel_bands} mel bands ({spec.mel_rule}) of {spec.f_min:g}..{spec.f_max:g} Hz, power {spec.power:g}, "
        f"scale {spec.spectrum_scale:g}",
        f"log {spec.log}, floor {spec.log_floor:g}{top}, {last}",
    ]


def _constants(tables: Tables) -> dict[str, dict[str, int | str]]:
    spec, transform, filters, stream = tables.spec, tables.transform, tables.filters, _stream(tables)
    stored_from, stored = _stored_bins(tables)
    odd = [radix for radix in transform.radices if radix % 2]
    margin = padding(spec)
    return {
        "what goes in and out": {
            "SAMPLE_RATE": spec.sample_rate,
            "HOP": spec.hop,
            "BANDS": spec.mel_bands,
            "WIDTH": tables.width,
            "FRACTION_BITS": _signed(tables.fraction_bits),
            "STATE_BYTES": memory(tables).state,
        },
        "frames": {
            "WINDOW": spec.window,
            "TAPS": tables.taps,
            "LEAD": _signed(tables.lead),
            "DELAY": stream.delay,
            "HISTORY": stream.history,
            "PADDING": margin,
            "FRAMING_WINDOW": int(spec.framing == "window"),
            "SHORTEST_CLIP": margin + 1 if spec.center else spec.n_fft,
        },
        "spectrum": {
            "N_FFT": spec.n_fft,
            "POWER": tables.power,
            "DENSE": int(transform.dense),
            "DATA_BITS": transform.data_bits,
            "MINIMUM_SHIFT": _signed(tables.minimum_shift),
            "SPECTRUM_BITS": transform.bits,
            "LOW_BIN": filters.low_bin,
            "HIGH_BIN": filters.high_bin,
            "USED_BINS": filters.high_bin - filters.low_bin + 1,
            "STORED_FROM": stored_from,
            "STORED_BINS": stored,
            **(
                {"PAIRS": (tables.taps + 1) // 2, "START": transform.start, "OUTPUT_SHIFT": transform.output_shift}
                if transform.dense
                else {
                    "STAGES": len(transform.radices),
                    "RADIX_2": int(2 in transform.radices),
                    "RADIX_4": int(4 in transform.radices),
                    "RADIX_ODD": max(odd, default=0),
                }
            ),
        },
        "filters and logarithm": {
            **({"KEEP_BITS": tables.keep_bits} if tables.power == 2 else {}),
            "WEIGHT_BITS": WEIGHT_BITS,
            "LOG_SEGMENT_BITS": 16 - LOG_SEGMENTS.bit_length() + 1,
            "LOG_GAIN": _signed(tables.log_gain),
            "LOG_FLOOR": _signed(tables.log_floor),
            "LOG_PLUS_FLOOR": int(tables.floor_mantissa > 0),
            **(
                {
                    "FLOOR_MANTISSA": f"INT64_C({tables.floor_mantissa})",
                    "FLOOR_EXPONENT": _signed(tables.floor_exponent),
                }
                if tables.floor_mantissa
                else {}
            ),
            "LOG_BITS": _signed(tables.log_bits),
            "TOP_CODES": tables.top_codes,
        },
        "features": {
            "COSINE_TRANSFORM": int(len(tables.cosine) > 0),
            **({"MULTIPLIER_FIRST": tables.multipliers[0]} if len(tables.cosine) else {}),
            "MULTIPLIER": tables.multipliers[1],
            "FEATURE_SHIFT": _signed(tables.output_shift),
        },
    }


def _signed(value: int) -> int | str:
    return value if value >= 0 else f"({value})"


def _arrays(tables: Tables) -> list[_Array]:
    transform, filters = tables.transform, tables.filters

    def narrow(
        name: str, comment: str, values: np.ndarray | Sequence[int], kind: str = "int16_t", size: int = 2
    ) -> _Array:
        return _Array(kind, size, name, comment, [int(value) for value in values] or [0])

    arrays = [narrow("kfe_window", "first half of the window, times 32767", tables.window)]
    if transform.dense:
        pairs = transform.wave.reshape(2, -1).T.reshape(-1)
        arrays.append(narrow("kfe_wave", "cos(2 pi i / KFE_N_FFT) and sin(2 pi i / KFE_N_FFT), times 32767", pairs))
    else:
        arrays += [
            narrow("kfe_wave", "sin(2 pi i / KFE_N_FFT), times 32768, at most 32767", transform.wave),
            narrow("kfe_radices", "stages of the transform", transform.radices, "uint8_t", 1),
            narrow("kfe_order", "where pairs of samples go", transform.order[: (tables.taps + 1) // 2], "uint16_t"),
        ]
    arrays += [
        narrow("kfe_filter_first", "first bin of each filter", np.maximum(filters.first, filters.low_bin), "uint16_t"),
        narrow("kfe_filter_count", "bins of each filter", filters.count, "uint16_t"),
        narrow(
            "kfe_filter_shift",
            "binary scale of each filter's weights, above 2^KFE_WEIGHT_BITS",
            filters.shift,
            "uint8_t",
            1,
        ),
        narrow("kfe_weights", "weights, filter by filter", filters.weights),
        narrow("kfe_log_table", "log2(1 + i / 128) - i / 128, times 65536", tables.log_table),
    ]
    if len(tables.cosine):
        arrays.append(narrow("kfe_cosine_transform", "cos(pi i / (2 KFE_BANDS)), times 32767", tables.cosine))
    return arrays

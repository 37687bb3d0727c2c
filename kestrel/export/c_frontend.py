"""The fixed-point front end beside a C model, so that the program takes sound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kestrel.errors import KestrelError
from kestrel.frontend.filters import frame_count
from kestrel.frontend.fixed_c import header, memory
from kestrel.frontend.fixed_tables import make_tables
from kestrel.frontend.spec import FrontendSpec
from kestrel.lower.tensor import Tensor
from kestrel.settings import build

LARGEST_SHIFT = 15  # codes have 16 bits


@dataclass(frozen=True)
class WavInput:
    """`tables`: kestrel_frontend_tables.h. A model's feature code is the front end's / 2^shift. RAM and constants in bytes."""

    tables: str
    clip_samples: int
    shift: int
    ram: int
    constants: int


def wav_input(settings: Mapping[str, Any], clip_samples: int, features: Tensor) -> WavInput:
    """The front end of `settings` (as features hold them) for a model with input `features` [T, F].

    Raises KestrelError where it has no fixed-point form, or makes other features than the model takes.
    """
    spec = build(FrontendSpec, dict(settings))
    tables = make_tables(spec)
    shape = (frame_count(spec, clip_samples), tables.width)
    if shape != features.shape:
        raise KestrelError(f"front end {spec.name!r} makes features {shape}, the model takes {features.shape}")
    exponent = math.log2(features.scale or 1.0)
    shift = tables.fraction_bits + int(exponent)
    if exponent != int(exponent) or abs(shift) > LARGEST_SHIFT:
        raise KestrelError(f"the scale of the model's features, {features.scale}, is too far from the front end's")
    use = memory(tables)
    return WavInput(header(tables), clip_samples, shift, use.state + use.clip_logs_per_frame * shape[0], use.tables)

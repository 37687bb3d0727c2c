"""What a network holds: its layers with their counts, and its weights as integer codes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from kestrel.errors import KestrelError
from kestrel.nn.chip import Deviations
from kestrel.quant.packing import WeightCodes, encode

if TYPE_CHECKING:
    from kestrel.frontend.post import Post
    from kestrel.models.network import Network
    from kestrel.models.spotter import KeywordSpotter

OUTSIDE = "outside the layers"


def parameters(net: torch.nn.Module) -> int:
    """Trainable numbers, each counted once however often the network uses it."""
    return sum(parameter.numel() for parameter in net.parameters())


def network_shape(spotter: KeywordSpotter) -> tuple[int, int]:
    """(frames, values) that the network sees: the features after post-processing."""
    frames, width = cast("Post", spotter.post).output_shape
    return frames, width


def layers(net: Network, frames: int) -> list[dict[str, Any]]:
    """The network's layer table for `frames` input frames; what no layer claims stands in a last row.

    Each row has `name`, `parameters` and `macs`; the columns add up to the totals.
    """
    rows = [dict(row) for row in net.layer_table(frames)]
    rest = {
        "parameters": parameters(net) - sum(row["parameters"] for row in rows),
        "macs": net.macs(frames) - sum(row["macs"] for row in rows),
    }
    if any(rest.values()):
        rows.append({"name": OUTSIDE, **rest})
    return rows


def weight_codes(net: Network, analog_bits: int) -> dict[str, WeightCodes]:
    """Integer codes of every weight group by name; groups trained without weight quantisation get `analog_bits`.

    Raises KestrelError where a weight is not finite.
    """
    codes = {}
    for group in net.weight_groups():
        values = group.tensor.detach().float().cpu().numpy()
        if not np.isfinite(values).all():
            raise KestrelError(f"weights {group.name!r} are not finite; train again with a lower learning rate")
        if group.codes is not None:
            codes[group.name] = group.codes
        elif group.bits is None:
            codes[group.name] = encode(values, analog_bits)
        else:
            codes[group.name] = encode(values, group.bits, group.limit)
    return codes


@contextlib.contextmanager
def decoded_weights(net: Network, codes: dict[str, WeightCodes]) -> Iterator[None]:
    """Inside, the network computes as deployed, with the weights that `codes` stand for; afterwards as before."""
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    kept = {name: state[name].detach().clone() for name in codes}
    try:
        with torch.no_grad():
            for name, group in codes.items():
                state[name].copy_(torch.from_numpy(group.decode()))
        with net.deployed():
            yield
    finally:
        with torch.no_grad():
            for name, values in kept.items():
                state[name].copy_(values)


def other_parameters(net: Network) -> dict[str, np.ndarray]:
    """Trainable numbers outside the weight groups (clipping ranges and the like), float32 by name."""
    groups = {group.name for group in net.weight_groups()}
    return {
        name: parameter.detach().float().cpu().numpy()
        for name, parameter in net.named_parameters()
        if name not in groups
    }


def evaluation_noise_of(net: torch.nn.Module) -> float:
    """Strength of the read noise that the network draws in evaluation (its largest `noise_eval`); 0 = none."""
    return max((float(getattr(module, "noise_eval", 0.0)) for module in net.modules()), default=0.0)


def device_figures(net: torch.nn.Module) -> dict[str, float | str]:
    """What deviates from ideal hardware in evaluation, by name: `noise_read` and the network's `deviations_eval`."""
    noise = evaluation_noise_of(net)
    found: dict[str, float | str] = {"noise_read": noise} if noise else {}
    for module in net.modules():
        deviations = getattr(module, "deviations_eval", None)
        if deviations is not None:
            found |= deviations.figures()
    return found


def describe_devices(figures: dict[str, float | str]) -> str:
    """The figures of `device_figures` in words."""
    units = {
        "noise_read": "read noise {:g} max_w",
        "noise_program": "programming noise {:g} max_w",
        "adc_offset": "ADC offset {:g} LSB",
        "adc_gain": "ADC gain error {:g}",
        "adc_inl": "ADC non-linearity {:g} LSB",
    }
    words = [text.format(figures[key]) for key, text in units.items() if key in figures]
    drawn = {"column": " (drawn per column)", "chip": " (drawn per chip)", "fixed": " (the same everywhere)"}
    return ", ".join(words) + drawn.get(str(figures.get("adc_draw")), "") if words else "none"


@contextlib.contextmanager
def noise_off(net: torch.nn.Module) -> Iterator[None]:
    """Inside, evaluation is that of ideal hardware: no `noise_eval`, no `deviations_eval` in the network."""
    ideal = {"noise_eval": 0.0, "deviations_eval": Deviations()}
    kept = [
        (module, name, getattr(module, name)) for module in net.modules() for name in ideal if hasattr(module, name)
    ]
    try:
        for module, name, _ in kept:
            setattr(module, name, ideal[name])
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)

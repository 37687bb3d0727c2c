"""Checkpoints with weights as they are stored in the device: integer codes and scales, everything else in float32.

A network that is loaded from one computes with exactly the stored weights: those of its own quantiser, or codes of a given
number of bits where it was trained with analog weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kestrel.errors import KestrelError
from kestrel.models.inventory import weight_codes
from kestrel.quant.packing import WeightCodes

if TYPE_CHECKING:
    from kestrel.models.spotter import KeywordSpotter

_CODES, _OTHERS = "codes", "others"
_NET = "net."  # of a spotter's state, before the names of the network's weight groups


def compact(spotter: KeywordSpotter, analog_bits: int) -> dict[str, Any]:
    """The entries of a compact checkpoint that stand for the spotter's state (plain types and tensors).

    `codes`: name -> `codes` (int8, above 8 bits int16, in the shape of the weights), `scale` (float32 [1], or one per
    index of the first axis) and `bits`. `others`: clipping ranges, statistics of feature steps and the like, by name.
    Raises KestrelError where a weight is not finite.
    """
    codes = {
        _NET + name: {
            "codes": torch.from_numpy(group.codes),
            "scale": torch.from_numpy(group.scale),
            "bits": group.bits,
        }
        for name, group in weight_codes(spotter.net, analog_bits).items()
    }
    others = {name: value for name, value in spotter.state_dict().items() if name not in codes}
    return {_CODES: codes, _OTHERS: others}


def state_of(content: dict[str, Any], name: str = "checkpoint") -> dict[str, torch.Tensor]:
    """The spotter's state from the content of a checkpoint, compact or of training.

    Raises KestrelError (with `name`) where it holds neither.
    """
    if "model" in content:
        return content["model"]
    try:
        weights = {
            key: torch.from_numpy(
                WeightCodes(group["codes"].numpy(), group["scale"].numpy(), int(group["bits"])).decode()
            )
            for key, group in content[_CODES].items()
        }
        return {**content[_OTHERS], **weights}
    except (KeyError, TypeError, AttributeError):
        raise KestrelError(f"{name} holds no weights; give the best.pt or last.pt of a training stage") from None

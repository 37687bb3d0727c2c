"""TinySpeech: attention condensers for keyword spotting, trained with few bits and pruned, down to a 2 KB microcontroller.

Networks X, Y, Z and M of the paper (arXiv 2008.04245), the QP variant of Z, a network that runs frame by frame (`mcu`) and
two separable comparators. Stage 3 trains in full precision, stage 4 with few bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from kestrel.errors import UsageError
from kestrel.settings import setting

if TYPE_CHECKING:
    from kestrel.models.quant_net import QuantNet


@dataclass
class ModelSpec:
    """Settings of the network and of how it trains with few bits."""

    net: Literal["x", "y", "z", "m", "qp", "sep"] = setting(
        "z", "x, y, z, m: condensers of the paper; qp: Z as QP-TinySpeech has it; sep: separable over time"
    )
    first_stride: list[int] = setting([1, 1], "x..qp: stride of the first convolution (frames, bands)", min=1, max=8)
    first_padding: list[int] = setting([1, 1], "x..qp: zeros around the features", min=0, max=1)
    pools: list[int] = setting(
        [2, 2], "x..qp: condensation, frames and bands of each condenser in turn; the last pair serves the rest", min=1
    )
    looks: list[int] = setting(
        [0],
        "x..m: condensed frames that the copies of a depthwise layer see in turn; 0 the present, -1 the one before",
        min=-8,
        max=8,
    )
    head_pool: list[int] = setting([1, 1], "x..qp: max pooling before the last convolution (frames, bands)", min=1)
    last_padding: list[int] = setting([1, 1], "x..qp: zeros around the map of the last convolution", min=0, max=1)
    qp_blocks: int = setting(6, "qp: blocks of two condensers; the quantised original has 4", min=1, max=6)
    width: int = setting(16, "sep: channels", min=4, max=512)
    kernels: list[int] = setting([5, 9, 9, 9], "sep: frames of the first layer and of each block (odd)", min=1, max=63)
    stride: int = setting(1, "sep: stride of the first layer in time", min=1, max=8)
    condense: list[int] = setting([], "sep: blocks that an attention condenser over pairs of frames follows", min=1)
    head: int = setting(0, "sep: channels of a pointwise layer before the mean; 0 = none", min=0, max=1024)
    causal: bool = setting(False, "sep: kernels see the present frame and those before it")
    wide: int = setting(
        0, "sep: channels between two pointwise layers of each block; 0 = one such layer", min=0, max=512
    )
    between: Literal["relu", "none"] = setting("relu", "sep: what follows the depthwise convolution of a layer")
    gate: Literal["hard", "sigmoid"] = setting("hard", "attention values: clip(x / 4 + 1 / 2, 0, 1), or the sigmoid")
    weights: str = setting("8bit", "grid of weights: 2bit..8bit, 2bitsym..8bitsym, ternary, binary, fp130, dorefa1..8")
    layer_weights: dict[str, str] = setting({}, "exceptions: layer name or pattern -> grid, or float")
    weight_scale: Literal["max", "mean", "octav"] = setting("octav", "how the step of a grid is found")
    per_output: bool = setting(True, "a step for each output, or one for the layer")
    act_bits: int = setting(8, "bits of activations", min=2, max=8)
    act_range: Literal["learned", "ema", "max"] = setting(
        "ema", "how the range of activations is found; static in any case"
    )
    power_of_two: bool = setting(False, "steps of activations are powers of two")
    quant_from: Literal["pretrain", "retrain", "never"] = setting("retrain", "stage that trains with few bits")
    quant_delay: int = setting(0, "epochs of that stage that still train in full precision", min=0)
    prune: float = setting(0.0, "pruned share of weights or channels", min=0, max=0.99)
    prune_unit: Literal["weight", "channel"] = setting("weight", "what is pruned by its magnitude")
    prune_not: list[str] = setting(["first*", "classes"], "layers (names or patterns) that stay whole")
    prune_from: Literal["pretrain", "retrain"] = setting("retrain", "stage that prunes")
    prune_epochs: int = setting(4, "epochs until the share is reached; then masks hold", min=0)


def build(model: ModelSpec, input_shape: tuple[int, int], classes: int) -> QuantNet:
    """The network for features of `input_shape` (frames, width)."""
    from kestrel.models.quant_net import LowBitPlan
    from kestrel.models.tinyspeech import PLANS, QP, SeparableNet, TinySpeech
    from kestrel.nn.condenser import Making

    if not model.looks:
        raise UsageError("model.looks: []; give at least one frame, 0 is the present one")
    low_bit = LowBitPlan(
        weights=model.weights,
        layers=model.layer_weights,
        scale=model.weight_scale,
        per_output=model.per_output,
        start=model.quant_from,
        delay=model.quant_delay,
        prune=model.prune,
        prune_unit=model.prune_unit,
        prune_not=tuple(model.prune_not),
        prune_from=model.prune_from,
        prune_epochs=model.prune_epochs,
    )
    norm = model.net in ("qp", "sep") or PLANS[model.net].norm
    make = Making(norm, model.act_bits, model.act_range, model.power_of_two, model.gate)
    if model.net == "sep":
        return SeparableNet(
            input_shape,
            classes,
            model.width,
            model.kernels,
            low_bit,
            make,
            stride=model.stride,
            condense=model.condense,
            head=model.head,
            causal=model.causal,
            wide=model.wide,
            between=model.between,
        )
    return TinySpeech(
        input_shape,
        classes,
        QP if model.net == "qp" else PLANS[model.net],
        low_bit,
        make,
        first_stride=_pairs(model.first_stride, "first_stride")[0],
        first_padding=_pairs(model.first_padding, "first_padding")[0],
        pools=_pairs(model.pools, "pools"),
        head_pool=_pairs(model.head_pool, "head_pool")[0],
        last_padding=_pairs(model.last_padding, "last_padding")[0],
        looks=model.looks,
        qp_blocks=model.qp_blocks if model.net == "qp" else 0,
    )


def _pairs(values: list[int], name: str) -> list[tuple[int, int]]:
    if not values or len(values) % 2:
        raise UsageError(f"model.{name}: {values}; give pairs of frames and bands")
    return [cast(tuple[int, int], tuple(values[i : i + 2])) for i in range(0, len(values), 2)]

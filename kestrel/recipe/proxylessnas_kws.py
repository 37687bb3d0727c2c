"""Networks found by differentiable search under a cost (Zhang et al. 2020, arXiv 2012.10138, after ProxylessNAS).

Stage 3 searches a super-network (or trains the network that `net` or `blocks` names), stage 4 trains what was found.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kestrel.errors import UsageError, unknown
from kestrel.models.architecture import Architecture, Family, family_of, parse_blocks, read_file
from kestrel.models.search_spec import SearchSpec
from kestrel.settings import build as build_settings
from kestrel.settings import load_yaml, setting

if TYPE_CHECKING:
    from kestrel.models.quant_net import LowBitPlan, QuantNet

BASELINE = "tc-resnet8"  # kestrel.models.tc_resnet
PUBLISHED = Path(__file__).resolve().parents[2] / "recipes" / "proxylessnas_kws" / "published.yaml"


@dataclass
class ModelSpec(Family):
    """Settings of the networks and of the search, with the names of the original command line where it has them."""

    net: str = setting(
        "", "network to train instead of a search: name in published.yaml, or an architecture file (.yaml)"
    )
    blocks: str = setting("", "its blocks, such as '7e2 3e1 Z', in place of model.net")
    kernels: list[int] = setting([3, 5, 7], "kernel sizes of the candidates, odd", min=1, max=15)
    expansions: list[int] = setting([1, 2, 3, 4, 5, 6], "expansions of the candidates", min=1, max=16)
    inherit: bool = setting(True, "the network that was found starts from the weights of the search")
    bn_momentum: float = setting(0.1, "weight of a batch in running statistics", min=0, max=1)
    bn_eps: float = setting(1e-3, "epsilon of batch normalisation", min=0)
    dropout: float = setting(0.0, "dropout before the linear layer", min=0, max=0.95)
    model_init: Literal["he_fout", "he_fin"] = setting("he_fout", "fan that initial weights are scaled by")
    init_div_groups: bool = setting(False, "the fan of a depthwise convolution counts its own channel alone")
    weight_bits: int | None = setting(8, "bits of all weights; null = floating point", min=1, max=8)
    weight_quantiser: Literal["dorefa", "scaled", "symmetric"] = setting(
        "scaled", "dorefa: fixed range 1; scaled: a scale for each output; symmetric: without a level 0 below 8 bits"
    )
    weight_scale: Literal["max", "mean", "octav"] = setting("max", "how scaled and symmetric find their scales")
    layer_bits: dict[str, int] = setting({}, "other bits of single layers: name pattern -> bits", min=1, max=8)
    act_bits: int | None = setting(8, "bits of activations; null = floating point in training", min=2, max=8)
    act_ranges: Literal["learned", "ema", "max"] = setting("ema", "how ranges of activations are found")
    quantise: Literal["training", "retrain", "never"] = setting(
        "training",
        "training: with quantised values; retrain: from stage 4 on, stage 3 in floating point; never: afterwards alone "
        "(post-training quantisation)",
    )
    search: SearchSpec = field(default_factory=SearchSpec)


def architecture(model: ModelSpec) -> Architecture | None:
    """The network that the settings name; None where one is to be searched. Raises UsageError naming the setting."""
    if model.blocks:
        made = Architecture(**family_of(model), blocks=parse_blocks(model.blocks))
        made.check("model")
        made.choices("model.blocks")
        return made
    if not model.net:
        model.check("model")
        for kernel in model.kernels:
            if kernel % 2 == 0:
                raise UsageError(f"model.kernels: {kernel} is even, an odd kernel keeps the size of its input")
        if not model.kernels or not model.expansions:
            raise UsageError("model.kernels and model.expansions: give at least one of each")
        return None
    if model.net.endswith((".yaml", ".yml", ".json")):
        return read_file(Path(model.net))
    known = load_yaml(PUBLISHED)["nets"]
    if model.net not in known:
        raise unknown("value of model.net", model.net, [*known, BASELINE])
    row = known[model.net]
    data = {"width_mult": row["width_mult"], "blocks": parse_blocks(row["blocks"])}
    found: Architecture = build_settings(Architecture, data)
    return found


def grid(bits: int | None, model: ModelSpec) -> str:
    """Name of the weight grid of that many bits."""
    if bits is None:
        return "float"
    if model.weight_quantiser == "dorefa":
        return f"dorefa{bits}"
    if bits == 1:
        return "binary"
    # Without a level 0 codes are odd: at 8 bits they would not fit a byte, and the step is fine enough with one.
    return f"{bits}bit" + ("sym" if model.weight_quantiser == "symmetric" and bits < 8 else "")


def plan(model: ModelSpec, *, activations: bool) -> LowBitPlan:
    """How the networks quantise."""
    from kestrel.models.quant_net import LowBitPlan

    return LowBitPlan(
        weights=grid(model.weight_bits, model),
        layers={pattern: grid(bits, model) for pattern, bits in model.layer_bits.items()},
        scale=model.weight_scale,
        per_output=model.weight_quantiser != "dorefa",
        activations=activations and model.act_bits is not None,
        start="pretrain" if model.quantise == "training" else model.quantise,
    )


def build(model: ModelSpec, input_shape: tuple[int, int], classes: int) -> QuantNet:
    """The network that the settings name, or the super-network, for features of `input_shape` (frames, width).

    In the super-network weights are quantised, activations are not.
    """
    from kestrel.models.proxyless import Frame, ProxylessNet, SuperNet
    from kestrel.nn.mbconv import Making

    make = Making(
        model.bn_momentum, model.bn_eps, model.act_bits or 8, model.act_ranges, model.model_init, model.init_div_groups
    )
    if model.net == BASELINE:
        from kestrel.models.tc_resnet import TcResNet8

        return TcResNet8(input_shape[1], classes, make, plan(model, activations=True), model.dropout)
    named = architecture(model)
    frame = Frame(input_shape, classes, make, plan(model, activations=True), model.dropout)
    if named is not None:
        return ProxylessNet(named, frame)
    wide = Frame(input_shape, classes, make, plan(model, activations=False), model.dropout)
    family = Family(**family_of(model))
    return SuperNet(family, model.kernels, model.expansions, model.search, wide, frame, model.inherit)

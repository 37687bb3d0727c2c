"""A trained spotter as an integer model, and its answers for a whole split."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor as Real

from kestrel.errors import KestrelError
from kestrel.lower.block_lstm import lower_block_lstm
from kestrel.lower.dead_channels import without_dead_channels
from kestrel.lower.delta_network import lower_delta_network
from kestrel.lower.graph import IntegerGraph, Program, calibrated_scale, input_codes
from kestrel.lower.network import lower_network
from kestrel.lower.ops import ArgMax, Reshape
from kestrel.lower.post import View, lower_post
from kestrel.lower.tensor import Tensor
from kestrel.models.block_lstm import BlockLSTM
from kestrel.models.delta_rnn import DeltaNetwork
from kestrel.models.evaluate import Features, ProgressCallback
from kestrel.models.inventory import weight_codes
from kestrel.models.network import Network
from kestrel.models.quant_net import QuantNet
from kestrel.quant.integer import twos_complement

if TYPE_CHECKING:
    from kestrel.frontend.post import Post
    from kestrel.models.spotter import KeywordSpotter

FEATURES, LOGITS, CLASS = "features", "logits", "class"
BATCH = 128  # clips whose tensors stay in the processor's cache

Lowering = Callable[[Program, View, Network, int], str]


def lower_quant_net(program: Program, view: View, net: Network, weight_bits: int) -> str:
    """A network with trained ranges of activations by its layers; weights keep the codes that they were trained with."""
    net.set_phase("eval")
    return _named(program, lower_network(program, view, net, None, weight_bits, weight_codes(net, weight_bits)))


def _named(program: Program, made: str) -> str:
    """The result `made` under the name of the logits."""
    return program.add(Reshape(inputs=(made,), outputs=(LOGITS,), shape=program.tensors[made].shape))


LOWERINGS: dict[type[Network], Lowering] = {
    BlockLSTM: cast(Lowering, lower_block_lstm),
    DeltaNetwork: cast(Lowering, lower_delta_network),
    QuantNet: lower_quant_net,
}


def _lowering(net: Network) -> Lowering | None:
    return next((lowering for kind, lowering in LOWERINGS.items() if isinstance(net, kind)), None)


def lower(
    spotter: KeywordSpotter, feature_scale: float, weight_bits: int = 8, calibration: np.ndarray | None = None
) -> IntegerGraph:
    """The integer model of `spotter`: input `features` [T, F] int16, outputs `logits` [C] and `class` [1].

    Args:
        feature_scale: real feature = code * feature_scale; see `feature_scale_of`.
        weight_bits: bits of weights that were trained without quantisation.
        calibration: features [B, T, F] of the training split, from which a network without trained ranges takes them.

    Simulated device noise has no part in it. Raises KestrelError where the network has no integer form; the line names
    the setting.
    """
    post = cast("Post", spotter.post)
    lowering = _lowering(spotter.net)
    if lowering is None and calibration is None:
        name = type(spotter.net).__name__
        raise KestrelError(f"{name} has no trained ranges of activations: its integer form needs training features")
    if not post.fitted:
        raise KestrelError("feature.post has no training statistics yet: they come with a checkpoint or from fit")
    graph = IntegerGraph()
    features = Tensor(post.input_shape, *twos_complement(16), feature_scale)
    view = lower_post(graph, post, graph.input(FEATURES, features))
    try:
        if lowering is not None:
            logits = lowering(graph, view, spotter.net, weight_bits)
        else:
            logits = _calibrated(graph, view, spotter, weight_bits, torch.as_tensor(calibration))
    except ValueError as error:  # a number that fits no multiplier
        raise KestrelError(f"{type(spotter.net).__name__} has no integer form: {error}") from error
    graph.output(logits)
    graph.output(graph.add(ArgMax(inputs=(LOGITS,), outputs=(CLASS,))))
    graph = without_dead_channels(graph)
    graph.leave_out_zeros()
    return graph


def _calibrated(graph: IntegerGraph, view: View, spotter: KeywordSpotter, weight_bits: int, features: Real) -> str:
    """The network by its layers; weights keep the codes that they were trained with."""
    net = spotter.net
    net.set_phase("eval")
    with torch.no_grad():
        made = lower_network(graph, view, net, spotter.post(features), weight_bits, weight_codes(net, weight_bits))
    return _named(graph, made)


def made_in_fixed_point(data: Features) -> bool:
    """Whether features are codes of an integer front end."""
    return getattr(data, "frontend", {}).get("arithmetic") in ("fixed", "shift-add")


def feature_scale_of(data: Features, batch: int = 512) -> float:
    """Scale of int16 features, a power of two, from the largest magnitude in a training split.

    Features of the fixed-point front end keep their own, which holds whatever it can make.
    """
    if made_in_fixed_point(data):
        return float(data.scale)  # type: ignore[attr-defined]
    largest = 0.0
    for start in range(0, data.shape[0], batch):
        rows = data.rows(np.arange(start, min(start + batch, data.shape[0])))
        largest = max(largest, float(np.abs(rows).max(initial=0.0)))
    return calibrated_scale(largest)


def predict_codes(graph: IntegerGraph, data: Features, progress: ProgressCallback | None = None) -> np.ndarray:
    """Integer logits of every clip in the order of the file, int64 [N, C]."""
    clips = data.shape[0]
    if not clips:
        raise KestrelError("the split has no clips; check its manifest, or choose another split")
    parts = []
    for start in range(0, clips, BATCH):
        rows = np.arange(start, min(start + BATCH, clips))
        codes = input_codes(data.rows(rows), graph.tensors[FEATURES])
        parts.append(graph.run(codes)[LOGITS])
        if progress is not None:
            progress(int(rows[-1]) + 1, clips)
    return np.concatenate(parts)

"""Delta networks for accelerators that skip zeros: DeltaRNN, EdgeDRNN and Spartus (Gao et al., 2018-2022).

A dense GRU or LSTM is trained, then trained on with delta updates, which transmit only what changed by a threshold or
more. Column-balanced targeted dropout (CBTD) prunes its weights so that all processing elements have the same work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kestrel.settings import setting

if TYPE_CHECKING:
    from kestrel.models.delta_rnn import DeltaNetwork

# Settings that act in validation and scoring alone: trained weights may be scored under other values (--checkpoint).
EVALUATION_ONLY = ("thx", "thh", "decision")

Mode = Literal[0, 1, 2]


@dataclass
class ModelSpec:
    """Settings of the network, with the names of the original command line where it has them."""

    rnn_type: Literal["GRU", "LSTM"] = setting("GRU", "cell")
    rnn_layers: int = setting(1, "delta layers", min=1, max=8)
    rnn_size: int = setting(64, "units of a layer", min=1, max=4096)
    rnn_dropout: float = setting(0.0, "dropout between layers", min=0, max=0.95)
    fc_extra_size: int = setting(0, "units of an extra linear layer with ReLU; 0 = none", min=0, max=4096)
    fc_dropout: float = setting(0.0, "dropout behind the extra layer", min=0, max=0.95)
    use_hardsigmoid: bool = setting(False, "clip(0.25 x + 0.5, 0, 1) in place of the sigmoid")
    use_hardtanh: bool = setting(False, "clip(x, -1, 1) in place of tanh")
    qa: Mode = setting(0, "activations and non-linearities: 0 floating point, 1 fixed point, 2 rounded down")
    qw: Mode = setting(0, "weights: 0 floating point, 1 fixed point, 2 rounded down")
    qc: Mode = setting(0, "logits: 0 floating point, 1 fixed point, 2 rounded down")
    qcw: Mode = setting(0, "weights of the class layer: 0 floating point, 1 fixed point, 2 rounded down")
    aqi: int = setting(3, "integer bits of activations, the sign included", min=1, max=16)
    aqf: int = setting(5, "fractional bits of activations", min=0, max=16)
    wqi: int = setting(1, "integer bits of weights", min=1, max=16)
    wqf: int = setting(7, "fractional bits of weights", min=0, max=15)
    nqi: int = setting(2, "integer bits of results of sigmoid and tanh", min=1, max=16)
    nqf: int = setting(6, "fractional bits of results of sigmoid and tanh", min=0, max=16)
    cqi: int = setting(3, "integer bits of logits", min=1, max=16)
    cqf: int = setting(5, "fractional bits of logits", min=0, max=16)
    cwqi: int = setting(1, "integer bits of class weights", min=1, max=16)
    cwqf: int = setting(7, "fractional bits of class weights", min=0, max=15)
    thx: list[float] = setting([0.1], "threshold of input changes; one value, or one per layer", min=0)
    thh: list[float] = setting([0.1], "threshold of state changes; one value, or one per layer", min=0)
    delta_from: Literal["pretrain", "retrain"] = setting("retrain", "stage from which thresholds act")
    beta: float = setting(0.0, "strength of the penalty on the mean |dh| over frames, units and layers", min=0)
    cbtd_from: Literal["none", "pretrain", "retrain"] = setting("none", "stage from which weights are pruned")
    gamma_rnn: float = setting(0.7, "pruned share of the delta layers' weights", min=0, max=0.999)
    gamma_fc: float = setting(0.75, "pruned share of the extra layer's weights", min=0, max=0.999)
    num_array_pe: int = setting(16, "processing elements over which rows are spread", min=1, max=4096)
    cbtd_group: int = setting(1, "contiguous rows that are pruned together", min=1, max=4096)
    alpha_anneal_epoch: int = setting(100, "epochs of pretraining until pruning is complete", min=1)
    alpha_anneal_retrain: int = setting(0, "the same of retraining, where pruning begins there; 0 = at once", min=0)
    cbtd_interval: int | None = setting(None, "batches between prunings; null = an epoch", min=1)
    loss: Literal["utterance", "frame"] = setting(
        "utterance", "utterance: of the mean logits; frame: mean of the frames' losses, as in the original"
    )
    decision: Literal["mean_logits", "last_speech"] = setting(
        "mean_logits", "mean_logits, or last_speech: the last frame that is not silence, as in the original"
    )
    silence_class: int | None = setting(-1, "index of silence, negative from the end; null = no such class")
    label_head: int = setting(2, "loss frame: first frames that count as silence", min=0)
    label_tail: int = setting(2, "loss frame: last frames that count as silence", min=0)

    # Done-markers hold these only where they are not the default, so that older results stay up to date.
    ADDED_LATER: ClassVar[tuple[str, ...]] = ("alpha_anneal_retrain",)


def build(model: ModelSpec, input_shape: tuple[int, int], classes: int) -> DeltaNetwork:
    """The network for features of `input_shape` (frames, width)."""
    from kestrel.models.delta_rnn import DeltaNetwork

    return DeltaNetwork(input_size=input_shape[1], classes=classes, **vars(model))

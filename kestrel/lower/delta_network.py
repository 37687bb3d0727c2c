"""Delta networks (kestrel.models.delta_rnn) in integers.

In fixed point every signal has the codes of training, and nothing but the features is rounded otherwise. Where training
had floating point, inputs get 14 bits that hold whatever the features can be, hidden states codes of 2^-12, so that
thresholds are met closely and deltas fit 16 bits; weights have `weight_bits` and a scale per output.
"""

from __future__ import annotations

import math

import numpy as np

from kestrel.lower.cell_form import CellForm, fixed_form, float_form
from kestrel.lower.graph import Program, Scan, State
from kestrel.lower.ops import (
    AddRequantise,
    ArgMax,
    Lookup,
    MatMul,
    Multiply,
    Requantise,
    Reshape,
    SumPool,
    Window,
)
from kestrel.lower.post import View
from kestrel.lower.rnn import LayerWeights, Thresholds, lower_layer
from kestrel.lower.tensor import COLUMN_STORAGES, Constant, Tensor
from kestrel.lower.value import Grid, Value
from kestrel.models.delta_rnn import DeltaNetwork
from kestrel.models.inventory import weight_codes
from kestrel.nn.delta_fixed import Numerics
from kestrel.quant.integer import Rescale, symmetric
from kestrel.quant.packing import WeightCodes

X_BITS, H_BITS, WIDE_BITS = 14, 13, 16
_LOGITS = "logits"


def lower_delta_network(program: Program, view: View, net: DeltaNetwork, weight_bits: int) -> str:
    """Add the network to `program`; returns the name of the logits [C]. Raises KestrelError where sums need over 32 bits."""
    net.set_phase("eval")
    codes = weight_codes(net, weight_bits)
    numerics = net.rnn.numerics
    form = (
        fixed_form(numerics)
        if numerics.activation is not None
        else float_form(Grid(2.0**-12, *symmetric(H_BITS)), numerics)
    )
    x = _inputs(program, view, form)
    rnn = net.rnn
    for index in range(rnn.num_layers):
        weights = LayerWeights(
            codes[f"rnn.weight_ih_l{index}"],
            codes[f"rnn.weight_hh_l{index}"],
            *(codes[f"rnn.bias_{part}_l{index}"].decode().astype(np.float64) for part in ("ih", "hh")),
        )
        theta = rnn.thresholds[index]
        acting = Thresholds(_sent(numerics, theta.x, weights.w_ih), _sent(numerics, theta.h, weights.w_hh))
        prefix = "rnn" if rnn.num_layers == 1 else f"rnn.{index}"
        x = lower_layer(program, x, rnn.kind, weights, prefix, form, acting)
    if net.fc_extra is not None:
        grid = (
            form.hidden
            if form.fixed
            else _reaching(program, x, codes["fc_extra.weight"], _bias(codes, "fc_extra"), X_BITS)
        )
        x = _linear(program, x, codes, "fc_extra", Grid(grid.step, 0, grid.high, grid.down))  # ReLU
    if net.logit_format is not None:
        grid = Grid(net.logit_format.step, *net.logit_format.limits, net.logit_format.rounding == "floor")
    else:
        grid = _reaching(program, x, codes["cl.weight"], _bias(codes, "cl"), WIDE_BITS)
    z = _linear(program, x, codes, "cl", grid)
    if net.decision == "mean_logits":
        return _time_mean(program, z)
    assert net.silence is not None
    return _last_speech(program, z, net.silence)


def _sent(numerics: Numerics, threshold: float, weight: WeightCodes) -> float | None:
    """The smallest change that is transmitted.

    None = all is multiplied anew; but pruned weights without a threshold get 0, which gives the same bits: their columns
    are then stored without zeros and added up, where rows would be unpacked again in every step.
    """
    if threshold > 0:
        return numerics.threshold(threshold)
    stored = Constant.of(weight.codes.astype(np.int64), weight.bits).compact(weight.codes.T, columns=True)
    return 0.0 if stored.storage in COLUMN_STORAGES else None


def _inputs(program: Program, view: View, form: CellForm) -> Value:
    """The features [T, F] in the codes of the first layer's inputs."""
    tensor = program.tensors[view.name]
    if form.fixed:
        grid = form.hidden
    else:
        ends = [view.gain * code + view.offset for code in (tensor.low, tensor.high)]
        largest = float(np.abs(ends).max()) or 1.0
        grid = Grid(2.0 ** math.ceil(math.log2(largest / symmetric(X_BITS)[1])), *symmetric(X_BITS))
    same = (view.gain == view.gain[0]).all()
    gains = [float(gain) for gain in (view.gain[:1] if same else view.gain)]
    offsets = [float(offset) for offset in view.offset] if view.offset.any() or grid.down else [0.0]
    rescale = grid.rescale(gains, offsets)
    op = Requantise(inputs=(view.name,), outputs=("rnn.features",), rescale=rescale, scale=grid.step)
    return Value(program.add(op), grid.step)


def _bias(codes: dict[str, WeightCodes], name: str) -> np.ndarray:
    return codes[f"{name}.bias"].decode().astype(np.float64)


def _reaching(program: Program, x: Value, weight: WeightCodes, bias: np.ndarray, bits: int) -> Grid:
    """Codes of `bits` that hold whatever W x + b can be."""
    real = np.abs(weight.decode().astype(np.float64)).sum(1) * program.tensors[x.name].magnitude * x.step + np.abs(bias)
    largest = float(real.max()) or 1.0
    return Grid(2.0 ** math.ceil(math.log2(largest / symmetric(bits)[1])), *symmetric(bits))


def _linear(program: Program, x: Value, codes: dict[str, WeightCodes], name: str, grid: Grid) -> Value:
    """W x + b of every frame [T, I] on `grid`."""
    weight = codes[f"{name}.weight"]
    steps = (weight.scale.astype(np.float64) * x.step).tolist()
    op = MatMul(
        inputs=(x.name,),
        outputs=(name,),
        weight=Constant.of(weight.codes.astype(np.int64), weight.bits),
        rescale=grid.rescale(steps, _bias(codes, name).tolist()),
        scale=grid.step,
    )
    return Value(program.add(op), grid.step)


def _time_mean(program: Program, z: Value) -> str:
    """The sum over time of [T, C], whose step is 1 / T of the frames'."""
    frames, classes = program.tensors[z.name].shape
    image = program.add(Reshape(inputs=(z.name,), outputs=("cl.image",), shape=(frames, 1, classes)))
    window = Window((frames, 1), (frames, 1))
    pooled = program.add(SumPool(inputs=(image,), outputs=("cl.sum",), window=window, scale=z.step / frames))
    return program.add(Reshape(inputs=(pooled,), outputs=(_LOGITS,), shape=(classes,)))


def _last_speech(program: Program, z: Value, silence: int) -> str:
    """The last frame of [T, C] whose best class is not `silence`, else the last frame.

    A frame is taken over unless it is silence and speech was heard before: y' = (1 - hold) z + hold y, where hold is
    silent less (silent and nothing heard yet).
    """
    tensor = program.tensors[z.name]
    classes = tensor.shape[1]
    body = Program()

    def name(part: str) -> str:
        return f"decision.{part}"

    frame = body.input(name("z"), Tensor((classes,), tensor.low, tensor.high, z.step))
    held = Tensor((classes,), min(tensor.low, 0), max(tensor.high, 0), z.step)
    kept, quiet = body.input(name("kept"), held), body.input(name("quiet"), Tensor((1,), 0, 1))
    best = body.add(ArgMax(inputs=(frame,), outputs=(name("best"),)))
    table = Constant.of(np.eye(classes, dtype=np.int64)[silence])
    silent = body.add(Lookup(inputs=(best,), outputs=(name("silent"),), table=table, first=0))
    body.add(Multiply(inputs=(silent, quiet), outputs=(name("quiet.next"),)))
    hold = _sum(body, (silent, name("quiet.next")), (1, -1), name("hold"), (0, 1))
    take = body.add(Requantise(inputs=(hold,), outputs=(name("take"),), rescale=Rescale((-1,), 0, 0, 1, (1,))))
    new = body.add(Multiply(inputs=(frame, take), outputs=(name("new"),)))
    old = body.add(Multiply(inputs=(kept, hold), outputs=(name("old"),)))
    _sum(body, (new, old), (1, 1), name("kept.next"), (held.low, held.high), z.step)
    states = (
        State(kept, name("kept.next"), held),
        State(quiet, name("quiet.next"), Tensor((1,), 0, 1), Constant.of(np.ones(1, np.int64), 8)),
    )
    scan = Scan(inputs=(z.name,), outputs=(name("frame"),), body=body, steps=(frame,), states=states, last=(kept,))
    made = program.add(scan)
    return program.add(Reshape(inputs=(made,), outputs=(_LOGITS,), shape=(classes,)))


def _sum(
    body: Program,
    inputs: tuple[str, ...],
    multipliers: tuple[int, ...],
    name: str,
    limits: tuple[int, int],
    scale: float | None = None,
) -> str:
    op = AddRequantise(
        inputs=inputs, outputs=(name,), multipliers=multipliers, shift=0, low=limits[0], high=limits[1], scale=scale
    )
    return body.add(op)

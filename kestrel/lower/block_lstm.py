"""The parallel quantised LSTM blocks (kestrel.models.block_lstm) in their digital form.

Codes of a signal with b bits and range a stand for code * a / 2^(b-1), as the fake-quant network has them. Crossbars
are integer products of weight codes whose int32 sums are rescaled to the codes of the ADC. Bit-serial inputs are looked up
slice by slice from the code of their register; every slice has a product and a converter of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor as Real

from kestrel.errors import KestrelError
from kestrel.lower.graph import Program, Scan, State
from kestrel.lower.ops import AddRequantise, Concat, Interpolate, Lookup, MatMul, Multiply, Op, Requantise, Slice
from kestrel.lower.post import View
from kestrel.lower.tensor import Constant, Tensor
from kestrel.models.block_lstm import ORTHOGONALITY, BlockLSTM, class_order
from kestrel.models.inventory import weight_codes
from kestrel.nn.cell import ROW, Bits
from kestrel.nn.crossbar import slice_codes
from kestrel.quant.integer import Rescale, from_reals, segments_of, symmetric, table_of
from kestrel.quant.packing import WeightCodes
from kestrel.quant.quantiser import clip_quantise

TABLE_BITS = 10  # inputs of more bits are interpolated between 2^TABLE_BITS nodes
LOGIT_FRACTION = 16  # bits below an ADC step, for scores of different scales that are compared or added


@dataclass(frozen=True)
class _Signal:
    """A quantised signal: value = code * limit / 2^(bits-1)."""

    limit: float
    bits: int

    @property
    def step(self) -> float:
        return self.limit / 2 ** (self.bits - 1)

    @property
    def codes(self) -> tuple[int, int]:
        return symmetric(self.bits)

    def tensor(self, *shape: int) -> Tensor:
        return Tensor(shape, *self.codes, self.step)


def lower_block_lstm(program: Program, x: View, net: BlockLSTM, weight_bits: int) -> str:
    """Add the network to `program`; returns the name of the logits [C], int codes of one scale.

    Analog weights get codes of `weight_bits`. Raises KestrelError where a signal is analog.
    """
    bits = net.bits
    for name, value in (("quant_inp", bits.inp), ("quant_actMVM", bits.mvm), ("quant_actNM", bits.nm)):
        if value is None:
            raise KestrelError(f"the model has analog signals, which have no integers: set model.{name} to 2..16")
    if bits.slices and bits.inp is not None and bits.inp + bits.slices - 1 > TABLE_BITS:
        most = TABLE_BITS + 1 - bits.inp
        raise KestrelError(f"integers take bit-serial inputs of {TABLE_BITS} bits: set model.input_slices to 1..{most}")
    codes = weight_codes(net, weight_bits)
    limits = net.lstm.ranges_in_use().detach().double()
    ranges = {name: limits[row].tolist() for name, row in ROW.items()}
    body = Program()
    step = body.input("x", Tensor(*_frame(program, x)))
    states: list[State] = []
    for block in range(net.blocks):
        own = {name: values[block] for name, values in ranges.items()}
        states += _Cell(net, block, own, codes).add(body, step, x)
    last = tuple(f"block{block}.h" for block in range(net.blocks))
    scan = Scan(
        inputs=(x.name,),
        outputs=tuple(f"{name}.last" for name in last),
        body=body,
        steps=(step,),
        states=tuple(states),
        last=last,
    )
    program.add(scan)
    scores = [_read_out(program, net, block, ranges["a11"][block], codes) for block in range(net.blocks)]
    return _logits(program, net, scores)


def _frame(program: Program, x: View) -> tuple[tuple[int, ...], int, int, float | None]:
    tensor = program.tensors[x.name]
    return tensor.shape[1:], tensor.low, tensor.high, tensor.scale


def _weights(codes: dict[str, WeightCodes], name: str, block: int) -> tuple[np.ndarray, float]:
    """Codes [...] of a block and their scale."""
    group = codes[name]
    return group.codes[block].astype(np.int64), float(group.scale[block if len(group.scale) > 1 else 0])


def _crossbar(
    x: str,
    name: str,
    source: _Signal,
    adc: _Signal,
    codes: dict[str, WeightCodes],
    keys: tuple[str, str],
    block: int,
    share: float = 1.0,
) -> MatMul:
    """q(M(x, W, share b)). A unit of the sums is coarse (few-bit inputs), so the bias joins them behind the multiplier."""
    weight, scale = _weights(codes, keys[0], block)  # [in, out]
    bias, bias_scale = _weights(codes, keys[1], block)  # [out]
    unit = source.step * scale
    return MatMul(
        inputs=(x,),
        outputs=(name,),
        weight=Constant.of(weight.T, codes[keys[0]].bits),
        rescale=Rescale.of(unit / adc.step, adc.codes, (bias * (share * bias_scale / adc.step)).tolist()),
        scale=adc.step,
    )


# (tensor, its step): parts of a sum.
_Terms = list[tuple[str, float]]


def _product(
    program: Program,
    x: str,
    name: str,
    source: _Signal,
    adc: _Signal,
    codes: dict[str, WeightCodes],
    keys: tuple[str, str],
    block: int,
    bits: Bits,
) -> _Terms:
    """Add M between its converters; returns what its outputs are the sum of. `source`: codes of the DAC or register."""
    if bits.serial is None:
        program.add(_crossbar(x, name, source, adc, codes, keys, block))
        return [(name, adc.step)]
    serial, terms = bits.serial, []
    digit, converter = _Signal(1.0, serial.bits), _Signal(1.0, adc.bits)
    for place in range(serial.slices):

        def slice_of(register: np.ndarray, place: int = place) -> np.ndarray:
            split, _ = slice_codes(
                torch.from_numpy(register).double(), serial.bits, serial.slices, torch.tensor(2.0 ** (source.bits - 1))
            )
            return split[place].numpy().astype(np.int64)

        table = Constant.of(table_of(slice_of, *source.codes))
        digits, part = f"{name}.digits{place}", f"{name}.slice{place}"
        program.add(Lookup(inputs=(x,), outputs=(digits,), table=table, first=source.codes[0], scale=digit.step))
        program.add(_crossbar(digits, part, digit, converter, codes, keys, block, 1 / (source.limit * serial.weight)))
        terms.append((part, converter.step * source.limit * 2.0**-place))
    return terms


def _function(name: str, x: str, kind: Callable[[Real], Real], source: _Signal, target: _Signal) -> Op:
    """q(kind(x)), tabulated from the fake-quant function itself, so exact, up to TABLE_BITS of input."""
    half = 2 ** (target.bits - 1)
    limit = torch.tensor(target.limit, dtype=torch.float32)

    def real(codes: np.ndarray) -> Real:
        values = torch.from_numpy(codes).float() * (1 / 2 ** (source.bits - 1))
        return kind(values * torch.tensor(source.limit, dtype=torch.float32))

    def rounded(codes: np.ndarray) -> np.ndarray:
        return np.rint((clip_quantise(real(codes), target.bits, limit) / limit * half).numpy()).astype(np.int64)

    if source.bits <= TABLE_BITS:
        table = table_of(rounded, *source.codes)
        return Lookup(inputs=(x,), outputs=(name,), table=Constant.of(table), first=source.codes[0], scale=target.step)
    bits = source.bits - TABLE_BITS
    segments = segments_of(lambda codes: real(codes).double().numpy() / target.step, source.codes, target.codes, bits)
    return Interpolate(
        inputs=(x,),
        outputs=(name,),
        nodes=Constant.of(segments.nodes),
        first=segments.first,
        step_bits=segments.step_bits,
        low=segments.low,
        high=segments.high,
        error=segments.error,
        scale=target.step,
    )


def _add(xs: list[tuple[str, float]], name: str, target: float, limits: tuple[int, int]) -> AddRequantise:
    """Sum of (tensor, step) in steps of `target`, one rounding."""
    multipliers, shift = from_reals([step / target for _, step in xs])
    low, high = limits
    inputs = tuple(x for x, _ in xs)
    return AddRequantise(
        inputs=inputs, outputs=(name,), multipliers=tuple(multipliers), shift=shift, low=low, high=high, scale=target
    )


def _multiply(a: tuple[str, _Signal], b: tuple[str, _Signal], name: str, target: _Signal) -> Multiply:
    rescale = Rescale.of(a[1].step * b[1].step / target.step, target.codes)
    return Multiply(inputs=(a[0], b[0]), outputs=(name,), rescale=rescale, scale=target.step)


class _Cell:
    """One block's time step."""

    def __init__(self, net: BlockLSTM, block: int, limits: dict[str, float], codes: dict[str, WeightCodes]) -> None:
        self.bits = net.bits
        inp, mvm, nm = net.bits.register or net.bits.inp, net.bits.mvm, net.bits.nm
        assert inp is not None and mvm is not None and nm is not None
        self.block, self.hidden, self.codes = block, net.hidden, codes
        bits = {"a1": inp, "a12": mvm, "a13": mvm}
        self.signal = {name: _Signal(limit, bits.get(name, nm)) for name, limit in limits.items()}
        self.h_in = _Signal(limits["a11"], inp)

    def add(self, body: Program, x: str, view: View) -> list[State]:
        """Add the step to `body`; returns its states, h and c."""
        s, hidden = self.signal, self.hidden

        def name(part: str) -> str:
            return f"block{self.block}.{part}"

        h = body.input(name("h"), s["a11"].tensor(hidden))
        c = body.input(name("c"), s["a9"].tensor(hidden))
        x_in = view.rescale(s["a1"].limit, s["a1"].bits, s["a1"].codes)
        body.add(Requantise(inputs=(x,), outputs=(name("x_in"),), rescale=x_in, scale=s["a1"].step))
        # q(h): both grids share the range, so this is a pure shift and ties go to even as in training.
        h_in = Rescale.of(2.0 ** (self.h_in.bits - s["a11"].bits), self.h_in.codes)
        body.add(Requantise(inputs=(h,), outputs=(name("h_in"),), rescale=h_in, scale=self.h_in.step))
        keys = [("lstm.w_ih", "lstm.b_ih"), ("lstm.w_hh", "lstm.b_hh")]
        products = [
            *_product(body, name("x_in"), name("p1"), s["a1"], s["a12"], self.codes, keys[0], self.block, self.bits),
            *_product(body, name("h_in"), name("p2"), self.h_in, s["a13"], self.codes, keys[1], self.block, self.bits),
        ]
        body.add(_add(products, name("gates"), s["a14"].step, s["a14"].codes))
        gates = (
            ("i", torch.sigmoid, "a4"),
            ("j", torch.tanh, "a5"),
            ("f", torch.sigmoid, "a3"),
            ("o", torch.sigmoid, "a6"),
        )
        for place, (gate, kind, limit) in enumerate(gates):
            cut = (place * hidden, (place + 1) * hidden)
            body.add(Slice(inputs=(name("gates"),), outputs=(name(f"{gate}.in"),), start=cut[0], stop=cut[1]))
            body.add(_function(name(gate), name(f"{gate}.in"), kind, s["a14"], s[limit]))
        body.add(_multiply((c, s["a9"]), (name("f"), s["a3"]), name("kept"), s["a7"]))
        body.add(_multiply((name("i"), s["a4"]), (name("j"), s["a5"]), name("new"), s["a8"]))
        parts = [(name("kept"), s["a7"].step), (name("new"), s["a8"].step)]
        body.add(_add(parts, name("c.next"), s["a9"].step, s["a9"].codes))
        body.add(_function(name("shown"), name("c.next"), torch.tanh, s["a9"], s["a10"]))
        body.add(_multiply((name("shown"), s["a10"]), (name("o"), s["a6"]), name("h.next"), s["a11"]))
        return [
            State(h, name("h.next"), s["a11"].tensor(hidden)),
            State(c, name("c.next"), s["a9"].tensor(hidden)),
        ]


def _read_out(program: Program, net: BlockLSTM, block: int, h_limit: float, codes: dict[str, WeightCodes]) -> _Terms:
    """Scores of a block as ADC codes [O]."""
    inp, mvm, nm = net.bits.register or net.bits.inp, net.bits.mvm, net.bits.nm
    assert inp is not None and mvm is not None and nm is not None
    limits = net.readout.ranges[:, block].detach().double().tolist()
    h, dac, adc = _Signal(h_limit, nm), _Signal(limits[0], inp), _Signal(limits[1], mvm)
    h_in, score = f"block{block}.read_in", f"block{block}.score"
    rescale = Rescale.of(h.step / dac.step, dac.codes)
    program.add(Requantise(inputs=(f"block{block}.h.last",), outputs=(h_in,), rescale=rescale, scale=dac.step))
    return _product(program, h_in, score, dac, adc, codes, ("readout.weight", "readout.bias"), block, net.bits)


def _logits(program: Program, net: BlockLSTM, scores: list[_Terms]) -> str:
    assert net.bits.nm is not None
    if net.method == ORTHOGONALITY:
        target = _Signal(float(net.sum_range.detach()), net.bits.nm)
        return program.add(_add([term for terms in scores for term in terms], "logits", target.step, target.codes))
    # The real sums are compared as they are: a common scale finer than any ADC step.
    step = max(step for terms in scores for _, step in terms) / 2**LOGIT_FRACTION
    limits = (-(1 << 31), (1 << 31) - 1)
    groups = []
    for group in range(net.groups):
        parts = [term for terms in scores[group :: net.groups] for term in terms]
        groups.append(program.add(_add(parts, f"group{group}", step, limits)))
    pieces: list[str] = []
    run: list[tuple[int, int]] = []
    for place in [*class_order(net.classes, net.groups), None]:
        if run and (place is None or place != (run[-1][0], run[-1][1] + 1)):
            group, start, stop = run[0][0], run[0][1], run[-1][1] + 1
            name = f"group{group}.classes{start}"
            pieces.append(program.add(Slice(inputs=(groups[group],), outputs=(name,), start=start, stop=stop)))
            run = []
        if place is not None:
            run.append(place)
    return program.add(Concat(inputs=tuple(pieces), outputs=("logits",)))

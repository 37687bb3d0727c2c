"""Random integer graphs that hold every op, as many as fit one compilation."""

from __future__ import annotations

import math

import numpy as np

from kestrel.errors import KestrelError
from kestrel.lower import ops
from kestrel.lower.graph import IntegerGraph, Program, Scan, State
from kestrel.lower.ops import Window
from kestrel.lower.tensor import COLUMN_STORAGES, STORAGE_BITS, Constant, Tensor
from kestrel.quant.integer import Rescale, twos_complement

STORAGES = sorted(STORAGE_BITS.keys() - set(COLUMN_STORAGES))  # of any product
CHANGES = (254, 32638, 32766, 60000)  # largest: two int8, 256 times one and another, int16, more
LIMITS = {8: (-128, 127), 16: (-(1 << 15), (1 << 15) - 1), 32: (-(1 << 31), (1 << 31) - 1)}


def constant(rng: np.random.Generator, shape: tuple[int, ...], storage: str, most: int | None = None) -> Constant:
    """Values over the whole range of a storage (or -most .. most), the ends included."""
    low, high = Constant.range_of(storage)
    low, high = (low, high) if most is None else (max(low, -most), min(high, most))
    values = rng.integers(low, high + 1, shape)
    flat = values.reshape(-1)
    if flat.size > 1:
        flat[0], flat[-1] = low, high
    if storage.startswith(("odd", "binary", "maskedodd")):
        values = np.where(values & 1, values, np.where(values >= high, values - 1, values + 1))
    if storage.startswith(("sparse", "masked")):
        values = np.where(rng.random(shape) < 0.8, 0, values)
    if storage == "power4":  # the power of two at or below the magnitude, 1 for 0
        values = np.where(values < 0, -1, 1) * 2 ** np.log2(np.maximum(np.abs(values), 1)).astype(np.int64)
    return Constant(values, storage)


class Maker:
    """A graph whose input is one vector; every branch begins with a part of it in other codes and a shape of its own."""

    def __init__(self, seed: int, size: int = 400) -> None:
        self.rng = np.random.default_rng(seed)
        self.graph = IntegerGraph()
        self.features = self.graph.input("features", Tensor((size,), *LIMITS[16], 0.01))
        self.size, self.count, self.ends = size, 0, []

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}.{self.count}"

    def pick(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def rescale(self, name: str, channels: int, bits: int | None = None) -> Rescale:
        """Random scaling of tensor `name` to `bits` that uses much of their range, single or per channel."""
        x = self.graph.tensors[name]
        bits = bits or int(self.rng.choice([8, 16, 32]))
        return scaling(self.rng, x.magnitude, channels, bits)

    def source(self, shape: tuple[int, ...], bits: int | None = None, high: int | None = None) -> str:
        """A tensor of this shape and 8, 16 or 32 bits, of values -high .. high."""
        bits = bits or int(self.rng.choice([8, 16, 32]))
        size = math.prod(shape)
        start = self.pick(0, self.size - size)
        cut, shaped, out = (self.name(kind) for kind in ("cut", "shaped", "codes"))
        self.graph.add(ops.Slice(inputs=(self.features,), outputs=(cut,), start=start, stop=start + size))
        self.graph.add(ops.Reshape(inputs=(cut,), outputs=(shaped,), shape=shape))
        high = high or {8: 100, 16: 30000, 32: 1 << 20}[bits]
        ratio = high / 32768
        rescale = Rescale.of(ratio, (-high, high))
        return self.graph.add(ops.Requantise(inputs=(shaped,), outputs=(out,), rescale=rescale))

    def end(self, name: str) -> None:
        self.ends.append(name)

    def finish(self) -> IntegerGraph:
        """All branches become one vector, the logits."""
        flat = []
        for name in self.ends:
            size = self.graph.tensors[name].size
            flat.append(self.graph.add(ops.Reshape(inputs=(name,), outputs=(self.name("flat"),), shape=(size,))))
        self.graph.output(self.graph.add(ops.Concat(inputs=tuple(flat), outputs=("logits",))))
        self.graph.output(self.graph.add(ops.ArgMax(inputs=("logits",), outputs=("class",))))
        return self.graph

    def add(self, kind: type[ops.Op], *inputs: str, **fields) -> str:
        name = self.graph.add(kind(inputs=inputs, outputs=(self.name(kind.__name__.lower()),), **fields))
        self.end(name)
        return name

    # ------------------------------------------------------------------------------------------------------- branches

    def requantise(self) -> None:
        shape = (self.pick(1, 4), self.pick(1, 70))
        x = self.source(shape)
        self.add(ops.Requantise, x, rescale=self.rescale(x, shape[1]))
        self.add(ops.Requantise, x, rescale=Rescale((1,), self.pick(0, 9), *LIMITS[self.pick(0, 1) * 8 + 8]))

    def add_requantise(self) -> None:
        shape = (self.pick(1, 150),)
        xs = [self.source(shape) for _ in range(self.pick(1, 4))]
        multipliers = tuple(int(m) for m in self.rng.integers(-(1 << 30), 1 << 30, len(xs)))
        self.add(
            ops.AddRequantise, *xs, multipliers=multipliers, shift=self.pick(28, 40), low=-30000, high=self.pick(1, 90)
        )

    def multiply(self) -> None:
        shape = tuple(self.pick(1, 5) for _ in range(self.pick(1, 4)))
        other = tuple(size if self.pick(0, 1) else 1 for size in shape)
        a, b = self.source(shape, [8, 16][self.pick(0, 1)]), self.source(other, [8, 16][self.pick(0, 1)])
        rescale = scaling(self.rng, 10**7, shape[-1], [8, 16, 32][self.pick(0, 2)])
        self.add(ops.Multiply, a, b, rescale=rescale if self.pick(0, 3) else None)

    def lookup(self) -> None:
        x = self.source((self.pick(1, 90),), 8)
        tensor = self.graph.tensors[x]
        storage = ["int8", "int16", "int32", "int4"][self.pick(0, 3)]
        first = tensor.low - self.pick(0, 3)
        self.add(ops.Lookup, x, table=constant(self.rng, (tensor.high - first + 1,), storage), first=first)

    def interpolate(self) -> None:
        x = self.source((self.pick(1, 90),))
        tensor, bits = self.graph.tensors[x], self.pick(2, 12)
        bits = max(bits, (tensor.high - tensor.low).bit_length() - 8)
        storage, most = [("int8", None), ("int16", None), ("int32", 1 << 18)][self.pick(0, 2)]
        count = ((tensor.high - tensor.low) >> bits) + 2
        nodes = constant(self.rng, (count,), storage, most)
        if (int(nodes.values.max()) - int(nodes.values.min())) << bits >= 1 << 30:
            nodes = constant(self.rng, (count,), "int8")
        high = self.pick(1, int(nodes.values.max()))
        self.add(ops.Interpolate, x, nodes=nodes, first=tensor.low, step_bits=bits, low=self.pick(-99, 0), high=high)

    def matmul(self, storage: str | None = None) -> None:
        storage = storage or STORAGES[self.pick(0, len(STORAGES) - 1)]
        rows, width, outputs = self.pick(1, 3), self.pick(1, 90), self.pick(1, 9)
        if storage == "int32":
            x = self.source((rows, min(width, 20)), 8)
            width = min(width, 20)
        else:
            x = self.source((rows, width), [8, 8, 16, 32][self.pick(0, 3 if Constant.range_of(storage)[1] < 9 else 1)])
        weight = constant(self.rng, (outputs, width), storage, 100_000 if storage == "int32" else None)
        bias = constant(self.rng, (outputs,), "int16") if self.pick(0, 1) else None
        rescale = scaling(self.rng, 10**6, outputs, [8, 16][self.pick(0, 1)]) if self.pick(0, 2) else None
        self.add(ops.MatMul, x, weight=weight, bias=bias, rescale=rescale)

    def _window(self, height: int, width: int, padded: bool) -> Window:
        size = (self.pick(1, min(3, height)), self.pick(1, min(4, width)))
        pads = [(self.pick(0, 2), self.pick(0, 2)) if padded else (0, 0) for _ in range(2)]
        return Window(size, (self.pick(1, 2), self.pick(1, 3)), *pads)

    def conv(self) -> None:
        shape = (self.pick(1, 7), self.pick(1, 7), self.pick(1, 8))
        x, outputs = self.source(shape, [8, 16][self.pick(0, 1)]), self.pick(1, 9)
        window, storage = self._window(*shape[:2], True), STORAGES[self.pick(0, len(STORAGES) - 1)]
        most = 50 if storage in ("int16", "int32") else None
        weight = constant(self.rng, (outputs, *window.size, shape[2]), storage, most)
        bias = constant(self.rng, (outputs,), "int16") if self.pick(0, 1) else None
        rescale = scaling(self.rng, 10**6, outputs, [8, 16][self.pick(0, 1)]) if self.pick(0, 2) else None
        self.add(ops.Conv2d, x, weight=weight, window=window, bias=bias, rescale=rescale)

    def depthwise(self) -> None:
        channels = self.pick(1, 90)
        shape = (self.pick(1, 2), self.pick(1, 2), channels)
        x = self.source(shape, [8, 16][self.pick(0, 1)])
        window, storage = self._window(*shape[:2], True), STORAGES[self.pick(0, len(STORAGES) - 1)]
        most = 50 if storage in ("int16", "int32") else None
        weight = constant(self.rng, (*window.size, channels), storage, most)
        bias = constant(self.rng, (channels,), "int16") if self.pick(0, 1) else None
        rescale = scaling(self.rng, 10**6, channels, [8, 16][self.pick(0, 1)]) if self.pick(0, 2) else None
        self.add(ops.DepthwiseConv2d, x, weight=weight, window=window, bias=bias, rescale=rescale)

    def pooling(self) -> None:
        shape = (self.pick(1, 7), self.pick(1, 7), self.pick(1, 8))
        x = self.source(shape)
        self.add(ops.MaxPool, x, window=self._window(*shape[:2], False))
        rescale = scaling(self.rng, 10**6, shape[2], [8, 16][self.pick(0, 1)]) if self.pick(0, 1) else None
        self.add(ops.SumPool, x, window=self._window(*shape[:2], False), rescale=rescale)

    def moving(self) -> None:
        shape = (self.pick(1, 4), self.pick(1, 4), self.pick(1, 5))
        x, other = self.source(shape), self.source(shape)
        self.add(ops.Upsample, x, factor=(self.pick(1, 3), self.pick(1, 3)))
        self.add(ops.Transpose, x, axes=tuple(int(a) for a in self.rng.permutation(3)))
        joined = self.add(ops.Concat, x, other, x, axis=self.pick(0, 2))
        axis = self.pick(0, 2)
        length = self.graph.tensors[joined].shape[axis]
        start = self.pick(0, length - 1)
        self.add(ops.Slice, joined, start=start, stop=self.pick(start + 1, length), axis=axis)
        self.add(ops.ArgMax, self.source((self.pick(1, 20),)))

    def delta(self) -> None:
        """A layer with delta updates, as a scan of its own."""
        storage = ["int8", "int4", "ternary", "binary", "int2", "odd3", "int5", "sparse8", "sparse3"][self.pick(0, 8)]
        weight = constant(self.rng, (self.pick(1, 50), self.pick(1, 40)), storage)
        self.changes(weight, self.pick(0, 3))

    def changes(self, weight: Constant, kind: int) -> None:
        """A layer with delta updates, whose changes are those of CHANGES[kind]."""
        steps, (outputs, width) = self.pick(2, 6), weight.shape
        high = CHANGES[kind] // 2
        x = self.source((steps, width), 8 if high < 128 else 16, high)
        tensor = self.graph.tensors[x]
        prefix, body = self.name("delta"), Program()
        row = body.input(f"{prefix}.x", Tensor((width,), tensor.low, tensor.high))
        sent_tensor = Tensor((width,), min(tensor.low, 0), max(tensor.high, 0))
        reach = ops.sum_range(weight.values, None, sent_tensor.low, sent_tensor.high)
        memory_tensor = Tensor((outputs,), *reach)
        sent, memory = body.input(f"{prefix}.sent", sent_tensor), body.input(f"{prefix}.memory", memory_tensor)
        made = (f"{prefix}.d", f"{prefix}.sent.next")
        body.add(ops.DeltaUpdate(inputs=(row, sent), outputs=made, threshold=self.pick(0, tensor.high)))
        following = f"{prefix}.memory.next"
        body.add(ops.Accumulate(inputs=(memory, made[0]), outputs=(following,), weight=weight))
        states = (State(sent, made[1], sent_tensor), State(memory, following, memory_tensor))
        outputs_ = (f"{prefix}.rows", f"{prefix}.last")
        scan = Scan(
            inputs=(x,),
            outputs=outputs_,
            body=body,
            steps=(row,),
            states=states,
            emitted=(following,),
            last=(memory,),
        )
        self.graph.add(scan)
        self.ends += outputs_

    def shifting(self) -> None:
        """States that become other states (a delay line and a swap), with initial values, and a state that is read late."""
        steps, width = self.pick(1, 6), self.pick(1, 9)
        bits = [8, 16][self.pick(0, 1)]
        x = self.source((steps, width), bits)
        tensor = self.graph.tensors[x]
        prefix, body = self.name("shift"), Program()
        row_tensor = Tensor((width,), tensor.low, tensor.high)
        row = body.input(f"{prefix}.x", row_tensor)
        names = [body.input(f"{prefix}.s{k}", row_tensor) for k in range(5)]
        limits = (tensor.low, tensor.high)

        def mixed(inputs: tuple[str, ...], part: str) -> str:
            multipliers = tuple(int(m) for m in self.rng.integers(-3, 4, len(inputs)))
            op = ops.AddRequantise(
                inputs=inputs,
                outputs=(f"{prefix}.{part}",),
                multipliers=multipliers,
                shift=1,
                low=limits[0],
                high=limits[1],
            )
            return body.add(op)

        early = mixed((names[0], names[3], row), "early")
        late = mixed((names[3], early, names[2]), "late")
        following = (row, names[0], names[3], names[2], late)
        first = constant(self.rng, (width,), "int8", 90)
        states = tuple(
            State(name, after, row_tensor, first if place % 2 else None)
            for place, (name, after) in enumerate(zip(names, following, strict=True))
        )
        outputs = tuple(f"{prefix}.o{k}" for k in range(4))
        emitted, last = (names[1], early), (names[4], names[2])
        self.graph.add(
            Scan(inputs=(x,), outputs=outputs, body=body, steps=(row,), states=states, emitted=emitted, last=last)
        )
        self.ends += outputs


BRANCHES = (
    "requantise add_requantise multiply lookup interpolate matmul conv depthwise pooling moving delta shifting".split()
)


def scaling(rng: np.random.Generator, magnitude: int, channels: int, bits: int) -> Rescale:
    """To `bits` with about a quarter of `magnitude` at the limits; per channel, with offsets, or neither."""
    low, high = twos_complement(bits)
    count = channels if rng.integers(2) else 1
    ratios = (rng.uniform(-1, 1, count) * 4 * min(high, 1 << 24) / max(1, magnitude)).tolist()
    offsets = (
        rng.uniform(-high / 4, high / 4, channels if rng.integers(2) else 1).tolist() if rng.integers(2) else [0.0]
    )
    return Rescale.of(ratios, (low if rng.integers(2) else 0, high), offsets)


def random_graph(seed: int, rounds: int = 1) -> IntegerGraph:
    """Every kind of branch `rounds` times. A branch that the integer checks refuse is drawn again."""
    maker = Maker(seed)
    for branch in BRANCHES * rounds:
        for _ in range(20):
            before = len(maker.graph.ops), dict(maker.graph.tensors), list(maker.ends)
            try:
                getattr(maker, branch)()
                break
            except KestrelError:
                del maker.graph.ops[before[0] :]
                maker.graph.tensors, maker.ends = before[1], before[2]
        else:
            raise AssertionError(f"{branch} is refused again and again")
    return maker.finish()


def wide_graph(seed: int) -> IntegerGraph:
    """Products and functions whose sizes lie around multiples of the lanes of vectors, and of tiles and spans."""
    maker = Maker(seed, 4000)
    rng = maker.rng
    for outputs, width, rows in [(15, 3, 5), (16, 4, 4), (17, 5, 1), (130, 33, 6), (128, 64, 3), (257, 118, 1)]:
        x = maker.source((rows, width), [8, 16][maker.pick(0, 1)])
        weight = constant(rng, (outputs, width), ["int8", "int4", "ternary"][maker.pick(0, 2)])
        bias = constant(rng, (outputs,), "int16") if maker.pick(0, 1) else None
        rescale = scaling(rng, 10**6, outputs, [8, 16][maker.pick(0, 1)])
        maker.add(ops.MatMul, x, weight=weight, bias=bias, rescale=rescale)
    for low in (-128, 0):  # all of int8, ends included, and the half that is not negative
        for outputs, width, rows in [(257, 118, 1), (33, 7, 2), (70, 20, 9), (16, 6, 4)]:
            start = maker.pick(0, maker.size - rows * width)
            cut = maker.add(ops.Slice, maker.features, start=start, stop=start + rows * width)
            shaped = maker.graph.add(ops.Reshape(inputs=(cut,), outputs=(maker.name("rows"),), shape=(1, rows, width)))
            x = maker.add(ops.Requantise, shaped, rescale=Rescale.of(1 / 170, (low, 127)))
            rescale = scaling(rng, 10**6, outputs, [8, 16][maker.pick(0, 1)])
            maker.add(ops.MatMul, x, weight=constant(rng, (outputs, width), "int8"), rescale=rescale)
            weight = constant(rng, (outputs, 1, 1, width), "int8")
            maker.add(ops.Conv2d, x, weight=weight, window=Window((1, 1)), rescale=rescale)
    for channels, bits in [(15, 8), (16, 8), (17, 16), (31, 8), (32, 16), (33, 8), (72, 8), (72, 16), (64, 8)]:
        shape = (4, 5, channels)
        x = maker.source(shape, bits)
        window = Window((3, 2), (1, 2), (1, 0), (0, 1))
        weight = constant(rng, (*window.size, channels), ["int8", "int4", "ternary"][maker.pick(0, 2)])
        rescale = scaling(rng, 10**5, channels, [8, 16][maker.pick(0, 1)])
        bias = constant(rng, (channels,), "int16") if maker.pick(0, 1) else None
        maker.add(ops.DepthwiseConv2d, x, weight=weight, window=window, bias=bias, rescale=rescale)
        outputs = maker.pick(14, 34)
        dense = constant(rng, (outputs, *window.size, channels), "int8")
        maker.add(ops.Conv2d, x, weight=dense, window=window, rescale=scaling(rng, 10**6, outputs, 8))
    for size in (7, 8, 15, 16, 17, 63, 64, 65, 130):
        x = maker.source((size,), 16)
        nodes = constant(rng, (1026,), "int16", 3000)
        first = maker.graph.tensors[x].low
        maker.add(ops.Interpolate, x, nodes=nodes, first=first, step_bits=6, low=-2900, high=maker.pick(1, 2900))
        maker.add(ops.Requantise, x, rescale=scaling(rng, 30000, size, [8, 16, 32][maker.pick(0, 2)]))
        pair = tuple(int(m) for m in rng.integers(-9, 10, 2))
        other = maker.source((size,), [8, 16][maker.pick(0, 1)])
        maker.add(ops.AddRequantise, x, other, multipliers=pair, shift=maker.pick(0, 4), low=-20000, high=20000)
        fine = tuple(int(m) for m in rng.integers(-(1 << 30), 1 << 30, 2))  # sums of 53 bits
        maker.add(ops.AddRequantise, x, other, multipliers=fine, shift=30, low=-20000, high=20000)
        words = maker.source((size,), 16)
        maker.add(ops.AddRequantise, x, words, multipliers=(1, 1), shift=0, low=-(1 << 15), high=(1 << 15) - 1)
        product = scaling(rng, 10**9, 1, [8, 16][maker.pick(0, 1)])
        maker.add(
            ops.Multiply, x, words, rescale=Rescale((product.multipliers[0],), product.shift, product.low, product.high)
        )
        maker.add(ops.Multiply, x, words)
    return maker.finish()


def kept(rng: np.random.Generator, outputs: int, width: int, lanes: int, share: float, group: int = 1) -> np.ndarray:
    """int8 [outputs, width], the ends included; each of `lanes` lanes keeps `share` of its (groups of) outputs in each column."""
    local = outputs // lanes // group
    count = max(1, round(share * local))
    order = rng.random((local, lanes, width)).argsort(axis=0) < count
    values = rng.integers(-128, 128, (outputs, width))
    values[:, 0], values[:, -1] = -128, 127
    return values * np.repeat(order.reshape(-1, width), group, axis=0)


def sparse_graph(seed: int) -> IntegerGraph:
    """Products of changes in every storage of columns, with sizes around those of vectors, narrow and wide changes."""
    maker = Maker(seed, 4000)
    rng = maker.rng
    for outputs, width in [(15, 3), (33, 21), (64, 5), (130, 33), (328, 18)]:
        for kind in range(4):
            storage = ["int8", "sparse8", "int4", "ternary"][maker.pick(0, 3)]
            maker.changes(constant(rng, (outputs, width), storage), kind)
    for outputs, width, lanes in [(48, 30, 16), (257, 9, 1), (512, 10, 64), (1200, 7, 4)]:
        for share in (0.02, 0.2, 1.0):
            storage = "sparse8" if share == 0.2 and maker.pick(0, 1) else "balanced"
            maker.changes(Constant(kept(rng, outputs, width, lanes, share), storage), maker.pick(0, 3))
    for outputs, width, lanes, group in [(48, 11, 1, 16), (512, 10, 1, 64), (256, 17, 2, 16)]:
        for share in (0.06, 1.0):
            maker.changes(Constant(kept(rng, outputs, width, lanes, share, group), "groups"), maker.pick(0, 3))
    return maker.finish()


def all_storages(seed: int) -> IntegerGraph:
    """A product with every storage of weights, alone and with rows of several lengths."""
    maker = Maker(seed)
    for storage in STORAGES:
        maker.matmul(storage)
    return maker.finish()


__all__ = [
    "BRANCHES",
    "STORAGES",
    "Maker",
    "all_storages",
    "constant",
    "kept",
    "random_graph",
    "scaling",
    "sparse_graph",
    "wide_graph",
]

"""Any feed-forward or recurrent torch network of common layers as integers, with ranges calibrated on features.

The network is traced with torch.fx; every layer becomes an op, batch normalisation and ReLUs join the op before them.
Activations are int8 codes with one scale per tensor, taken from the largest magnitude on the calibration features, or the one
that it was trained with where a QuantActivation follows; a network that has one behind every op needs no calibration.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from kestrel.errors import KestrelError
from kestrel.lower import conv
from kestrel.lower.conv import Affine, Target
from kestrel.lower.graph import Program
from kestrel.lower.ops import Concat, MaxPool, Requantise, Reshape, Slice, Transpose, Upsample, Window
from kestrel.lower.post import View
from kestrel.lower.rnn import Thresholds, lower_rnn
from kestrel.lower.value import ACTIVATION_BITS, WIDE_BITS, Value, requantised, step_of
from kestrel.nn.condenser import Attend, HardGate, Shift, Strength
from kestrel.nn.low_bit import LowBit, QuantActivation
from kestrel.nn.sequence import FramesAsColumns
from kestrel.quant.integer import Rescale, symmetric, twos_complement
from kestrel.quant.packing import WeightCodes, encode

Node = fx.Node

# Element-wise functions that become tables, as modules; keys are what a trace may hold.
_FUNCTIONS: dict[Any, Callable[[], nn.Module]] = {
    torch.sigmoid: nn.Sigmoid,
    functional.sigmoid: nn.Sigmoid,
    "sigmoid": nn.Sigmoid,
    torch.tanh: nn.Tanh,
    functional.tanh: nn.Tanh,
    "tanh": nn.Tanh,
    functional.hardsigmoid: nn.Hardsigmoid,
    functional.hardswish: nn.Hardswish,
    functional.silu: nn.SiLU,
    functional.leaky_relu: nn.LeakyReLU,
}
_TABLES = (nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardswish, nn.SiLU, nn.LeakyReLU, nn.GELU, nn.ELU)
_RELUS = {torch.relu: nn.ReLU, functional.relu: nn.ReLU, "relu": nn.ReLU, functional.relu6: nn.ReLU6}
_ADD = (operator.add, operator.iadd, torch.add, "add")
_MUL = (operator.mul, operator.imul, torch.mul, "mul")
_FLATTEN = (torch.flatten, "flatten")
_MEAN = (torch.mean, "mean")
_UNSQUEEZE = (torch.unsqueeze, "unsqueeze")
_TRANSPOSE = (torch.transpose, "transpose")


_LEAVES = (LowBit, QuantActivation, HardGate, Strength, Attend, Shift, FramesAsColumns, nn.BatchNorm2d, nn.MaxPool2d)


class _Tracer(fx.Tracer):
    """Takes quantised layers as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)


class _Peaks(fx.Interpreter):
    """Runs a traced network on the calibration features and keeps the largest magnitude and the shape of every result.

    `measured` False: the features say nothing but their shape.
    """

    def __init__(self, module: fx.GraphModule, measured: bool) -> None:
        super().__init__(module)
        self.measured = measured
        self.largest: dict[Node, float] = {}
        self.shape: dict[Node, tuple[int, ...]] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.largest[n], self.shape[n] = float(result.abs().max()), tuple(result.shape)
        return result


def lower_network(
    program: Program,
    view: View,
    module: nn.Module,
    calibration: Tensor | None,
    weight_bits: int = 8,
    codes: Mapping[str, WeightCodes] | None = None,
    thresholds: Thresholds | None = None,
) -> str:
    """Add `module`, applied to the features `view` [T, F], to `program`; returns the name of its result.

    Args:
        module: features [B, T, F] -> logits [B, C], in evaluation mode.
        calibration: features [B, T, F] as the module gets them, from the training split; None where every op has a
            trained QuantActivation behind it (the logits need none: they get the range that they cannot leave).
        weight_bits: bits of weights that are not in `codes`.
        codes: trained integer weights by parameter name.
        thresholds: delta updates for its LSTM and GRU layers.

    Raises KestrelError, one line, where a layer has no integer form.
    """
    module = module.eval()
    try:
        traced = fx.GraphModule(module, _Tracer().trace(module))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise KestrelError(f"{type(module).__name__} cannot be traced, so it has no integer form: {reason}") from error
    peaks = _Peaks(traced, calibration is not None)
    example = torch.zeros(1, *program.tensors[view.name].shape) if calibration is None else calibration
    with torch.no_grad():
        peaks.run(example)
    return _Walk(program, traced, peaks, weight_bits, codes or {}, thresholds).run(view)


@dataclass(frozen=True)
class _Tail:
    """What joins an op: `last` is the node whose result it makes."""

    last: Node
    norm: nn.BatchNorm2d | nn.BatchNorm1d | None
    gate: HardGate | None
    strength: Strength | None
    activation: nn.Module | None
    quantiser: QuantActivation | None


class _Walk:
    """Adds the ops of a traced network, node by node.

    Values of PyTorch's shape [B, C, H, W] are images [H, W, C] here; other shapes keep their order.
    """

    def __init__(
        self,
        program: Program,
        traced: fx.GraphModule,
        peaks: _Peaks,
        weight_bits: int,
        codes: Mapping[str, WeightCodes],
        thresholds: Thresholds | None,
    ) -> None:
        self.program, self.traced, self.peaks = program, traced, peaks
        self.weight_bits, self.codes, self.thresholds = weight_bits, codes, thresholds
        self.modules = dict(traced.named_modules())
        self.values: dict[Node, Value] = {}
        self.joining: dict[Node, list[Node]] = {}  # nodes whose results are that of the op for the key
        self.fixed: dict[str, dict[int, int]] = {}  # by tensor: channels that are one code everywhere, in all clips

    def run(self, view: View) -> str:
        for node in self.traced.graph.nodes:
            if node in self.values:
                continue  # joined the op before it
            if node.op == "placeholder":
                self.values[node] = self._input(node, view)
            elif node.op == "output":
                (result,) = node.args
                if not isinstance(result, Node):
                    raise KestrelError("a network with several outputs has no integer form: return the logits alone")
                return self.values[result].name
            elif node.op != "get_attr":
                self._layer(node)
            for other in self.joining.pop(node, []):
                self.values[other] = self.values[node]
        raise AssertionError("a traced network ends with its output")

    # -------------------------------------------------------------------------------------------------------- helpers

    def _input(self, node: Node, view: View) -> Value:
        tail = self._tail(node)
        if tail.last is node:
            target = Target(step_of(self._peak(node), ACTIVATION_BITS), *symmetric(ACTIVATION_BITS))
        else:
            target = self._target(tail)
        rescale = view.rescale(target.step * 2 ** (ACTIVATION_BITS - 1), ACTIVATION_BITS, target.limits)
        op = Requantise(inputs=(view.name,), outputs=(f"{node}.codes",), rescale=rescale, scale=target.step)
        return Value(self.program.add(op), target.step)

    def _peak(self, node: Node) -> float:
        """The largest magnitude of a result on the calibration features."""
        if not self.peaks.measured:
            raise self._refused(node, "no QuantActivation follows it, and there are no features to calibrate with")
        return self.peaks.largest[node]

    def _kind(self, node: Node) -> Any:
        """The module, function or method name that a node calls."""
        return self.modules[str(node.target)] if node.op == "call_module" else node.target

    def _relu(self, node: Node) -> nn.Module | None:
        if not node.op.startswith("call"):
            return None
        kind = self._kind(node)
        if isinstance(kind, nn.Module):
            return kind if isinstance(kind, (nn.ReLU, nn.Hardtanh)) else None
        return _RELUS[kind]() if kind in _RELUS else None

    def _tail(self, node: Node, norm: bool = False, gate: bool = False, strength: bool = False) -> _Tail:
        """What joins `node`, each being the only user of the one before: batch normalisation (if `norm`), a hard gate (if
        `gate`), an attention's 1 + S x (if `strength`), a ReLU, a QuantActivation."""
        chain: list[Node] = [node]
        found: list[nn.Module | None] = []
        wanted = (
            (lambda n: self._module_of(n, (nn.BatchNorm2d, nn.BatchNorm1d))) if norm else None,
            (lambda n: self._module_of(n, HardGate)) if gate else None,
            (lambda n: self._module_of(n, Strength)) if strength else None,
            self._relu,
            lambda n: self._module_of(n, QuantActivation),
        )
        for kind in wanted:
            following = self._after(chain[-1])
            module = kind(following) if kind is not None and following is not None else None
            found.append(module)
            if module is not None and following is not None:
                chain.append(following)
        self.joining[node] = chain
        return _Tail(chain[-1], *found)  # type: ignore[arg-type]

    def _module_of(self, node: Node, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> Any:
        """The module that `node` calls, if it is of these kinds."""
        module = self._kind(node) if node.op == "call_module" else None
        return module if isinstance(module, kinds) else None

    def _after(self, node: Node) -> Node | None:
        """The only user of a node, past layers that do nothing in evaluation."""
        following = self._only_user(node)
        while following is not None and self._module_of(following, (nn.Identity, nn.Dropout, nn.Dropout2d)):
            following = self._only_user(following)
        return following

    @staticmethod
    def _only_user(node: Node) -> Node | None:
        users = list(node.users)
        return users[0] if len(users) == 1 else None

    def _target(self, tail: _Tail, bound: float | None = None) -> Target:
        """Codes of a result: those of its QuantActivation, or 8 bits that hold what was seen.

        The network's result gets 16 bits, with room for twice what was seen, or for `bound`, which it cannot leave.
        """
        if tail.quantiser is not None:
            step = float(tail.quantiser.step().detach())
            low, high = tail.quantiser.limits(step)
            if tail.activation is not None:
                joined = Target.of(step * high, ACTIVATION_BITS, tail.activation)
                top = getattr(tail.activation, "max_val", math.inf)
                low, high = max(low, joined.low), min(high, round(top / step) if top < math.inf else high)
            return Target(step, low, high)
        if all(user.op == "output" for user in tail.last.users):
            if bound is not None and not self.peaks.measured:
                return Target.of(bound, WIDE_BITS, tail.activation)
            return Target.of(2 * self._peak(tail.last), WIDE_BITS, tail.activation)
        return Target.of(self._peak(tail.last), ACTIVATION_BITS, tail.activation)

    def _weights(self, name: str, parameter: Tensor) -> WeightCodes:
        found = self.codes.get(name)
        return found if found is not None else encode(parameter.detach().double().cpu().numpy(), self.weight_bits)

    def _argument(self, node: Node, place: int, name: str, default: Any = None) -> Any:
        return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)

    def _source(self, node: Node, place: int = 0) -> Value:
        source = node.args[place]
        if not isinstance(source, Node) or source not in self.values:
            raise self._refused(node, "an input is not a tensor that was computed")
        return self.values[source]

    def _refused(self, node: Node, reason: str = "it is not among the ops of kestrel.lower") -> KestrelError:
        kind = self._kind(node)
        text = type(kind).__name__ if isinstance(kind, nn.Module) else getattr(kind, "__name__", str(kind))
        name = str(node.target if node.op == "call_module" else node)
        return KestrelError(f"layer {name!r} ({text}) has no integer form: {reason}")

    def _move(self, op: Any, value: Value) -> Value:
        return Value(self.program.add(op), value.step)

    # --------------------------------------------------------------------------------------------------------- layers

    def _layer(self, node: Node) -> None:
        kind = self._kind(node)
        if node.op == "call_module":
            self.values[node] = self._module(node, kind)
        elif (activation := self._relu(node)) is not None:
            self.values[node] = self._activation(node, activation)
        elif kind in _FUNCTIONS:
            made, target = _FUNCTIONS[kind](), self._target(self._tail(node))
            self.values[node] = conv.tabulated(self.program, self._source(node), made, target, str(node))
        elif kind in _ADD:
            self.values[node] = self._sum(node)
        elif kind in _MUL:
            self.values[node] = self._product(node)
        else:
            self.values[node] = self._moved(node, kind)

    def _module(self, node: Node, module: nn.Module) -> Value:
        x, name = self._source(node), str(node)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            return self._linear(node, module, x)
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            target = self._target(self._tail(node))
            return conv.normalised(self.program, x, Affine.of(module, module.num_features), target, name)
        if isinstance(module, (nn.ReLU, nn.Hardtanh)):
            return self._activation(node, module)
        if isinstance(module, QuantActivation):
            target = self._target(_Tail(node, None, None, None, None, module))
            return requantised(self.program, x, target.step, target.limits, name)
        if isinstance(module, (*_TABLES, HardGate)):
            tail = self._tail(node, strength=True)
            function = module if tail.strength is None else nn.Sequential(module, tail.strength)
            return conv.tabulated(self.program, x, function, self._target(tail), name)
        if isinstance(module, FramesAsColumns):
            frames, bands = self.program.tensors[x.name].shape
            return self._move(Reshape(inputs=(x.name,), outputs=(name,), shape=(frames, 1, bands)), x)
        if isinstance(module, Attend):
            return self._attention(node, module, x)
        if isinstance(module, Shift):
            return self._shifted(name, module.frames, x)
        if isinstance(module, (nn.LSTM, nn.GRU)):
            return lower_rnn(self.program, x, module, str(node.target), self.weight_bits, self.thresholds)
        if isinstance(module, nn.MaxPool2d):
            window = self._window(node, module.kernel_size, module.stride, module.padding, module.ceil_mode)
            if module.dilation not in (1, (1, 1)):
                raise self._refused(node, "set dilation to 1")
            return self._move(MaxPool(inputs=(x.name,), outputs=(name,), window=window), x)
        if isinstance(module, nn.AvgPool2d):
            window = self._window(node, module.kernel_size, module.stride, module.padding, module.ceil_mode)
            return conv.averaged(self.program, x, window, self._target(self._tail(node)), name)
        if isinstance(module, nn.AdaptiveAvgPool2d):
            if module.output_size not in (1, (1, 1)):
                raise self._refused(node, "only output size 1, the mean of the image")
            return self._image_mean(node, x)
        if isinstance(module, nn.Upsample):
            return self._upsampled(node, x, module.mode, module.scale_factor)
        if isinstance(module, nn.Flatten):
            if (module.start_dim, module.end_dim) != (1, -1):
                raise self._refused(node, "only Flatten(1)")
            return self._flat(node, x)
        if isinstance(module, (nn.Dropout, nn.Dropout2d, nn.Identity)):
            return x
        raise self._refused(node)

    def _linear(self, node: Node, module: nn.Conv2d | nn.Linear, x: Value) -> Value:
        tail = self._tail(node, norm=True, gate=True, strength=True)
        codes = self._weights(f"{node.target}.weight", module.weight)
        affine = Affine.of(tail.norm, len(codes.codes))
        ends = None if tail.gate is None else (0.0, 1.0)
        if tail.gate is not None:
            affine = Affine(affine.gain * tail.gate.slope, affine.shift * tail.gate.slope + tail.gate.offset)
        if tail.strength is not None:
            strength = float(tail.strength.scale.detach())
            affine = Affine(affine.gain * strength, affine.shift * strength + 1)
            ends = None if ends is None else (min(1.0, 1 + strength), max(1.0, 1 + strength))
        fixed = self._fixed_sums(x, module, codes)
        affine = affine.with_constants(fixed, codes.scale.astype(np.float64) * x.step, module.bias)
        target = self._target(tail, self._bound(x, codes, module, affine))
        if ends is not None:
            low, high = (round(end / target.step) for end in ends)
            target = Target(
                target.step, max(target.low, min(low, target.high)), min(target.high, max(high, target.low))
            )
        make = conv.linear if isinstance(module, nn.Linear) else conv.conv2d
        made = make(self.program, x, module, codes, affine, target, str(node))  # type: ignore[arg-type]
        self.fixed[made.name] = {
            row: int(np.clip(np.rint(affine.shift[row] / target.step), *target.limits)) for row in fixed
        }
        return made

    def _fixed_sums(self, x: Value, module: nn.Conv2d | nn.Linear, codes: WeightCodes) -> dict[int, int]:
        """Sums of products by output, for those that read nothing but fixed channels."""
        weights = codes.codes.reshape(*codes.codes.shape[:2], -1).astype(np.int64)  # [out, in of the group, places]
        around = getattr(module, "before", 0) or any(np.ravel(getattr(module, "padding", 0)))
        known = {at: code for at, code in self.fixed.get(x.name, {}).items() if code == 0 or not around}
        apart = weights.shape[1] == 1
        found = {}
        for row, parts in enumerate(weights):
            sums = {row if apart else at: int(part.sum()) for at, part in enumerate(parts) if part.any()}
            if sums.keys() <= known.keys():
                found[row] = sum(total * known[at] for at, total in sums.items())
        return found

    def _attention(self, node: Node, module: Attend, v: Value) -> Value:
        """Factors of a smaller map, repeated, times an image."""
        factors = self._source(node, 1)
        if module.factor != (1, 1):
            op = Upsample(inputs=(factors.name,), outputs=(f"{node}.factors",), factor=module.factor)
            factors = self._move(op, factors)
        return conv.multiplied(self.program, v, factors, self._target(self._tail(node)), str(node))

    def _bound(self, x: Value, codes: WeightCodes, module: nn.Conv2d | nn.Linear, affine: Affine) -> float:
        """The largest magnitude that a layer can make of any input in the range of `x`."""
        largest = self.program.tensors[x.name].magnitude * x.step
        reach = np.abs(codes.decode().astype(np.float64).reshape(len(codes.codes), -1)).sum(axis=1) * largest
        bias = 0.0 if module.bias is None else np.abs(module.bias.detach().double().cpu().numpy())
        return float((np.abs(affine.gain) * (reach + bias) + np.abs(affine.shift)).max())

    def _activation(self, node: Node, activation: nn.Module) -> Value:
        tail = self._tail(node)  # a second ReLU changes nothing
        target = self._target(_Tail(tail.last, None, None, None, activation, tail.quantiser))
        return requantised(self.program, self._source(node), target.step, target.limits, str(node))

    def _sum(self, node: Node) -> Value:
        if not all(isinstance(arg, Node) and arg in self.values for arg in node.args[:2]):
            raise self._refused(node, "only tensors are added; give a constant to a bias")
        target = self._target(self._tail(node))
        values = [self._source(node, place) for place in (0, 1)]
        return conv.added(self.program, values, target, str(node))

    def _product(self, node: Node) -> Value:
        factors = [self._scalar(arg) for arg in node.args[:2]]
        for place, factor in enumerate(factors):
            if factor is not None:  # a factor changes what the codes stand for, not the codes
                x = self._source(node, 1 - place)
                if factor == 0:
                    raise self._refused(node, "a factor is 0")
                if factor < 0:
                    flipped = Rescale((-1,), 0, *twos_complement(WIDE_BITS))
                    op = Requantise(inputs=(x.name,), outputs=(str(node),), rescale=flipped, scale=-x.step * factor)
                    x = Value(self.program.add(op), -x.step)
                return Value(x.name, x.step * factor)
        target = self._target(self._tail(node))
        a, b = (self._source(node, place) for place in (0, 1))
        return conv.multiplied(self.program, a, b, target, str(node))

    def _scalar(self, argument: Any) -> float | None:
        if isinstance(argument, (int, float)):
            return float(argument)
        if isinstance(argument, Node) and argument.op == "get_attr":
            tensor = operator.attrgetter(str(argument.target))(self.traced)
            if tensor.numel() == 1:
                return float(tensor.detach())
        return None

    # ---------------------------------------------------------------------------------------------- pooling and moving

    def _window(self, node: Node, size: Any, stride: Any, padding: Any, ceil: bool) -> Window:
        def pair(value: Any) -> tuple[int, int]:
            return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))

        if pair(padding) != (0, 0) or ceil:
            raise self._refused(node, "set padding to 0 and ceil_mode to False")
        return Window(pair(size), pair(stride if stride is not None else size))

    def _image_mean(self, node: Node, x: Value) -> Value:
        height, width, _ = self.program.tensors[x.name].shape
        target = self._target(self._tail(node), self.program.tensors[x.name].magnitude * x.step)
        return conv.averaged(self.program, x, Window((height, width), (height, width)), target, str(node))

    def _shifted(self, name: str, frames: int, x: Value) -> Value:
        """An image later by `frames`, zero beyond its ends: frames that leave it, times zero, stand there."""
        height = self.program.tensors[x.name].shape[0]
        by = max(-height, min(frames, height))
        if by == 0:
            return x
        nothing = Rescale((0,), 0, *twos_complement(ACTIVATION_BITS))

        def cut(part: str, start: int, stop: int) -> str:
            return self.program.add(Slice(inputs=(x.name,), outputs=(f"{name}.{part}",), start=start, stop=stop))

        left = cut("left", 0, by) if by > 0 else cut("left", height + by, height)
        zeros = self.program.add(Requantise(inputs=(left,), outputs=(f"{name}.zeros",), rescale=nothing, scale=x.step))
        if abs(by) == height:
            return Value(zeros, x.step)
        kept = cut("kept", max(by, 0), height + min(by, 0))
        made = self._move(Concat(inputs=(kept, zeros) if by > 0 else (zeros, kept), outputs=(name,)), x)
        self.fixed[made.name] = {at: code for at, code in self.fixed.get(x.name, {}).items() if code == 0}
        return made

    def _upsampled(self, node: Node, x: Value, mode: Any, factor: Any) -> Value:
        pair = (factor, factor) if isinstance(factor, (int, float)) else factor
        if mode != "nearest" or pair is None or any(value != int(value) for value in pair):
            raise self._refused(node, "only mode nearest with a whole scale_factor")
        whole = (int(pair[0]), int(pair[1]))
        return self._move(Upsample(inputs=(x.name,), outputs=(str(node),), factor=whole), x)

    def _flat(self, node: Node, x: Value) -> Value:
        shape, name = self.program.tensors[x.name].shape, str(node)
        if len(shape) == 3 and shape[:2] != (1, 1):  # PyTorch flattens channel by channel
            x = self._move(Transpose(inputs=(x.name,), outputs=(f"{name}.channels",), axes=(2, 0, 1)), x)
        size = self.program.tensors[x.name].size
        return self._move(Reshape(inputs=(x.name,), outputs=(name,), shape=(size,)), x)

    def _axis(self, node: Node, rank: int, dim: int) -> int:
        """PyTorch's dimension `dim` of a value of `rank` dimensions as an axis here."""
        dim = dim % rank
        if dim == 0:
            raise self._refused(node, "it works across the batch")
        return (2, 0, 1)[dim - 1] if rank == 4 else dim - 1

    def _moved(self, node: Node, kind: Any) -> Value:
        name = str(node)
        if kind is torch.cat:
            return self._concat(node)
        if kind is functional.interpolate:
            scale, mode = self._argument(node, 2, "scale_factor"), self._argument(node, 3, "mode", "nearest")
            return self._upsampled(node, self._source(node), mode, scale)
        if kind is operator.getitem:
            return self._item(node)
        source = node.args[0]
        assert isinstance(source, Node)
        rank = len(self.peaks.shape.get(source, ()))
        if kind in _FLATTEN and self._argument(node, 1, "start_dim", 0) == 1:
            return self._flat(node, self._source(node))
        if kind in _MEAN:
            dims = self._argument(node, 1, "dim")
            dims = {dim % rank for dim in ([dims] if isinstance(dims, int) else dims or [])}
            if rank == 4 and dims == {2, 3}:
                value = self._image_mean(node, self._source(node))
                if self._argument(node, 2, "keepdim", False):
                    return value
                channels = self.program.tensors[value.name].shape[2]
                return self._move(Reshape(inputs=(value.name,), outputs=(f"{name}.flat",), shape=(channels,)), value)
            if rank == 3 and dims == {1}:
                return self._time_mean(node)
        if kind in _UNSQUEEZE and rank == 3 and self._argument(node, 1, "dim") == 1:
            x = self._source(node)
            shape = (*self.program.tensors[x.name].shape, 1)
            return self._move(Reshape(inputs=(x.name,), outputs=(name,), shape=shape), x)
        if kind in _TRANSPOSE:
            x = self._source(node)
            first, second = (self._axis(node, rank, int(self._argument(node, p, f"dim{p - 1}"))) for p in (1, 2))
            axes = list(range(rank - 1))
            axes[first], axes[second] = axes[second], axes[first]
            return self._move(Transpose(inputs=(x.name,), outputs=(name,), axes=tuple(axes)), x)
        raise self._refused(node)

    def _time_mean(self, node: Node) -> Value:
        """Mean over time of [T, F]."""
        x, name = self._source(node), str(node)
        frames, width = self.program.tensors[x.name].shape
        image = self._move(Reshape(inputs=(x.name,), outputs=(f"{name}.image",), shape=(frames, 1, width)), x)
        target = self._target(self._tail(node), self.program.tensors[x.name].magnitude * x.step)
        value = conv.averaged(self.program, image, Window((frames, 1), (frames, 1)), target, f"{name}.mean")
        return self._move(Reshape(inputs=(value.name,), outputs=(name,), shape=(width,)), value)

    def _item(self, node: Node) -> Value:
        """The sequence of a recurrent layer (item 0), or the last frame of a sequence ([:, -1])."""
        source, item = node.args[:2]
        assert isinstance(source, Node)
        if source.op == "call_module" and isinstance(self._kind(source), (nn.LSTM, nn.GRU)):
            if item == 0:
                return self._source(node)
            if not node.users:
                return self._source(node)  # unpacked and not used
            raise self._refused(node, "of a recurrent layer only the sequence of hidden states is available")
        if item in ((slice(None), -1), (slice(None), -1, slice(None))):
            x, name = self._source(node), str(node)
            frames, width = self.program.tensors[x.name].shape
            last = Slice(inputs=(x.name,), outputs=(f"{name}.frame",), start=frames - 1, stop=frames)
            x = self._move(last, x)
            return self._move(Reshape(inputs=(x.name,), outputs=(name,), shape=(width,)), x)
        raise self._refused(node, "only [:, -1] is available")

    def _concat(self, node: Node) -> Value:
        nodes, target = node.args[0], self._concat_target(node)
        assert isinstance(nodes, (list, tuple))
        sources = [source for source in nodes if isinstance(source, Node)]
        axis = self._axis(node, len(self.peaks.shape[node]), int(self._argument(node, 1, "dim", 0)))
        values = [
            requantised(self.program, self.values[source], target.step, target.limits, f"{node}.{place}")
            for place, source in enumerate(sources)
        ]
        names = tuple(value.name for value in values)
        made = Value(self.program.add(Concat(inputs=names, outputs=(str(node),), axis=axis)), target.step)
        if axis == len(self.program.tensors[made.name].shape) - 1:
            widths = np.cumsum([0, *(self.program.tensors[name].shape[-1] for name in names)])
            self.fixed[made.name] = {
                int(first) + at: code
                for first, name in zip(widths[:-1], names, strict=True)
                for at, code in self.fixed.get(name, {}).items()
            }
        return made

    def _concat_target(self, node: Node) -> Target:
        """One step for all parts: their own where they share it, as copies of one value do."""
        tail = self._tail(node)
        nodes = node.args[0]
        assert isinstance(nodes, (list, tuple))
        steps = {self.values[source].step for source in nodes if isinstance(source, Node)}
        if tail.quantiser is None and not self.peaks.measured and len(steps) == 1:
            return Target(steps.pop(), *twos_complement(ACTIVATION_BITS))
        return self._target(tail)

"""The network as ONNX with QuantizeLinear and DequantizeLinear (QDQ): int8 weights, and int8 codes where it quantises.

A quantiser of b bits and range a becomes a clip to +-(a - a / 2^(b-1)) and a pair of nodes with scale a / 2^(b-1), one
scale per block, also inside the loop over time. What has more than 8 bits stays float32: int8 is what operator set 17
and most runtimes have.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from kestrel.export.form import Part, Work
from kestrel.export.onnx import OPSET, compare, write_onnx
from kestrel.models.inventory import decoded_weights, weight_codes
from kestrel.quant.packing import WeightCodes

QDQ = "model_qdq.onnx"
_HALF_INT8 = 128  # 2^(b-1) of the widest quantiser that int8 holds
_FOLDED = {"Identity", "Cast", "Clip", "Unsqueeze", "Div", "Mul", "Round", "Max", "Min", "Neg", "Transpose", "Reshape"}

Arrays = dict[str, np.ndarray]


@dataclass
class Rewritten:
    """What became of quantisers and weights."""

    quantisers: int = 0  # written as QDQ
    float_roundings: int = 0  # left in float32: more than 8 bits, ranges along several axes, or no quantiser at all
    weights: int = 0  # weight groups written as int8
    float_weights: int = 0  # that int8 does not hold


def rewrite(model: ModelProto, codes: Mapping[str, WeightCodes]) -> Rewritten:
    """Turn the float operations of quantisers into QDQ nodes, and weights that `codes` decode to into int8 arrays.

    The weights of `model` must be the decoded ones. Works in place, in the graph and in the bodies of its loops.
    """
    done = Rewritten()
    constants = _fold(model.graph, {})
    _quantisers(model.graph, constants, done)
    _prune(model.graph)
    _weights(model.graph, codes, done)
    _constant_nodes(model.graph)
    return done


def _bodies(graph: GraphProto) -> Iterable[GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield attribute.g


def _replace_nodes(graph: GraphProto, nodes: list[NodeProto]) -> None:
    del graph.node[:]
    graph.node.extend(nodes)


def _fold(graph: GraphProto, outer: Arrays) -> Arrays:
    """Compute what depends on constants alone; Constant nodes become initialisers. Returns the graph's constants."""
    known = {**outer, **{entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}}
    kept = []
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            value = numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type in _FOLDED and all(name in known or not name for name in node.input):
            value = _evaluate(node, known)
        else:
            kept.append(node)
            continue
        known[node.output[0]] = value
        graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
    _replace_nodes(graph, kept)
    for body in _bodies(graph):
        _fold(body, known)
    return known


def _evaluate(node: NodeProto, known: Arrays) -> np.ndarray:
    inputs = [name for name in node.input if name]
    values = [
        helper.make_tensor_value_info(x, helper.np_dtype_to_tensor_dtype(known[x].dtype), known[x].shape)
        for x in inputs
    ]
    graph = helper.make_graph(
        [node], "one", list({v.name: v for v in values}.values()), [onnx.ValueInfoProto(name=node.output[0])]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    results: Any = ReferenceEvaluator(model).run(None, {name: known[name] for name in inputs})
    return np.asarray(results[0])


@dataclass(frozen=True)
class _Quantiser:
    """x -> the nodes (by place) that clip, divide, round and multiply -> y."""

    x: str
    y: str
    places: tuple[int, ...]
    limit: np.ndarray
    half: int

    @property
    def axes(self) -> list[int]:
        """Axes along which ranges differ."""
        return [axis for axis, size in enumerate(self.limit.shape) if size > 1]


def _quantisers(graph: GraphProto, outer: Arrays, done: Rewritten) -> None:
    """Replace the chains of kestrel.quant.quantiser.round_to_level in `graph` and its bodies."""
    known = {**outer, **{entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}}
    makers = {name: place for place, node in enumerate(graph.node) for name in node.output}
    users: dict[str, list[int]] = {}
    for place, node in enumerate(graph.node):
        for name in node.input:
            users.setdefault(name, []).append(place)
    gone: set[int] = set()
    at: dict[int, list[NodeProto]] = {}
    for place, node in enumerate(graph.node):
        found = _chain(graph, place, known, makers, users) if node.op_type == "Round" else None
        if found is None or found.half > _HALF_INT8 or len(found.axes) > 1:
            done.float_roundings += node.op_type == "Round"
            continue
        gone |= set(found.places)
        at[found.places[-1]] = _qdq_nodes(graph, found)
        done.quantisers += 1
    nodes: list[NodeProto] = []
    for place, node in enumerate(graph.node):
        nodes += at.get(place, [] if place in gone else [node])
    _replace_nodes(graph, nodes)
    for body in _bodies(graph):
        _quantisers(body, known, done)


def _chain(
    graph: GraphProto, place: int, known: Arrays, makers: dict[str, int], users: dict[str, list[int]]
) -> _Quantiser | None:
    """The quantiser around the Round at `place`: Div step, Clip, Round, Mul step; None where it is something else."""

    def before(name: str, kind: str) -> tuple[int, str, list[np.ndarray]] | None:
        """Place, variable input and constant inputs of the node that makes `name`, if it is of `kind`."""
        found = makers.get(name)
        if found is None or graph.node[found].op_type != kind or len(users.get(name, [])) != 1:
            return None
        inputs = graph.node[found].input
        variable = [x for x in inputs if x and x not in known]
        return (found, variable[0], [known[x] for x in inputs if x in known]) if len(variable) == 1 else None

    def after(name: str) -> tuple[int, np.ndarray] | None:
        """Place and factor of the only user of `name`, if it multiplies by a constant."""
        found = users.get(name, [])
        if len(found) != 1 or graph.node[found[0]].op_type != "Mul":
            return None
        factor = [known[x] for x in graph.node[found[0]].input if x in known]
        return (found[0], factor[0]) if len(factor) == 1 else None

    clipped = before(graph.node[place].input[0], "Clip")
    divided = before(clipped[1], "Div") if clipped else None
    back = after(graph.node[place].output[0])
    if not (clipped and divided and back) or len(clipped[2]) != 2:
        return None
    step, high = divided[2][0], float(clipped[2][1].reshape(-1)[0])
    half = high + 1
    consistent = (
        half >= 2
        and math.log2(half).is_integer()
        and float(clipped[2][0].reshape(-1)[0]) == -high
        and np.array_equal(step, back[1])
    )
    if not consistent:
        return None
    limit = step.astype(np.float32) * np.float32(half)  # exact: a power of two
    places: tuple[int, ...] = (divided[0], clipped[0], place, back[0])
    x = divided[1]
    # The clip to +-a before it is part of the one that follows.
    upper = before(x, "Min")
    lower = before(upper[1], "Max") if upper else None
    if upper and lower and np.array_equal(upper[2][0], limit) and np.array_equal(lower[2][0], -limit):
        places, x = (lower[0], upper[0], *places), lower[1]
    return _Quantiser(x, graph.node[back[0]].output[0], places, limit, int(half))


def _qdq_nodes(graph: GraphProto, found: _Quantiser) -> list[NodeProto]:
    """Clip, QuantizeLinear, DequantizeLinear, with their constants as initialisers of `graph`."""
    name, limit = f"{found.y}/quantiser", found.limit
    scale = (limit / found.half).reshape(-1 if found.axes else ())
    bound = limit * np.float32(1 - 1 / found.half)

    def constant(part: str, value: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(value, f"{name}.{part}"))
        return f"{name}.{part}"

    axis: dict[str, Any] = {"axis": found.axes[0] - limit.ndim} if found.axes else {}
    points = [constant("scale", scale), constant("zero", np.zeros(scale.shape, np.int8))]
    return [
        helper.make_node("Max", [found.x, constant("low", -bound)], [f"{name}.above"]),
        helper.make_node("Min", [f"{name}.above", constant("high", bound)], [f"{name}.clipped"]),
        helper.make_node("QuantizeLinear", [f"{name}.clipped", *points], [f"{name}.codes"], **axis),
        helper.make_node("DequantizeLinear", [f"{name}.codes", *points], [found.y], **axis),
    ]


def _weights(graph: GraphProto, codes: Mapping[str, WeightCodes], done: Rewritten) -> None:
    """Replace the arrays that weight codes decode to by int8 codes and a DequantizeLinear at the start of the graph."""
    first: list[NodeProto] = []
    for name, group in codes.items():
        places = list(_equal_arrays(graph, group.decode()))
        if not places:
            continue
        low, high = int(group.codes.min(initial=0)), int(group.codes.max(initial=0))
        if group.bits > 8 or low < -_HALF_INT8 or high >= _HALF_INT8:  # odd codes of 8 bits reach 255
            done.float_weights += 1
            continue
        done.weights += 1
        shape = numpy_helper.to_array(places[0][1]).shape
        scalar = group.scale.size == 1
        parts = {
            "codes": group.codes.reshape(shape).astype(np.int8),
            "scale": group.scale.reshape(() if scalar else -1),
            "zero": np.zeros(() if scalar else group.scale.size, np.int8),
        }
        inputs = []
        for part, value in parts.items():
            inputs.append(f"{name}.{part}")
            graph.initializer.append(
                numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), inputs[-1])
            )
        result = f"{name}.dequantised"
        axis: dict[str, Any] = {} if scalar else {"axis": 0}
        first.append(helper.make_node("DequantizeLinear", inputs, [result], **axis))
        for holder, entry in places:
            old = entry.name
            holder.initializer.remove(entry)
            _rename(holder, old, result)
    _replace_nodes(graph, [*first, *graph.node])


def _equal_arrays(graph: GraphProto, values: np.ndarray) -> Iterable[tuple[GraphProto, onnx.TensorProto]]:
    """Initialisers of the graph and its bodies that hold `values`, dimensions of 1 aside; of one shape."""
    shape: tuple[int, ...] | None = None
    for holder in (graph, *_bodies(graph)):
        for entry in list(holder.initializer):
            if entry.data_type != onnx.TensorProto.FLOAT or math.prod(entry.dims) != values.size or values.size < 2:
                continue
            found = numpy_helper.to_array(entry)
            squeezed = [size for size in found.shape if size > 1] == [size for size in values.shape if size > 1]
            if (
                squeezed
                and found.shape[:1] == values.shape[:1]
                and np.array_equal(found.reshape(-1), values.reshape(-1))
            ):
                shape = shape or found.shape
                if found.shape == shape:
                    yield holder, entry


def _rename(graph: GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new
    for body in _bodies(graph):
        _rename(body, old, new)


def _prune(graph: GraphProto) -> None:
    """Remove constants that nothing reads any more."""
    for body in _bodies(graph):
        _prune(body)
    used = _read(graph)
    kept = [entry for entry in graph.initializer if entry.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _constant_nodes(graph: GraphProto) -> None:
    """Make constants of loop bodies nodes, as other tools expect them."""
    for body in _bodies(graph):
        _constant_nodes(body)
        nodes = [helper.make_node("Constant", [], [entry.name], value=entry) for entry in body.initializer]
        del body.initializer[:]
        _replace_nodes(body, [*nodes, *body.node])


def _read(graph: GraphProto) -> set[str]:
    names = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for body in _bodies(graph):
        names |= _read(body)
    return names


def write_qdq(work: Work, path: Path, notes: Mapping[str, Any]) -> Rewritten:
    """Write the QDQ model of the spotter with its weights at their codes; the bytes depend on both alone."""
    net = work.spotter.net
    codes = weight_codes(net, work.settings.weight_bits)
    with decoded_weights(net, codes):
        write_onnx(work.spotter, (work.data.shape[1], work.data.shape[2]), path, {})
    model = onnx.load(str(path))
    done = rewrite(model, codes)
    for key, value in notes.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, json.dumps(value, ensure_ascii=False)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return done


def qdq_form(work: Work, folder: Path) -> Part:
    """model_qdq.onnx, with onnxruntime's answers on every clip compared with PyTorch's."""
    if not work.settings.onnx:
        return Part("QDQ ONNX", "Left out, since `export.onnx` is false.")
    notes = {"classes": work.data.classes, "protocol": dict(work.protocol)}
    done = write_qdq(work, folder / QDQ, notes)
    agreement = compare(folder / QDQ, work.decoded, work.data, work.batch_size, work.next_pass())
    stays = ["feature post-processing, sums and activation functions are float32 operations between the pairs of nodes"]
    if done.float_roundings:
        stays.append(
            f"{done.float_roundings} roundings are float32 operations (quantisers of more than 8 bits, or of another form)"
        )
    if done.float_weights:
        stays.append(f"{done.float_weights} groups of weights that int8 does not hold are float32")
    if not done.quantisers:
        stays.append("this network quantises no activation, so none has a pair of nodes")
    text = (
        f"{QDQ} (operator set {OPSET}) is the same network with QuantizeLinear and DequantizeLinear: {done.weights} groups "
        f"of weights and biases are int8 arrays, {done.quantisers} quantisers of activations are pairs of nodes with scale "
        "a / 2^(b-1) behind a clip, also inside the loop over time. What stays float: "
        f"{'; '.join(stays)}. Input and output as in model.onnx. onnxruntime against PyTorch with the same weight codes on "
        f"{agreement.n:,} clips: largest difference of a logit {agreement.largest_difference:.3g}; "
        f"{agreement.other_answers:,} answers differ ({100 * (1 - agreement.other_answers / agreement.n):.2f} % agree)."
    )
    figures = {"onnx_qdq": {**vars(agreement), **vars(done)}}
    return Part("QDQ ONNX", text, {QDQ: "the network, int8 weights and QDQ nodes"}, figures=figures)

"""An integer graph as plain JSON and arrays, and back. The same graph gives the same bytes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from kestrel.errors import KestrelError
from kestrel.lower.graph import IntegerGraph, Program, State
from kestrel.lower.ops import OPS, Op, Window
from kestrel.lower.tensor import Constant, Tensor
from kestrel.quant.integer import Rescale
from kestrel.store.atomic import atomic_path, read_json, write_json
from kestrel.store.npz import write_npz

FORMAT = "kestrel-integer-1"
_PARTS: dict[str, Any] = {kind.__name__: kind for kind in (Rescale, Window, State, Tensor)}


def to_plain(graph: IntegerGraph) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The graph as JSON types, and its constants as arrays (the smallest signed type that holds their storage).

    An op is {"type", fields}; a constant {"array": name of the array, "storage"}. `tensors` lists what every op makes.
    """
    writer = _Writer()
    plain = {
        "format": FORMAT,
        **writer.program(graph),
        "outputs": list(graph.outputs),
        "notes": graph.notes,
    }
    return plain, writer.arrays


class _Writer:
    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self._names: dict[int, str] = {}  # of constants, by identity: shared ones are written once

    def program(self, program: Program) -> dict[str, Any]:
        tensors = {name: {**_fields(tensor), "bits": tensor.bits} for name, tensor in program.tensors.items()}
        return {"inputs": list(program.inputs), "tensors": tensors, "ops": [self._op(op) for op in program.ops]}

    def _op(self, op: Op) -> dict[str, Any]:
        fields = {name: self._value(value, f"{op.outputs[0]}.{name}") for name, value in vars_of(op).items()}
        return {"type": type(op).__name__, **fields}

    def _value(self, value: Any, where: str) -> Any:
        if isinstance(value, Constant):
            return {"array": self._array(value, where), "storage": value.storage}
        if isinstance(value, Program):
            return self.program(value)
        if type(value).__name__ in _PARTS:
            fields = {name: self._value(part, f"{where}.{name}") for name, part in vars_of(value).items()}
            return {"type": type(value).__name__, **fields}
        if isinstance(value, tuple):
            return [self._value(part, f"{where}.{place}") for place, part in enumerate(value)]
        return value

    def _array(self, constant: Constant, where: str) -> str:
        if id(constant) not in self._names:
            self._names[id(constant)] = where
            low, high = Constant.range_of(constant.storage)
            kind = next(k for k in (np.int8, np.int16, np.int32) if np.iinfo(k).min <= low and high <= np.iinfo(k).max)
            self.arrays[where] = constant.values.astype(kind)
        return self._names[id(constant)]


def vars_of(part: Any) -> dict[str, Any]:
    """The fields of a dataclass, not copied."""
    return {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}


def _fields(tensor: Tensor) -> dict[str, Any]:
    return {**vars_of(tensor), "shape": list(tensor.shape)}


def from_plain(plain: dict[str, Any], arrays: dict[str, np.ndarray]) -> IntegerGraph:
    """The graph that `to_plain` was given; every op is checked again.

    Raises KestrelError where the parts do not belong together.
    """
    if plain.get("format") != FORMAT:
        raise KestrelError(f"an integer model of format {plain.get('format')!r}; this version reads {FORMAT!r}")
    try:
        reader = _Reader(arrays)
        graph = IntegerGraph(notes=dict(plain["notes"]))
        reader.fill(graph, plain)
        for name in plain["outputs"]:
            graph.output(name)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KestrelError(
            f"the integer model is damaged ({type(error).__name__}: {error}): export it again"
        ) from error
    return graph


class _Reader:
    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self._arrays = arrays
        self._constants: dict[tuple[str, str], Constant] = {}

    def fill(self, program: Program, plain: dict[str, Any]) -> None:
        """Add inputs and ops to an empty program."""
        for name in plain["inputs"]:
            fields = {key: value for key, value in plain["tensors"][name].items() if key != "bits"}
            program.input(name, Tensor(**{**fields, "shape": tuple(fields["shape"])}))
        for fields in plain["ops"]:
            kind = OPS[fields["type"]]
            values = {key: self._value(value) for key, value in fields.items() if key != "type"}
            program.add(kind(**values))
        for name, tensor in program.tensors.items():
            if {**_fields(tensor), "bits": tensor.bits} != plain["tensors"][name]:
                raise KestrelError(f"the integer model is damaged (tensor {name!r}): export it again")

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(self._value(part) for part in value)
        if not isinstance(value, dict):
            return value
        if "array" in value:
            key = (value["array"], value["storage"])
            if key not in self._constants:
                self._constants[key] = Constant(self._arrays[key[0]], key[1])
            return self._constants[key]
        if "ops" in value:
            program = Program()
            self.fill(program, value)
            return program
        return _PARTS[value["type"]](**{key: self._value(part) for key, part in value.items() if key != "type"})


def save(graph: IntegerGraph, folder: Path, name: str = "integer") -> tuple[Path, Path]:
    """Write `<name>.json` and `<name>.npz` into `folder`; returns both paths."""
    plain, arrays = to_plain(graph)
    paths = folder / f"{name}.json", folder / f"{name}.npz"
    write_json(paths[0], plain)
    with atomic_path(paths[1]) as temporary:
        write_npz(temporary, arrays)
    return paths


def load(folder: Path, name: str = "integer") -> IntegerGraph:
    """Read what `save` wrote."""
    with np.load(folder / f"{name}.npz", allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    return from_plain(read_json(folder / f"{name}.json"), arrays)

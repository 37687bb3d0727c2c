"""C source of recurrence over time steps: one function for a step, and what sets the states before the first."""

from __future__ import annotations

from collections.abc import Mapping

from kestrel.export.c_ops import statements
from kestrel.export.c_text import block, comment
from kestrel.export.c_writer import Writer
from kestrel.lower.graph import Scan, State
from kestrel.lower.memory import moved_state, replaced_states, saved_name
from kestrel.lower.tensor import Tensor


def scan_parts(
    w: Writer, scan: Scan, name: str, tensors: Mapping[str, Tensor]
) -> tuple[list[str], list[str], list[str]]:
    """Statements that set the states, that run all steps, and that trace the outputs; adds the step function.

    `tensors` are those of the program around the scan.
    """
    begin: list[str] = []
    for state in scan.states:
        begin += _initial(w, state)
    stacked = list(zip(scan.outputs, scan.emitted, strict=False))
    parameters = [f"const void *{w.identifier(step, 'in')}" for step in scan.steps]
    body = [line for op in scan.body.ops for line in statements(w, op, scan.body)]
    for out, inner in stacked:
        body += _emit_row(w, out, inner, scan.body.tensors[inner].size)
    body += _replace(w, scan)
    unused = [] if stacked else ["(void)t;"]
    unused += [f"(void){w.identifier(step, 'in')};" for step in scan.steps]
    signature = f"static void {name}_step(int32_t t, {', '.join(parameters)})"
    headline = f"/* One time step: {', '.join(scan.outputs)}. */\n"
    w.functions.append(f"{headline}{signature} {{\n{block([*unused, *body])}}}\n")
    length = tensors[scan.inputs[0]].shape[0]
    arguments = []
    for source in scan.inputs:
        tensor = tensors[source]
        row = tensor.size // tensor.shape[0] * w.place(source).bits // 8
        arguments.append(f"PART({w.pointer(source)}, t * {row})")
    call = [f"for (int32_t t = 0; t < {length}; t++) {{", f"    {name}_step(t, {', '.join(arguments)});", "}"]
    traces = [w.trace(out, tensors[out].size) for out in scan.outputs]
    return begin, call, traces


def _initial(w: Writer, state: State) -> list[str]:
    place = w.place(state.name)
    if state.initial is None:
        return [f"memset({w.pointer(state.name)}, 0, {state.tensor.bytes}); /* {comment(state.name)} */"]
    array = w.array(state.initial.values.astype(f"int{place.bits}"), f"{state.name}, initial", "initial states")
    return [f"memcpy({w.pointer(state.name)}, {array}, {state.tensor.bytes}); /* {comment(state.name)} */"]


def _emit_row(w: Writer, out: str, inner: str, size: int) -> list[str]:
    x_bits, y_bits = w.bits(inner, out)
    target = f"AT({w.place(out).offset} + t * {size * y_bits // 8})"
    descriptor = w.constant(f"{out}, row", "kestrel_copy_op", w.copy(1, size, size, size, x_bits, y_bits))
    return [f"kestrel_copy(&{descriptor}, {target}, {w.pointer(inner)}); /* {comment(out)} */"]


def _replace(w: Writer, scan: Scan) -> list[str]:
    """All states take their next values, together."""
    done = replaced_states(scan)
    saved, lines = [], []
    for state in scan.states:
        if state.next == state.name or done.get(state.next) == state.name:
            continue
        x_bits, y_bits = w.bits(state.next, state.name)
        size = state.tensor.size
        fields = w.copy(1, size, size, size, x_bits, y_bits)
        descriptor = w.constant(f"{state.name}, next", "kestrel_copy_op", fields)
        source = w.pointer(state.next)
        if moved_state(scan, state):
            waiting = f"AT({w.place(saved_name(state)).offset})"
            saved.append(f"kestrel_copy(&{descriptor}, {waiting}, {source});")
            lines.append(f"memcpy({w.pointer(state.name)}, {waiting}, {state.tensor.bytes});")
        else:
            lines.append(f"kestrel_copy(&{descriptor}, {w.pointer(state.name)}, {source});")
    return [*saved, *lines]

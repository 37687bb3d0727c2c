"""C source of any op: the emitter of its type, and what is the same for all."""

from __future__ import annotations

from collections.abc import Callable

from kestrel.export import c_elementwise, c_moves, c_products
from kestrel.export.c_text import comment
from kestrel.export.c_writer import Writer
from kestrel.lower.graph import Program
from kestrel.lower.memory import is_view
from kestrel.lower.ops import Op

EMITTERS: dict[type[Op], Callable[..., list[str]]] = {
    **c_elementwise.EMITTERS,
    **c_products.EMITTERS,
    **c_moves.EMITTERS,
}


def statements(w: Writer, op: Op, program: Program) -> list[str]:
    """Statements that run `op`; its constants are added."""
    lines = [f"/* {comment(_headline(w, op, program))} */"]
    if type(op) not in EMITTERS and not is_view(op, program.tensors):
        raise op.problem("it has no C form")
    if not is_view(op, program.tensors):
        lines += EMITTERS[type(op)](w, op, program.tensors)
    lines += [w.trace(name, program.tensors[name].size) for name in op.outputs]
    return lines


def _headline(w: Writer, op: Op, program: Program) -> str:
    made = ", ".join(
        f"{name} int{w.place(name).bits} [{' x '.join(map(str, program.tensors[name].shape))}]" for name in op.outputs
    )
    return f"{made} = {type(op).__name__}({', '.join(op.inputs)})"

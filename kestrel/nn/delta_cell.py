"""Delta LSTM and GRU layers, one time step after the other: the reference for the fast path, and what a trace records.

A layer keeps, for its inputs and its hidden states, references: the values last transmitted (Neil et al. 2017). With
r the reference of v and a threshold Theta,

    d = v - r,   transmitted where |d| >= Theta;   there r' = v, elsewhere d = 0 and r' = r,

and the products live in memories M += W d that begin as the biases. Since the deltas of an element add up to its
reference, M = W r + b at any time: thresholds of 0 give the ordinary cell, and the references alone are the state.

    LSTM (order i, f, g, o):  M += W_ih dx + W_hh dh;  c' = Qa(f c + i g);  h' = Qa(o Qn(tanh c'))
    GRU (order r, z, n):      M_r, M_z likewise;  n = Qn(tanh(Qa(M_nx + r Qa(M_nh))));  h' = Qa(Qa((1 - z) n) + Qa(z h))

with gates Qn(sigmoid(Qa(M))). Qa and Qn are the formats of activations and gates (Gao et al., DeltaRNN and Spartus).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kestrel.nn.delta_fixed import Numerics, apply

Kind = Literal["LSTM", "GRU"]
GATES: dict[Kind, int] = {"LSTM": 4, "GRU": 3}


class Weights(NamedTuple):
    """Weights of a layer as they take part in products: [G H, I], [G H, H], [G H], [G H]."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor
    b_hh: Tensor


@dataclass
class LayerState:
    """What a layer remembers between two frames: references of x [B, I] and h [B, H], h [B, H], c [B, H] (LSTM)."""

    x_ref: Tensor
    h_ref: Tensor
    h: Tensor
    c: Tensor | None

    @classmethod
    def zeros(cls, kind: Kind, batch: int, weights: Weights, like: Tensor) -> LayerState:
        """The state before the first frame."""
        inputs, hidden = weights.w_ih.shape[1], weights.w_hh.shape[1]
        h = like.new_zeros(batch, hidden)
        return cls(like.new_zeros(batch, inputs), h, h, h if kind == "LSTM" else None)

    def detached(self) -> LayerState:
        """The same numbers outside the graph."""
        c = None if self.c is None else self.c.detach()
        return LayerState(self.x_ref.detach(), self.h_ref.detach(), self.h.detach(), c)


@dataclass(frozen=True)
class Thresholds:
    """Smallest transmitted change of the inputs and of the hidden states of a layer."""

    x: float = 0.0
    h: float = 0.0


class Sequence(NamedTuple):
    """What a layer makes of a sequence, time first: h, references of x and h, and c (LSTM), each [T, B, features].

    Element t of the references is what takes part in frame t; h and c are the states after it.
    """

    h: Tensor
    x_refs: Tensor
    h_refs: Tensor
    c: Tensor | None


def kept_back(delta: Tensor, threshold: float) -> Tensor:
    """Where a change is not transmitted. NaN is transmitted, so that it is seen in the result."""
    return delta.abs() < threshold


def transmit(value: Tensor, reference: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """(delta, new reference) of a value."""
    delta = value - reference
    still = kept_back(delta, threshold)
    return torch.where(still, torch.zeros_like(delta), delta), torch.where(still, reference, value)


def plain_layer(
    kind: Kind, x: Tensor, weights: Weights, state: LayerState, thresholds: Thresholds, numerics: Numerics
) -> Sequence:
    """The equations above for x [T, B, I], in the format of activations already. Nothing flows back into `state`."""
    hidden = weights.w_hh.shape[1]
    w_ih_t, w_hh_t = weights.w_ih.t(), weights.w_hh.t()
    start = state.detached()
    x_ref, h_ref, h, c = start.x_ref, start.h_ref, start.h, start.c
    memory_x = x_ref @ w_ih_t + weights.b_ih  # [B, G H]
    memory_h = h_ref @ w_hh_t + weights.b_hh
    theta_x, theta_h = numerics.threshold(thresholds.x), numerics.threshold(thresholds.h)
    q_a, q_n = numerics.activation, numerics.gate

    def sigmoid(value: Tensor) -> Tensor:
        return apply(q_n, numerics.sigmoid(apply(q_a, value)))

    def tanh(value: Tensor) -> Tensor:
        return apply(q_n, numerics.tanh(apply(q_a, value)))

    hs, cs, x_refs, h_refs = [], [], [], []
    for step in range(x.shape[0]):
        delta_x, x_ref = transmit(x[step], x_ref, theta_x)
        delta_h, h_ref = transmit(h, h_ref, theta_h)
        memory_x = memory_x + delta_x @ w_ih_t
        memory_h = memory_h + delta_h @ w_hh_t
        if kind == "LSTM":
            assert c is not None
            i, f, g, o = (memory_x + memory_h).split(hidden, dim=-1)
            c = apply(q_a, sigmoid(f) * c + sigmoid(i) * tanh(g))
            h = apply(q_a, sigmoid(o) * apply(q_n, numerics.tanh(c)))
            cs.append(c)
        else:
            x_rz, x_n = memory_x.split((2 * hidden, hidden), dim=-1)
            h_rz, h_n = memory_h.split((2 * hidden, hidden), dim=-1)
            r, z = sigmoid(x_rz + h_rz).split(hidden, dim=-1)
            n = tanh(x_n + r * apply(q_a, h_n))
            h = apply(q_a, apply(q_a, (1 - z) * n) + apply(q_a, z * h))
        hs.append(h)
        x_refs.append(x_ref)
        h_refs.append(h_ref)
    return Sequence(torch.stack(hs), torch.stack(x_refs), torch.stack(h_refs), torch.stack(cs) if cs else None)

"""DeltaLSTM and DeltaGRU: torch.nn.LSTM and GRU that compute with changes (Neil et al. 2017; Gao et al. 2018-2022).

Parameters have the names and shapes of torch.nn.LSTM and GRU, so weights go either way. With thresholds of 0 and in
floating point they are these layers, and PyTorch's own code runs where nothing else is asked for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kestrel.errors import UsageError
from kestrel.nn.delta_cell import GATES, Kind, LayerState, Sequence, Thresholds, Weights, plain_layer
from kestrel.nn.delta_fast import fast_layer
from kestrel.nn.delta_fixed import Numerics, apply
from kestrel.nn.delta_trace import DeltaStatistics
from kestrel.quant.quantiser import plain_ops

Route = Literal["auto", "torch", "plain", "fast"]
State = list[LayerState]
_PIECE = 128  # clips that are computed together where no gradient is wanted


@dataclass
class _Moves:
    """References of h [T, B, H] of one layer, those before the first frame, and which frames count [T, B]."""

    refs: Tensor
    start: Tensor
    valid: Tensor | None

    def mean_change(self) -> Tensor:
        """Mean |d| of what was transmitted, over frames that count."""
        change = (self.refs - torch.cat([self.start.detach()[None], self.refs[:-1]])).abs()
        if self.valid is None:
            return change.mean()
        return (change * self.valid[..., None]).sum() / (self.valid.sum() * change.shape[2])


@dataclass
class DeltaOutput:
    """h of the last layer [B, T, H], and the state after the last frame of each clip (None where the layers ran dense)."""

    h: Tensor
    state: State | None = None
    moves: list[tuple[float, _Moves]] = field(default_factory=list)  # with their shares in the mean

    @property
    def change(self) -> Tensor:
        """The mean |dh| over all frames, units and layers, with its gradient. Raises ValueError after a dense run."""
        if not self.moves:
            raise ValueError("PyTorch's dense layer transmits no changes: run with path plain or fast")
        return torch.stack([share * moves.mean_change() for share, moves in self.moves]).sum()


def _per_layer(name: str, values: float | list[float] | tuple[float, ...], layers: int) -> tuple[float, ...]:
    given = [values] if isinstance(values, (int, float)) else list(values)
    if len(given) not in (1, layers):
        raise UsageError(f"{name}: {len(given)} thresholds for {layers} layers; give one, or one per layer")
    if not all(math.isfinite(value) and value >= 0 for value in given):
        raise UsageError(f"{name}: thresholds must be finite and not negative, not {given}")
    return tuple(float(value) for value in (given * layers if len(given) == 1 else given))


class _DeltaRNN(nn.Module):
    """What both cells share; it stands before nn.LSTM or nn.GRU among the bases.

    Args:
        thx, thh: thresholds of inputs and hidden states, one number or one per layer; `set_thresholds` changes them.
        numerics: formats and non-linearities.
        dropout: between layers, in training.
    """

    kind: Kind
    input_size: int
    hidden_size: int
    num_layers: int
    dropout: float

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        thx: float | list[float] = 0.0,
        thh: float | list[float] = 0.0,
        numerics: Numerics | None = None,
        dropout: float = 0.0,
    ) -> None:
        between = dropout if num_layers > 1 else 0.0  # torch warns of dropout with a single layer
        super().__init__(input_size, hidden_size, num_layers, batch_first=True, dropout=between)
        self.numerics = numerics if numerics is not None else Numerics()
        self.masks: Mapping[str, Tensor] = {}  # parameter name -> what multiplies it (pruned weights)
        self.statistics: DeltaStatistics | None = None
        self.name = "rnn"  # of its layers in statistics
        self.set_thresholds(thx, thh)

    def set_thresholds(self, thx: float | list[float], thh: float | list[float]) -> None:
        """Change the thresholds; they are no part of the state dict. Raises UsageError."""
        pairs = zip(_per_layer("thx", thx, self.num_layers), _per_layer("thh", thh, self.num_layers), strict=True)
        self.thresholds = tuple(Thresholds(x, h) for x, h in pairs)

    @property
    def is_delta(self) -> bool:
        """Whether any threshold keeps something back."""
        return any(theta.x > 0 or theta.h > 0 for theta in self.thresholds)

    def layer_weights(self, layer: int) -> Weights:
        """The weights of a layer as they take part in products: pruned and in their format."""

        def effective(part: str) -> Tensor:
            name = f"{part}_l{layer}"
            value = getattr(self, name)
            if name in self.masks:
                value = value * self.masks[name]
            return apply(self.numerics.weight, value)

        return Weights(*(effective(part) for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")))

    def reset_for_keywords(self) -> None:
        """The original's start: Xavier-uniform input weights of the first layer, all others orthogonal, gate by gate;
        biases 0."""
        for name, parameter in self.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
                continue
            start = nn.init.xavier_uniform_ if name == "weight_ih_l0" else nn.init.orthogonal_
            for gate in parameter.data.split(self.hidden_size):
                start(gate)

    def forward(
        self, x: Tensor, state: State | None = None, lengths: Tensor | None = None, path: Route = "auto"
    ) -> DeltaOutput:
        """x [B, T, I] -> DeltaOutput.

        Args:
            state: from an earlier call, to continue there; no gradient flows back into it.
            lengths: valid frames [B] of clips that are padded at their ends; h of padded frames means nothing.
            path: `torch` is PyTorch's dense layer, `plain` the equations frame by frame, `fast` the same in one
                autograd function; `auto` takes the fastest that computes what is asked for.
        """
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != self.input_size:
            raise ValueError(f"x has shape {tuple(x.shape)}; wanted [B, T, {self.input_size}] with at least one frame")
        if path == "auto":
            dense = self.numerics.plain and not self.is_delta and not self.masks and self.statistics is None
            path = "torch" if dense and state is None and lengths is None else "plain" if plain_ops() else "fast"
        if path == "torch":
            return DeltaOutput(super().forward(x)[0])
        wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters()))
        if wants_gradient or plain_ops() or x.shape[0] <= _PIECE:
            return self._run(x, state, lengths, path)
        return self._in_pieces(x, state, lengths, path)

    def _in_pieces(self, x: Tensor, state: State | None, lengths: Tensor | None, path: Route) -> DeltaOutput:
        made = []
        for start in range(0, x.shape[0], _PIECE):
            cut = slice(start, start + _PIECE)
            part = None if state is None else [_cut(layer, cut) for layer in state]
            made.append(self._run(x[cut], part, None if lengths is None else lengths[cut], path))
        frames = [float(len(each.h)) for each in made]
        if lengths is not None:
            frames = [float(lengths[start : start + _PIECE].sum()) for start in range(0, x.shape[0], _PIECE)]
        shares = [count / sum(frames) for count in frames]
        moves = [(whole * share, part) for whole, each in zip(shares, made, strict=True) for share, part in each.moves]
        after = [_joined([each.state[layer] for each in made if each.state]) for layer in range(self.num_layers)]
        return DeltaOutput(torch.cat([each.h for each in made]), after, moves)

    def _run(self, x: Tensor, state: State | None, lengths: Tensor | None, path: Route) -> DeltaOutput:
        layer_of = plain_layer if path == "plain" else fast_layer
        now = apply(self.numerics.activation, x.transpose(0, 1))  # [B, T, I] -> [T, B, I]
        valid = None if lengths is None else torch.arange(x.shape[1], device=x.device)[:, None] < lengths  # [T, B]
        after, moves = [], []
        for layer in range(self.num_layers):
            weights = self.layer_weights(layer)
            before = state[layer] if state else LayerState.zeros(self.kind, x.shape[0], weights, now)
            made = layer_of(self.kind, now, weights, before, self.thresholds[layer], self.numerics)
            after.append(_last(made, lengths))
            moves.append((1 / self.num_layers, _Moves(made.h_refs, before.h_ref, valid)))
            if self.statistics is not None:
                self._count(self.statistics, layer, made, before, lengths)
            now = made.h
            if layer + 1 < self.num_layers and self.dropout:
                now = functional.dropout(now, self.dropout, self.training)
        return DeltaOutput(now.transpose(0, 1), after, moves)

    def _count(
        self, statistics: DeltaStatistics, layer: int, made: Sequence, before: LayerState, lengths: Tensor | None
    ) -> None:
        moved = tuple(
            torch.cat([start[None], refs[:-1]]).ne(refs)
            for start, refs in ((before.x_ref, made.x_refs.detach()), (before.h_ref, made.h_refs.detach()))
        )
        statistics.add(f"{self.name}.l{layer}", GATES[self.kind], (moved[0], moved[1]), lengths)


def _last(made: Sequence, lengths: Tensor | None) -> LayerState:
    """The state after the last (valid) frame of each clip."""

    def pick(values: Tensor) -> Tensor:
        if lengths is None:
            return values[-1]
        return values[lengths.clamp(min=1).to(values.device) - 1, torch.arange(values.shape[1], device=values.device)]

    c = None if made.c is None else pick(made.c).detach()
    return LayerState(pick(made.x_refs).detach(), pick(made.h_refs).detach(), pick(made.h).detach(), c)


def _cut(state: LayerState, rows: slice) -> LayerState:
    c = None if state.c is None else state.c[rows]
    return LayerState(state.x_ref[rows], state.h_ref[rows], state.h[rows], c)


def _joined(states: list[LayerState]) -> LayerState:
    c = None if states[0].c is None else torch.cat([state.c for state in states if state.c is not None])
    parts = [torch.cat([getattr(state, name) for state in states]) for name in ("x_ref", "h_ref", "h")]
    return LayerState(parts[0], parts[1], parts[2], c)


class DeltaLSTM(_DeltaRNN, nn.LSTM):  # type: ignore[misc]
    """torch.nn.LSTM (batch first) with delta updates; see `_DeltaRNN` for its settings."""

    kind: Kind = "LSTM"


class DeltaGRU(_DeltaRNN, nn.GRU):  # type: ignore[misc]
    """torch.nn.GRU (batch first) with delta updates; see `_DeltaRNN` for its settings."""

    kind: Kind = "GRU"


@contextlib.contextmanager
def collecting(module: nn.Module, traces: bool = False) -> Iterator[DeltaStatistics]:
    """Inside, the delta layers of `module` count what they transmit, clip after clip, into the statistics given."""
    found: list[tuple[Any, str]] = [
        (part, name or "rnn") for name, part in module.named_modules() if isinstance(part, _DeltaRNN)
    ]
    statistics = DeltaStatistics(traces)
    try:
        for part, name in found:
            part.statistics, part.name = statistics, name
        yield statistics
    finally:
        for part, _ in found:
            part.statistics = None

"""Keyword spotter of parallel quantised LSTM blocks on in-memory-computing crossbars (ISCAS 2021)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kestrel.errors import KestrelError, UsageError
from kestrel.models.network import Network, Phase, WeightGroup
from kestrel.nn.cell import RANGES, Bits
from kestrel.nn.chip import IDEAL, Chip, Deviations, Draw, draw_chip
from kestrel.nn.crossbar import Device
from kestrel.nn.quant_lstm import CrossbarLinear, QuantLSTM
from kestrel.quant.quantiser import MIN_RANGE, clip_quantise

BLOCKS, ORTHOGONALITY, MIX = 0, 1, 2


def class_order(classes: int, groups: int) -> list[tuple[int, int]]:
    """(group, output) of each class where every class belongs to exactly one of `groups` groups of blocks.

    Each group has ceil(classes / groups) outputs. The first groups use all of theirs, the others one fewer, group by
    group; where the others are left with a single class, they follow alternately from the front and the back (twelve
    classes on eight blocks: pairs of blocks 0-3, then 4, 7, 5, 6).
    """
    outputs = math.ceil(classes / groups)
    full = classes - groups * (outputs - 1)  # groups that use all their outputs
    order = [(group, output) for group in range(full) for output in range(outputs)]
    rest = list(range(full, groups))
    if outputs == 2:
        rest = [rest.pop(0 if turn % 2 == 0 else -1) for turn in range(len(rest))]
    return order + [(group, output) for group in rest for output in range(outputs - 1)]


def _check(name: str, value: float, low: float, high: float | None = None, *, whole: bool = False) -> None:
    kind_ok = isinstance(value, int) and not isinstance(value, bool) if whole else isinstance(value, (int, float))
    if not kind_ok or not value >= low or (high is not None and value > high):
        bounds = f">= {low:g}" if high is None else f"{low:g}..{high:g}"
        raise UsageError(f"model.{name}: {value} is out of bounds ({'whole number, ' if whole else ''}{bounds})")


class BlockLSTM(Network):
    """N parallel LSTM blocks with linear read-outs, every signal clipped and quantised.

    Args (the paper's names):
        input_size, classes: features of a frame; number of classes.
        hidden: units of a block.
        n_msb: number of blocks N.
        method: 0 = each class belongs to one block; 1 = every block scores all classes, scores are summed, and a cosine
            penalty keeps blocks different; 2 = groups k sum the scores of the blocks k + m n_msb / gain_blocks.
        gain_blocks: blocks of a group in method 2; must divide n_msb.
        quant_inp, quant_actMVM, quant_actNM, quant_w: bits of crossbar inputs (DAC), crossbar outputs (ADC), digital
            values and weights; None (or 0) = analog.
        weight_range: range of the weight quantiser, `real` (max_w; rows_bias max_w for biases) or `paper` (1).
        max_w: weights are held inside +-max_w. rows_bias: biases are held inside +-rows_bias max_w.
        drop_p: DropConnect probability of recurrent weights, in phase pretrain.
        noise_train, noise_eval: standard deviation of the weight noise as a fraction of max_w, in phases retrain and
            eval, drawn afresh for every product at every time step (every slice of bit-serial inputs).
        noise_program, adc_offset, adc_gain, adc_inl, adc_draw: deviations of a chip (kestrel.nn.chip.Deviations). Phase
            retrain meets a new chip in every forward pass; phase eval draws one chip when it begins and keeps it.
        input_coding: inputs of crossbars come at once (parallel) or as input_slices conversions of quant_inp bits
            (bit_serial).
        pact_a: clipping ranges learn. l2: strength of the penalty on them. cs: strength of the cosine penalty.
        input_range: initial clipping range of the input (a1).

    Raises UsageError for settings that do not fit together.
    """

    def __init__(
        self,
        *,
        input_size: int,
        classes: int,
        hidden: int = 108,
        n_msb: int = 4,
        method: int = 1,
        gain_blocks: int = 2,
        quant_inp: int | None = 4,
        quant_actMVM: int | None = 6,
        quant_actNM: int | None = 8,
        quant_w: int | None = None,
        weight_range: Literal["real", "paper"] = "real",
        max_w: float = 0.2,
        rows_bias: float = 6,
        drop_p: float = 0.125,
        noise_train: float = 0.1,
        noise_eval: float = 0.0,
        noise_program: float = 0.0,
        adc_offset: float = 0.0,
        adc_gain: float = 0.0,
        adc_inl: float = 0.0,
        adc_draw: Draw = "column",
        input_coding: Literal["parallel", "bit_serial"] = "parallel",
        input_slices: int = 3,
        pact_a: bool = True,
        l2: float = 0.01,
        cs: float = 0.1,
        input_range: float = RANGES["a1"],
    ) -> None:
        super().__init__()
        for name, count in (("input_size", input_size), ("classes", classes), ("hidden", hidden), ("n_msb", n_msb)):
            _check(name, count, 1, whole=True)
        _check("method", method, 0, 2, whole=True)
        _check("gain_blocks", gain_blocks, 1, whole=True)
        _check("drop_p", drop_p, 0, 1)
        for name, strength in (("noise_train", noise_train), ("noise_eval", noise_eval), ("l2", l2), ("cs", cs)):
            _check(name, strength, 0)
        _check("input_range", input_range, MIN_RANGE)
        if method == MIX and n_msb % gain_blocks:
            raise UsageError(f"model.n_msb: {n_msb} blocks are not divisible by model.gain_blocks = {gain_blocks}")
        groups = {BLOCKS: n_msb, ORTHOGONALITY: 1, MIX: n_msb // gain_blocks}[method]
        if groups > classes:
            part = "blocks" if method == BLOCKS else "groups (n_msb / gain_blocks)"
            raise UsageError(f"model.n_msb: {groups} {part} for {classes} classes; method {method} takes 1..{classes}")
        self.input_size, self.classes, self.hidden = input_size, classes, hidden
        self.blocks, self.groups, self.method = n_msb, groups, method
        self.drop_p, self.noise_train, self.noise_eval = float(drop_p), float(noise_train), float(noise_eval)
        self.l2, self.cs, self.trainable_ranges = float(l2), float(cs), bool(pact_a)
        if input_coding not in ("parallel", "bit_serial"):
            raise UsageError(f"model.input_coding: {input_coding!r}; choose parallel or bit_serial")
        _check("input_slices", input_slices, 1, 15, whole=True)
        self.bits = Bits(quant_inp, quant_actMVM, quant_actNM, input_slices if input_coding == "bit_serial" else 0)
        self.deviations = Deviations(noise_program, adc_offset, adc_gain, adc_inl, adc_draw)
        self.deviations_eval = self.deviations  # may be replaced: evaluation needs no new training
        self._chip: Chip | None = None  # of this evaluation
        if self.deviations.converters:
            self._check_converters()
        self.device = Device(float(max_w), float(rows_bias), quant_w, weight_range)

        self.lstm = QuantLSTM(input_size, hidden, n_msb, self.bits, self.device, pact_a, float(input_range))
        self.outputs = math.ceil(classes / groups)
        self.readout = CrossbarLinear(hidden, self.outputs, n_msb, self.bits, self.device, pact_a)
        if method == ORTHOGONALITY:
            self.sum_range = nn.Parameter(torch.tensor([16.0 * n_msb]), requires_grad=pact_a)
        order = [group * self.outputs + output for group, output in class_order(classes, groups)]
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.order: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, F] -> logits [B, C]."""
        noise = {"pretrain": 0.0, "retrain": self.noise_train, "eval": self.noise_eval}[self.phase]
        drop_p = self.drop_p if self.phase == "pretrain" else 0.0
        chip = self._chip_in_use()
        hidden = self.lstm(x, drop_p, noise, chip)  # [N, B, H]
        scores = self.readout(hidden, noise, chip.get("readout", IDEAL))  # [N, B, O]
        if self.method == ORTHOGONALITY:
            return clip_quantise(scores.sum(0), self.bits.nm, self.sum_range)
        # block k + m groups belongs to group k: [N, B, O] -> [m, groups, B, O] -> [groups, B, O]
        grouped = scores.view(-1, self.groups, *scores.shape[1:]).sum(0)
        return grouped.transpose(0, 1).flatten(1)[:, self.order]  # [B, groups * O] -> [B, C]

    def set_phase(self, phase: Phase) -> None:
        """Switch noise and DropConnect; the evaluation phase meets another chip each time it begins.

        Raises KestrelError, naming it, where a range is below its bound, as of a damaged or foreign checkpoint.
        """
        super().set_phase(phase)
        self._chip = None
        self._check_ranges()

    def evaluate_with(self, noise_read: float | None = None, **deviations: Any) -> None:
        """Replace what phase eval meets: noise_eval, and fields of Deviations; None keeps what the settings say."""
        if noise_read is not None:
            self.noise_eval = float(noise_read)
        given = {key: value for key, value in deviations.items() if value is not None}
        self.deviations_eval = dataclasses.replace(self.deviations_eval, **given)
        self._chip = None
        if self.deviations_eval.converters:
            self._check_converters()

    def _check_converters(self) -> None:
        if self.bits.mvm is None:
            given = next(name for name in self.deviations_eval.figures() if name != "noise_program")
            raise UsageError(
                f"model.{given}: analog outputs have no converter that deviates; set quant_actMVM to 2..16"
            )

    def _check_ranges(self) -> None:
        named = [(f"{name} of the cell", values) for name, values in zip(RANGES, self.lstm.ranges, strict=True)]
        named += [
            (f"{name} of the read-out", values) for name, values in zip(("a1", "a2"), self.readout.ranges, strict=True)
        ]
        if self.method == ORTHOGONALITY:
            named.append(("sum_range", self.sum_range))
        low = torch.stack([values.detach().min() for _, values in named])
        for place in torch.nonzero(low < MIN_RANGE * (1 - 1e-6)).flatten().tolist():
            name, values = named[place]
            block = int(values.argmin())
            raise KestrelError(
                f"range {name} is {float(low[place]):.3g} in block {block}, out of bounds (>= {MIN_RANGE:g}): "
                "train again with a smaller model.l2, or with model.pact_a=false"
            )

    def _chip_in_use(self) -> Chip:
        """What deviates in this forward pass. Its key comes from torch's default generator."""
        if self.phase == "pretrain" or torch.jit.is_tracing():
            return {}
        evaluation = self.phase == "eval"
        deviations = self.deviations_eval if evaluation else self.deviations
        if not deviations.any:
            return {}
        if evaluation and self._chip is not None:
            return self._chip
        products = {
            "ih": (self.lstm.w_ih, self.lstm.b_ih),
            "hh": (self.lstm.w_hh, self.lstm.b_hh),
            "readout": (self.readout.weight, self.readout.bias),
        }
        with torch.no_grad():
            chip = draw_chip(deviations, products, self.device.max_w, int(torch.randint(2**62, (), dtype=torch.int64)))
        if evaluation:
            self._chip = chip
        return chip

    def _block_vectors(self) -> Tensor:
        """All weights and biases of each block, [N, parameters]."""
        parts = (self.lstm.w_ih, self.lstm.w_hh, self.lstm.b_ih, self.lstm.b_hh, self.readout.weight, self.readout.bias)
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def _cosine(self) -> Tensor | None:
        """Similarity of blocks that score the same classes, in 0..1; None where there are no such blocks."""
        copies = self.blocks // self.groups
        if self.method == BLOCKS or copies == 1:
            return None
        vectors = functional.normalize(self._block_vectors(), dim=1, eps=1e-6)
        vectors = vectors.view(copies, self.groups, -1).transpose(0, 1)  # [groups, copies, parameters]
        cosines = torch.bmm(vectors, vectors.transpose(1, 2))  # [groups, copies, copies]
        others = cosines.sum() - cosines.diagonal(dim1=1, dim2=2).sum()
        if self.method == ORTHOGONALITY:
            return (others / copies**2).abs()
        return (others / (self.groups * copies * (copies - 1))).abs()

    def penalty(self) -> dict[str, Tensor]:
        """`range_l2` = l2 ||A||_2 / (16 N), with A all ranges of cells and read-outs (13 + 2 per block; not the range of
        the sum of method 1); left out where ranges are frozen. `cosine` = cs C, left out where no two blocks score the
        same classes. C is |sum of cos(w_i, w_j) over i != j| / N^2 in method 1 and |mean of cos over the pairs inside
        groups| in method 2, with w_k all weights and biases of block k.
        """
        terms = {}
        if self.l2 > 0 and self.trainable_ranges:
            ranges = torch.cat([self.lstm.ranges, self.readout.ranges])
            terms["range_l2"] = self.l2 * torch.linalg.vector_norm(ranges) / (16 * self.blocks)
        cosine = self._cosine() if self.cs > 0 else None
        if cosine is not None:
            terms["cosine"] = self.cs * cosine
        return terms

    @torch.no_grad()
    def project(self) -> None:
        """Hold weights inside +-max_w, biases inside +-rows_bias max_w, and ranges at MIN_RANGE or above."""
        self.lstm.project()
        self.readout.project()
        if self.method == ORTHOGONALITY:
            self.sum_range.clamp_(min=MIN_RANGE)

    def layer_table(self, frames: int) -> list[dict[str, Any]]:
        """Products of all blocks; each frame costs 4 H (I + H) multiply-adds per block, the read-out comes once."""
        rows = []
        products = (
            ("lstm.w_ih", self.lstm.w_ih, self.lstm.b_ih, frames),
            ("lstm.w_hh", self.lstm.w_hh, self.lstm.b_hh, frames),
            ("readout.weight", self.readout.weight, self.readout.bias, 1),
        )
        for name, weight, bias, times in products:
            rows.append({"name": name, "parameters": weight.numel() + bias.numel(), "macs": weight.numel() * times})
        ranges = sum(p.numel() for name, p in self.named_parameters() if name.endswith(("ranges", "sum_range")))
        rows.append({"name": "ranges", "parameters": ranges, "macs": 0})
        return rows

    @torch.no_grad()
    def weight_groups(self) -> list[WeightGroup]:
        """Weights and biases as the crossbars store them."""
        pairs = (
            ("lstm.w_ih", self.lstm.w_ih, "lstm.b_ih", self.lstm.b_ih),
            ("lstm.w_hh", self.lstm.w_hh, "lstm.b_hh", self.lstm.b_hh),
            ("readout.weight", self.readout.weight, "readout.bias", self.readout.bias),
        )
        limits = self.device.quantiser_ranges()
        groups = []
        for weight_name, weight, bias_name, bias in pairs:
            stored = self.device.stored(weight.detach(), bias.detach())
            for name, tensor, limit in zip((weight_name, bias_name), stored, limits, strict=True):
                groups.append(WeightGroup(name, tensor, limit, self.device.bits))
        return groups

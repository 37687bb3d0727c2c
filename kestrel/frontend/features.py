"""Audio to features: log-mel filter banks and MFCC, batched, in pure PyTorch.

The definitions are torchaudio's (MelSpectrogram, MFCC) where a front end can be expressed there; the way to the numbers
is shorter: only the bins that a filter uses, sums over a filter's own bins, no complex magnitudes, and chunks that stay
in the processor's cache. `top_db` is applied to each clip by itself, so that a clip's features do not depend on its
neighbours.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kestrel.frontend.filters import (
    analysis_window,
    check,
    dct_matrix,
    describe_empty_filters,
    frame_count,
    mel_filters,
    padding,
)
from kestrel.frontend.spec import FrontendSpec
from kestrel.frontend.spectrum import power_spectrum

# Matrix products have widths of whole vector registers. That is fastest; and a narrow rest would be computed in another
# order, depending on the number of rows, so that the last digits of a clip's features would depend on the size of its
# batch.
_ALIGN = 16
_CPU_FRAMES = 400  # frames of a chunk for each thread: their buffers fit its cache
_GPU_FRAMES = 1 << 17
_GROUPS = 4  # filters are cut into this many groups, each multiplied with its own bins only

_UNIT = {"ln": 1.0, "db": 10.0 / math.log(10.0), "db20": 20.0 / math.log(10.0)}


class _Group(NamedTuple):
    """Filters first .. last - 1, which use the bins low .. high - 1 (counted from the first computed bin)."""

    first: int
    last: int
    low: int
    high: int


class Frontend(nn.Module):
    """A front end made from its settings. `width` = F, the number of coefficients or of mel bands.

    Raises UsageError where the settings contradict each other. Not differentiable. Holds no trained values: its
    state_dict is empty and it is rebuilt from the settings.
    """

    dct: Tensor | None
    dct_of_one: Tensor

    def __init__(self, spec: FrontendSpec) -> None:
        super().__init__()
        check(spec)
        self.spec = spec
        self.width = spec.coefficients or spec.mel_bands
        bank = mel_filters(spec)  # [bins, mel_bands]
        empty = bank.sum(0) == 0
        self._empty = empty.nonzero().flatten().tolist()
        used = bank.sum(1).nonzero().flatten()
        first, last = (int(used[0]), int(used[-1])) if len(used) else (1, 1)
        bins = -(-(last - first + 1) // _ALIGN) * _ALIGN
        if first + bins > bank.shape[0]:  # no room for whole registers below the highest bin
            first, bins = max(0, bank.shape[0] - bins), min(bins, bank.shape[0])
        window = analysis_window(spec) * spec.spectrum_scale
        offset = (spec.n_fft - spec.window) // 2 if spec.framing == "fft" else 0
        self.spectrum = power_spectrum(window, spec.n_fft, spec.hop, offset, first, bins)

        dct = None
        if spec.coefficients is not None:
            # Empty filters all hold log(floor): one column stands for all of them, its row of the DCT is the sum of
            # theirs.
            dct = dct_matrix(spec.mel_bands, spec.coefficients) * _UNIT[spec.log]
            self.register_buffer("dct_of_one", dct.sum(0).float(), persistent=False)
            if self._empty:
                bank = torch.cat([bank[:, ~empty], torch.zeros(bank.shape[0], 1)], dim=1)
                dct = torch.cat([dct[~empty], dct[empty].sum(0, keepdim=True)])
            dct = nn.functional.pad(dct, (0, -dct.shape[1] % _ALIGN, 0, -dct.shape[0] % _ALIGN)).float()
        self.register_buffer("dct", dct, persistent=False)
        bank = nn.functional.pad(bank, (0, -bank.shape[1] % _ALIGN))
        self._columns = bank.shape[1]
        self._groups = self._cut(bank[first : first + bins])

    def _cut(self, bank: Tensor) -> list[_Group]:
        """Cut the filters of bank [bins, columns] into groups of neighbours, which share few bins with each other."""
        units = bank.shape[1] // _ALIGN
        count = min(_GROUPS, units)
        bounds = [i * units // count * _ALIGN for i in range(count + 1)]
        groups = []
        for index, (first, last) in enumerate(itertools.pairwise(bounds)):
            used = bank[:, first:last].sum(1).nonzero().flatten()
            low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
            self.register_buffer(f"filters_{index}", bank[low:high, first:last].contiguous(), persistent=False)
            groups.append(_Group(first, last, low, high))
        return groups

    def frames(self, samples: int) -> int:
        """T of a clip of `samples` samples; UsageError where it is too short."""
        return frame_count(self.spec, samples)

    def empty_filters(self) -> list[int]:
        """Filters that are narrower than the distance of two bins and fall between them: they are always log(floor)."""
        return list(self._empty)

    def describe_empty_filters(self) -> str | None:
        """One line about empty filters, or None where there are none."""
        return describe_empty_filters(self.spec, self._empty)

    @torch.no_grad()
    def forward(self, wave: Tensor) -> Tensor:
        """Features float32 [B, T, F] of wave [B, S]: float32 in -1..1, or int16 samples."""
        if wave.dim() != 2:
            raise ValueError(f"expected wave [B, S], got {tuple(wave.shape)}")
        clips, samples = wave.shape
        frames = self.frames(samples)
        device = wave.device
        out = torch.empty(clips, frames, self.width, device=device)
        limit = _CPU_FRAMES * torch.get_num_threads() if device.type == "cpu" else _GPU_FRAMES
        chunk = max(1, min(clips, limit // frames))

        margin, tail = padding(self.spec), 0
        if self.spec.framing == "window":
            tail = max(0, (frames - 1) * self.spec.hop + self.spec.window - samples)
        padded = torch.zeros(chunk, samples + 2 * margin + tail, device=device)
        space = self.spectrum.workspace(chunk, frames, device)
        power = torch.empty(chunk, frames, self.spectrum.bins, device=device)
        mel = torch.empty(chunk, frames, self._columns, device=device)
        for start in range(0, clips, chunk):
            count = min(chunk, clips - start)
            self._pad(wave[start : start + count], padded[:count], margin)
            self._log_mel(padded[:count], space, power[:count], mel[:count])
            self._finish(mel[:count], out[start : start + count])
        return out

    @staticmethod
    def _pad(wave: Tensor, padded: Tensor, margin: int) -> None:
        """Copy wave [n, S] into padded [n, margin + S + ...], reflecting `margin` samples on either side."""
        samples = wave.shape[1]
        body = padded[:, margin : margin + samples]
        body.copy_(wave)
        if wave.dtype == torch.int16:
            body.mul_(1.0 / 32768.0)
        if margin:
            padded[:, :margin] = body[:, 1 : margin + 1].flip(1)
            padded[:, margin + samples : samples + 2 * margin] = body[:, -margin - 1 : -1].flip(1)

    def _log_mel(self, padded: Tensor, space: tuple[Tensor, ...], power: Tensor, mel: Tensor) -> None:
        """Fill mel [n, T, columns] with natural logarithms of the filters' outputs."""
        spec = self.spec
        self.spectrum(padded, space, power)
        if spec.power == 1.0:
            power.sqrt_()
        elif spec.power != 2.0:
            power.pow_(spec.power / 2.0)
        rows, columns = power.view(-1, power.shape[-1]), mel.view(-1, self._columns)
        for index, group in enumerate(self._groups):
            filters = self.get_buffer(f"filters_{index}")
            torch.mm(rows[:, group.low : group.high], filters, out=columns[:, group.first : group.last])
        if spec.log == "ln":
            mel.add_(spec.log_floor).log_()
        else:
            mel.clamp_(min=spec.log_floor).log_()

    def _finish(self, mel: Tensor, out: Tensor) -> None:
        """Range, unit and DCT of mel [n, T, columns], which is used up, into out [n, T, F]."""
        unit = _UNIT[self.spec.log]
        lowest: Tensor | None = None
        if self.spec.top_db is not None:
            lowest = mel.amax(dim=(1, 2), keepdim=True) - self.spec.top_db / unit  # [n, 1, 1]
            # Counted from the lowest value: a sum of many equal large numbers would lose digits in the DCT.
            mel.sub_(lowest).clamp_(min=0.0)
        if self.dct is None:
            torch.mul(mel[..., : self.width], unit, out=out)
            if lowest is not None:
                out.add_(lowest, alpha=unit)
        else:
            product = mel.view(-1, self._columns) @ self.dct  # [n * T, width and padding]
            out.copy_(product.view(*mel.shape[:2], -1)[..., : self.width])
            if lowest is not None:
                out.addcmul_(lowest, self.dct_of_one)

"""Settings of the score stage (no heavy imports: the planner reads them)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kestrel.settings import setting


@dataclass
class ScoreSpec:
    """Stage 5."""

    split: Literal["test", "validation"] = setting("test", "split that is scored")
    chip: int = setting(0, "keys the noise drawn in evaluation, together with the seed", min=0)
    chips: int = setting(
        1, "chips that are scored, from score.chip on; more than one make a study of the spread", min=1
    )
    noise_read: float | None = setting(
        None, "weight noise of every product / max_w; null = model.noise_eval", min=0, max=10
    )
    noise_program: float | None = setting(None, "programming noise / max_w; null = the model's", min=0, max=10)
    adc_offset: float | None = setting(None, "offset of converters, LSB; null = the model's", min=-1e3, max=1e3)
    adc_gain: float | None = setting(None, "relative gain error of converters; null = the model's", min=-0.9, max=10)
    adc_inl: float | None = setting(
        None, "peak non-linearity of converters, LSB; null = the model's", min=-1e3, max=1e3
    )
    adc_draw: Literal["column", "chip", "fixed"] | None = setting(None, "how adc_* are drawn; null = as the model")

    snr: list[float] = setting(
        [],
        "signal-to-noise ratios in dB at which the clips are scored as well, with noise of their split",
        min=-100,
        max=100,
    )
    machine: str = setting("spartus", "accelerator of the cycle model of delta networks, a file of conf/hw")

    # Done-markers hold these only where they are not the default, so that older results stay up to date.
    ADDED_LATER: ClassVar[tuple[str, ...]] = (
        *("chips", "noise_read", "noise_program", "adc_offset", "adc_gain", "adc_inl", "adc_draw", "machine", "snr"),
    )

    def deviations(self) -> dict[str, float | str]:
        """What evaluation meets instead of what the model's settings say; no training depends on it."""
        names = ("noise_read", "noise_program", "adc_offset", "adc_gain", "adc_inl", "adc_draw")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

"""Settings of a corpus, a protocol and of augmentation (no heavy imports: the planner reads them)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kestrel.settings import setting


@dataclass
class CorpusSpec:
    """Where the audio comes from: an entry of conf/corpora.yaml, or a folder in GSC layout."""

    name: str = setting("mini", "name of the corpus, used for data/<name>")
    kind: Literal["synthetic", "archive", "folder"] = setting("folder", "how stage 0 obtains it")
    dir: str | None = setting(None, "the user's folder in GSC layout (kind folder); it is never changed")
    test_dir: str | None = setting(None, "a separate folder of test clips in GSC layout")
    archives: list[str] = setting([], "archives of conf/corpora.yaml that make up the corpus (kind archive)")
    speakers: int = setting(200, "speakers of a synthetic corpus", min=1)
    keyword_takes: int = setting(3, "clips of each keyword a synthetic speaker says", min=1)
    seed: int = setting(0, "seed of a synthetic corpus", min=0)


@dataclass
class ProtocolSpec:
    """Class list and rule that assign every clip to train, validation, test or none (DESIGN section 4)."""

    name: str = setting("", "name of the protocol, printed next to every number")
    words: list[str] = setting(
        "yes no up down left right on off stop go".split(), "keywords, in the order of their labels"
    )
    unknown_percentage: float | None = setting(
        10.0, "unknown clips per 100 keyword clips; null = no such class", min=0, max=1000
    )
    silence_percentage: float | None = setting(
        10.0, "silence clips per 100 keyword clips; null = no such class", min=0, max=1000
    )
    split: Literal["hash", "list", "auto"] = setting(
        "auto", "rule of the splits; auto = lists where the folder has them"
    )
    validation_percentage: float = setting(10.0, "share of the hash rule's validation split", min=0, max=100)
    testing_percentage: float = setting(10.0, "share of the hash rule's test split", min=0, max=100)
    sample_rate: int = setting(16000, "samples per second; clips of another rate are rejected", min=1000)
    clip_samples: int = setting(16000, "samples of a clip: shorter ones are padded, longer ones cut", min=1)
    test_folder: bool = setting(True, "test clips come from the corpus's separate test folder, where it has one")
    benchmark: bool = setting(False, "stop when a clip of the corpus is missing or rejected")
    expect: dict[str, int] = setting({}, "clips that each split must have; checked after stage 1")


@dataclass
class AugmentSpec:
    """Augmentation of training clips, waveforms and features, keyed by (seed, epoch, row)."""

    # Left out of what a stage depends on where they have their defaults, so that older runs stay up to date.
    ADDED_LATER: ClassVar[tuple[str, ...]] = (
        "shift_frames",
        "time_masks",
        "time_mask",
        "band_masks",
        "band_mask",
        "noise_snr",
    )

    waveform: bool = setting(True, "augment waveforms during training; false trains on the stored features")
    time_shift_ms: float = setting(100.0, "largest time shift, in either direction", min=0, max=1000)
    noise_frequency: float = setting(0.8, "share of clips that get background noise", min=0, max=1)
    noise_volume: float = setting(0.1, "largest gain of background noise (uniform from 0)", min=0, max=10)
    noise_snr: list[float] = setting(
        [], "signal-to-noise ratios in dB, one of which noise is added at; empty = by noise_volume", min=-100, max=100
    )
    silence_volume: float = setting(1.0, "largest gain of the noise windows that make silence clips", min=0, max=10)
    shift_frames: int = setting(0, "largest shift of the features in frames, in either direction", min=0, max=1000)
    time_masks: int = setting(0, "stretches of frames that are masked in the features (SpecAugment)", min=0, max=20)
    time_mask: int = setting(10, "longest masked stretch in frames", min=0, max=1000)
    band_masks: int = setting(0, "stretches of bands that are masked in the features (SpecAugment)", min=0, max=20)
    band_mask: int = setting(4, "widest masked stretch in bands", min=0, max=1000)

    @property
    def features(self) -> bool:
        """Whether features are augmented."""
        return bool(self.shift_frames or self.time_masks or self.band_masks)

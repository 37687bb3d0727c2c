"""What an export is made of: forms of the network, each with its files, figures and place on the card."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kestrel.export.spec import ExportSpec
from kestrel.lower.answers import Answers
from kestrel.lower.graph import IntegerGraph
from kestrel.models.evaluate import Accuracy, ProgressCallback

if TYPE_CHECKING:
    from kestrel.models.spotter import KeywordSpotter
    from kestrel.store.hdf5 import AudioFile, FeatureFile


@dataclass(frozen=True)
class Work:
    """A trained spotter and the clips that its exported forms are checked on.

    `logits` float32 [N, C] are the trained network's on every clip, without device noise; `decoded` those with the
    weights that the integer codes stand for. `graph` is the integer model and `integer` its answers on every clip, in
    the order of `data`; both are None where the network cannot be lowered, and `obstacle` says why. `protocol` has name
    and hash. `next_pass` gives the progress callback of the form's pass over the clips. `audio` is the sound of the same
    clips, where it is known.
    """

    spotter: KeywordSpotter
    data: FeatureFile
    logits: np.ndarray
    decoded: np.ndarray
    graph: IntegerGraph | None
    obstacle: str
    integer: Answers | None
    settings: ExportSpec
    batch_size: int
    protocol: Mapping[str, str]
    next_pass: Callable[[], ProgressCallback]
    audio: AudioFile | None = None


@dataclass(frozen=True)
class Part:
    """What became of one form: `title` and `text` (Markdown) for the card, what each file is, and its results.

    `accuracies` by what computed them. `figures` are entries of export.json; `facts` are lines of the card's first table
    (name, text). `missing` says in whole sentences what this form does not hold.
    """

    title: str
    text: str
    files: Mapping[str, str] = field(default_factory=dict)
    accuracies: Mapping[str, Accuracy] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    missing: Sequence[str] = ()


Form = Callable[[Work, Path], Part | None]  # None: the form is not meant for such a network

"""Stage export: the forms of a trained spotter that can be deployed, each checked on a whole split, and their card.

A new form is a function in FORMS: it writes its files into the folder and returns the part of the card that it fills.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kestrel.errors import KestrelError
from kestrel.export.accelerator import accelerator_form
from kestrel.export.c_form import TITLE as C_TITLE
from kestrel.export.c_form import c_form, refuse_limits
from kestrel.export.card import Subject, card
from kestrel.export.codes import EXPORTED, codes_form
from kestrel.export.form import Form, Part, Work
from kestrel.export.integer import integer_form
from kestrel.export.mcu import mcu_form
from kestrel.export.onnx import onnx_form
from kestrel.export.qdq import qdq_form
from kestrel.export.spec import ExportSpec
from kestrel.export.vectors import vectors_form
from kestrel.hw.network import hardware
from kestrel.lower.answers import answers, float64_answers, lowered, predict_decoded
from kestrel.models.delta_rnn import DeltaNetwork
from kestrel.models.evaluate import Accuracy, Passes, ProgressCallback, accuracy, device_of, evaluation_noise, predict
from kestrel.models.inventory import (
    describe_devices,
    device_figures,
    layers,
    network_shape,
    noise_off,
    parameters,
)
from kestrel.store.atomic import atomic_folder, disk_error, write_json, write_text
from kestrel.store.hashing import sha256_file

if TYPE_CHECKING:
    from kestrel.models.spotter import KeywordSpotter
    from kestrel.store.hdf5 import AudioFile, FeatureFile


def _c_if_wanted(work: Work, folder: Path) -> Part:
    """c/, unless it is switched off: its proof needs a compiler."""
    if work.settings.c:
        return c_form(work, folder)
    refuse_limits(work.settings, "export.c is false")
    text = "Left out, since `export.c` is false."
    return Part(C_TITLE, text, missing=("C program, and the computation of features from audio: `export.c` is false.",))


def _mcu_if_wanted(work: Work, folder: Path) -> Part | None:
    """mcu/, unless C is switched off."""
    return mcu_form(work, folder) if work.settings.c else None


FORMS: tuple[Form, ...] = (
    codes_form,
    integer_form,
    _c_if_wanted,
    _mcu_if_wanted,
    vectors_form,
    onnx_form,
    qdq_form,
)
DELTA_FORMS: tuple[Form, ...] = (accelerator_form,)  # of networks that transmit deltas
TRAINED = "trained weights (float32)"
DIGITS = 6  # of the shares in export.json


def export(
    spotter: KeywordSpotter,
    data: FeatureFile,
    out_dir: Path,
    *,
    identity: Mapping[str, Any],
    split: str,
    seed: int,
    chip: int,
    batch_size: int,
    settings: ExportSpec,
    feature_scale: float | None,
    provenance: Mapping[str, Any],
    audio: AudioFile | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Write every form of `spotter` and card.md into the folder `out_dir` at once; returns the content of export.json.

    Args:
        data, split: the clips that each form is checked on.
        identity: recipe, variant, tag, seed, classes, config_hash; frontend, feature (or post) for the card.
        seed, chip: key of the noise drawn in evaluation, for the accuracy that the score stage reports.
        feature_scale: scale of the integer model's feature codes (kestrel.lower.spotter.feature_scale_of); None where it
            is not known, which leaves the integer model out.
        provenance: checkpoint_sha256, git_commit, git_dirty, torch, command.
        audio: the packed sound of the same clips, from which the C program is proven from sound to logits.

    Raises KestrelError where a form does not answer as the trained network does, or exceeds a limit; nothing is written
    then.
    """
    if list(data.classes) != list(identity["classes"]):
        raise KestrelError(
            f"the features have classes {' '.join(data.classes)}, the checkpoint {' '.join(identity['classes'])}: "
            "export it with features of its own protocol"
        )
    deviations = device_figures(spotter.net)
    graph, obstacle = lowered(spotter, feature_scale, settings.weight_bits)
    passes = Passes(
        progress,
        len(data.labels),
        2 + 2 * settings.onnx + bool(deviations) + (0 if graph is None else 1 + settings.c * (1 + (audio is not None))),
    )
    with noise_off(spotter.net):
        logits = predict(spotter, data, batch_size, passes.next())
    references = {TRAINED: accuracy(logits, data.labels)}
    if deviations:
        with evaluation_noise(seed, chip, device_of(spotter)):
            noisy = predict(spotter, data, batch_size, passes.next())
        plain = set(deviations) == {"noise_read"}
        what = f"device noise {deviations['noise_read']:g}" if plain else describe_devices(deviations)
        references[f"trained weights with {what} (seed {seed}, chip {chip})"] = accuracy(noisy, data.labels)
    protocol = {key: data.protocol[key] for key in ("name", "hash")}
    decoded = predict_decoded(spotter, data, settings.weight_bits, batch_size, passes.next())
    integer = None
    if graph is not None:
        exact = functools.partial(float64_answers, spotter, graph, data, weight_bits=settings.weight_bits)
        integer = answers(graph, data, data.labels, decoded, passes.next(), exact)
    work = Work(
        spotter=spotter,
        data=data,
        logits=logits,
        decoded=decoded,
        graph=graph,
        obstacle=obstacle,
        integer=integer,
        settings=settings,
        batch_size=batch_size,
        protocol=protocol,
        next_pass=passes.next,
        audio=audio,
    )
    shape = network_shape(spotter)
    figures, no_figures = hardware(spotter.net, shape[0])
    subject = Subject(
        identity=identity,
        protocol=protocol,
        split=split,
        provenance=provenance,
        input_shape=(data.shape[1], data.shape[2]),
        network_shape=shape,
        layers=layers(spotter.net, shape[0]),
        parameters=parameters(spotter.net),
        macs=spotter.net.macs(shape[0]),
        hardware=figures,
        no_hardware=no_figures,
    )
    try:
        with atomic_folder(out_dir) as folder:
            more = DELTA_FORMS if isinstance(spotter.net, DeltaNetwork) else ()
            made = (form(work, folder) for form in (*FORMS, *more))
            parts = [part for part in made if part is not None]
            accuracies = {name: right for part in parts for name, right in part.accuracies.items()} | references
            names = [name for part in parts for name in part.files]
            summary = _summary(subject, accuracies, parts, {name: _stamp(folder / name) for name in names})
            write_json(folder / "export.json", summary)
            stamps = {name: _stamp(folder / name) for name in [*names, "export.json"]}
            write_text(folder / "card.md", card(subject, accuracies, parts, stamps))
    except OSError as error:
        raise disk_error(out_dir, error) from error
    return summary


def _stamp(path: Path) -> tuple[int, str]:
    return path.stat().st_size, sha256_file(path)


def _summary(
    subject: Subject,
    accuracies: Mapping[str, Accuracy],
    parts: list[Part],
    files: Mapping[str, tuple[int, str]],
) -> dict[str, Any]:
    """export.json: the figures of the card, for programs; `accuracy` is that of the exported integer weights."""
    exported, trained = accuracies[EXPORTED], accuracies[TRAINED]
    figures: dict[str, Any] = {}
    for part in parts:
        figures |= part.figures
    return {
        **{key: subject.identity[key] for key in ("recipe", "variant", "tag", "seed")},
        "protocol": dict(subject.protocol),
        "split": subject.split,
        "n": exported.n,
        "accuracy": exported.value,
        "ci95": [round(bound, DIGITS) for bound in exported.ci95],
        "trained_accuracy": trained.value,
        "trained_ci95": [round(bound, DIGITS) for bound in trained.ci95],
        "parameters": subject.parameters,
        "macs": subject.macs,
        **({} if subject.hardware is None else subject.hardware.record()),
        **figures,
        "classes": list(subject.identity["classes"]),
        "input_shape": list(subject.input_shape),
        "config_hash": subject.identity["config_hash"],
        "checkpoint_sha256": subject.provenance.get("checkpoint_sha256"),
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()},
    }

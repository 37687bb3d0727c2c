"""The score of a trained spotter on one split: result.json, scores.csv, pictures and report.md."""

from __future__ import annotations

import csv
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from kestrel.errors import KestrelError
from kestrel.hw.delta_markdown import summary as cycles_summary
from kestrel.hw.markdown import summary as hardware_summary
from kestrel.hw.network import hardware
from kestrel.lower.answers import Answers, answers, float64_answers, lowered, predict_decoded
from kestrel.lower.graph import IntegerGraph
from kestrel.lower.mcu import narrow_figures
from kestrel.lower.memory import plan_memory
from kestrel.lower.sound import SoundAnswers, sound_answers
from kestrel.lower.spotter import made_in_fixed_point
from kestrel.models.delta_rnn import DeltaNetwork
from kestrel.models.evaluate import (
    Passes,
    ProgressCallback,
    accuracy,
    device_of,
    evaluation_noise,
    predict,
    softmax,
    ties,
)
from kestrel.models.inventory import device_figures, evaluation_noise_of, network_shape
from kestrel.models.quant_net import QuantNet
from kestrel.score import chips as programmed
from kestrel.score import delta_plots, deltas, noisy, plots
from kestrel.score.count import Counts, count
from kestrel.score.metrics import DIGITS, confusion, per_class, worst_confusions
from kestrel.score.report import Evidence, WrongClip, report
from kestrel.store.atomic import atomic_folder, disk_error, write_json, write_text
from kestrel.store.markdown import percent

if TYPE_CHECKING:
    from kestrel.frontend.make import AnyFrontend
    from kestrel.models.spotter import KeywordSpotter
    from kestrel.store.hdf5 import AudioFile, FeatureFile

log = logging.getLogger("kestrel")

SHOWN = 10  # confusions and wrong clips of the report
PROVENANCE = ("checkpoint_sha256", "git_commit", "git_dirty", "torch", "device", "train_seconds", "command")


def score(
    spotter: KeywordSpotter,
    data: FeatureFile,
    out_dir: Path,
    *,
    identity: Mapping[str, Any],
    split: str,
    seed: int,
    chip: int,
    chips: int = 1,
    machine: str = "spartus",
    batch_size: int,
    provenance: Mapping[str, Any],
    feature_scale: float | None,
    analog_bits: int = 8,
    metrics_csv: Sequence[tuple[str, Path]] | None = None,
    extra: Mapping[str, Any] | None = None,
    audio: AudioFile | None = None,
    frontend: AnyFrontend | None = None,
    snrs: Sequence[float] = (),
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Score `spotter` on all clips of `data` and write the folder `out_dir` at once; returns what result.json holds.

    The integer model of the spotter is scored on the same clips where it can be lowered; result.json and report say
    which setting prevents it where it cannot. peak_ram_bytes is the arena of the integer model in C: all tensors and
    states with those that live at different times sharing bytes, and weights that are unpacked. Features given by the
    caller, the front end and the stack come on top; stage 6 measures the whole program. It is null without integer model.

    Args:
        identity: recipe, variant, tag, seed, classes and config_hash of the run.
        split: name of the split that `data` holds.
        seed, chip: key of the noise drawn in evaluation; with the same `batch_size` every scoring gives the same files.
        machine: accelerator of the cycle model of delta networks (a file of conf/hw).
        chips: chips that are scored beside and after `chip`; result.json then has their spread in `chips`.
        provenance: checkpoint_sha256, git_commit, git_dirty, torch, device, train_seconds, command (PROVENANCE).
        feature_scale: scale of the integer model's feature codes (kestrel.lower.spotter.feature_scale_of); None where it
            is not known, which leaves the integer model out.
        analog_bits: bits at which weights that were trained without quantisation are stored.
        metrics_csv: (stage, its metrics.csv) in the order of training, for the curves.
        extra: further entries of result.json.
        audio: packed audio of the same clips, for the fixed-point front end; None where there is none.
        frontend, snrs: the front end that made `data`, and ratios in dB at which clips are scored with noise.

    Raises KestrelError where classes do not fit or the network gives no finite answer; nothing is written then.
    """
    names = _check_classes(data, identity)
    graph, obstacle = lowered(spotter, feature_scale, analog_bits)
    figures, no_figures = hardware(spotter.net, network_shape(spotter)[0])
    from_sound = audio is not None and not made_in_fixed_point(data)
    passes = Passes(progress, data.shape[0], chips - 1 + len(snrs) + (1 if graph is None else 3 + from_sound))
    with evaluation_noise(seed, chip, device_of(spotter)), deltas.recorded(spotter.net) as transmitted:
        logits = predict(spotter, data, batch_size, passes.next())  # [N, C]
    saved = None
    if transmitted is not None and isinstance(spotter.net, DeltaNetwork):
        saved = deltas.study(spotter.net, transmitted, machine)
    if logits.shape[1] != len(names):
        raise KestrelError(
            f"the network has {logits.shape[1]} outputs for {len(names)} classes: take its own checkpoint"
        )
    labels, predicted, shares = data.labels, logits.argmax(axis=1), softmax(logits)
    right, matrix = accuracy(logits, labels), confusion(labels, predicted, len(names))
    spread = None
    if chips > 1:
        spread = programmed.study(
            spotter, data, chips=chips, first=chip, seed=seed, batch_size=batch_size, next_pass=passes.next, known=right
        )
    noise = noisy.study(spotter, audio, frontend, list(snrs), batch_size, passes.next)
    counts = count(spotter.net, network_shape(spotter), analog_bits)
    integer: Answers | None = None
    if graph is not None:
        decoded = predict_decoded(spotter, data, analog_bits, batch_size, passes.next())
        exact = functools.partial(float64_answers, spotter, graph, data, weight_bits=analog_bits)
        integer = answers(graph, data, labels, decoded, passes.next(), exact)
    sound, silence = _sound(graph, data, integer, audio, passes.next())
    result = {
        **{key: identity[key] for key in ("recipe", "variant", "tag", "seed")},
        "protocol": {key: data.protocol[key] for key in ("name", "hash")},
        "split": split,
        "n": right.n,
        "accuracy": right.value,
        "ci95": [round(bound, DIGITS) for bound in right.ci95],
        "ties": ties(logits),
        "per_class": per_class(matrix, names),
        "parameters": counts.parameters,
        "macs": counts.macs,
        "weight_bytes": counts.weight_bytes,
        "peak_ram_bytes": _peak_ram(graph),
        **({"integer_obstacle": obstacle} if integer is None else integer.figures()),
        **({"fixed_frontend_obstacle": silence} if sound is None else sound.figures()),
        **narrow_figures(graph, data),
        **({"energy_obstacle": no_figures} if figures is None else figures.record()),
        **({} if saved is None else saved.record()),
        **({} if noise is None else {"snr": noise.record()}),
        **(extra or {}),
        "input_shape": list(counts.input_shape),
        "thop": _thop(counts),
        "corpus": data.corpus,
        "frontend": data.frontend.get("name", "unnamed"),
        "chip": chip,
        "batch_size": batch_size,
        "evaluation_noise": evaluation_noise_of(spotter.net),
        "deviations": device_figures(spotter.net),
        **({} if spread is None else {"chips": spread.record()}),
        **_pruned(spotter.net),
        "config_hash": identity["config_hash"],
        **{key: provenance.get(key) for key in PROVENANCE},
    }
    stages = list(metrics_csv or [])
    evidence = Evidence(
        counts=counts,
        protocol=data.protocol,
        confusions=worst_confusions(matrix, names, SHOWN),
        surest_errors=_surest_errors(data, predicted, shares),
        stages=[name for name, _ in stages],
        analog_bits=analog_bits,
        integer=integer,
        obstacle=obstacle,
        sound=sound,
        silence=silence,
        hardware=figures,
        no_hardware=no_figures,
        chips=spread,
        noise=noisy.section(noise, right),
        deltas="" if saved is None else deltas.section(saved, data.utt_ids),
    )
    try:
        with atomic_folder(out_dir) as folder:
            write_json(folder / "result.json", result)
            _write_scores(folder / "scores.csv", data, predicted, shares)
            title = f"{result['protocol']['name']}, {split}: {100 * right.value:.2f} % of {right.n:,} clips right"
            plots.confusion_matrix(matrix, names, title, folder / "confusion.png")
            if spread is not None:
                programmed.picture(spread, folder / programmed.PICTURE)
            if saved is not None:
                deltas.write_clips(saved, data, folder / deltas.CLIPS_FILE)
                delta_plots.shares(saved.clips, folder / deltas.SHARES_PICTURE)
                clip = f"{data.utt_ids[saved.shown]}, {names[data.labels[saved.shown]]}"
                delta_plots.deltas(saved.trace, clip, folder / deltas.TRACE_PICTURE)
            if stages:
                plots.curves(stages, folder / "curves.png")
            write_text(folder / "report.md", report(result, evidence))
    except OSError as error:
        raise disk_error(out_dir, error) from error
    if saved is None:
        log.info("%s", f"no energy figure: {no_figures}" if figures is None else hardware_summary(figures))
    else:
        text = f"no cycles: {saved.obstacle}" if saved.figures is None else cycles_summary(saved.figures)
        log.info("%s; %s of the weights are 0", text, percent(saved.weights["all"]))
    return result


def _sound(
    graph: IntegerGraph | None,
    data: FeatureFile,
    integer: Answers | None,
    audio: AudioFile | None,
    progress: ProgressCallback,
) -> tuple[SoundAnswers | None, str]:
    """The answers from sound and "", or None and the line that says why there are none."""
    if graph is None or integer is None:
        return None, "the network was not scored in integers"
    try:
        return sound_answers(graph, data, integer.logits, audio, progress), ""
    except KestrelError as error:
        return None, " ".join(str(error).split())


def _peak_ram(graph: IntegerGraph | None) -> int | None:
    """Bytes of the arena; None where there is no integer model, or none in C."""
    try:
        return None if graph is None else plan_memory(graph).size
    except KestrelError:
        return None


def _pruned(net: nn.Module) -> dict[str, float]:
    """Share of stored weights that are zero, of a network that prunes."""
    if isinstance(net, QuantNet) and net.pruner is not None:
        return {"weight_sparsity": round(net.weight_sparsity(), DIGITS)}
    return {}


def _check_classes(data: FeatureFile, identity: Mapping[str, Any]) -> list[str]:
    names, trained = list(data.classes), list(identity["classes"])
    if names != trained:
        raise KestrelError(
            f"the features have classes {' '.join(names)}, the checkpoint {' '.join(trained)}: "
            "score it on features of its own protocol"
        )
    return names


def _thop(counts: Counts) -> dict[str, Any]:
    check = counts.thop
    return {
        "macs": check.macs,
        "not_counted_by_us": check.extra,
        "macs_compared": check.compared,
        "agrees": counts.thop_agrees,
        "seen_as": check.note,
        "skipped": check.skipped,
    }


def _surest_errors(data: FeatureFile, predicted: np.ndarray, shares: np.ndarray) -> list[WrongClip]:
    """Wrong answers with the largest score, largest first."""
    wrong = np.flatnonzero(predicted != data.labels)
    scores = shares[wrong, predicted[wrong]]
    return [
        WrongClip(
            data.utt_ids[row], int(row), data.classes[data.labels[row]], data.classes[predicted[row]], float(score)
        )
        for row, score in sorted(zip(wrong, scores, strict=True), key=lambda pair: (-pair[1], pair[0]))[:SHOWN]
    ]


def _write_scores(path: Path, data: FeatureFile, predicted: np.ndarray, shares: np.ndarray) -> None:
    """One row per clip; classes by name, `position` is the row of the feature file (ids may repeat)."""
    names = data.classes
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["utt_id", "position", "label", "predicted", "correct", *(f"score_{name}" for name in names)])
        for row, (utt_id, label, answer) in enumerate(zip(data.utt_ids, data.labels, predicted, strict=True)):
            scores = (f"{share:.6f}" for share in shares[row])
            writer.writerow([utt_id, row, names[label], names[answer], int(label == answer), *scores])

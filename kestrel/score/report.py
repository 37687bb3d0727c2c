"""The report of a score: one page that shows the result, what it was measured on, and how to get it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kestrel.hw.markdown import section as hardware_section
from kestrel.hw.result import Figures
from kestrel.lower.answers import ALLOWED_POINTS, Answers
from kestrel.lower.sound import ALLOWED_POINTS as ALLOWED_SOUND_POINTS
from kestrel.lower.sound import SoundAnswers
from kestrel.models.evaluate import Accuracy
from kestrel.models.inventory import describe_devices
from kestrel.score import chips as programmed
from kestrel.score.count import Counts
from kestrel.score.metrics import Confusion
from kestrel.store.markdown import flat, percent, table

# Entries of a protocol that are shown elsewhere, or name folders of one machine.
_NOT_RULES = {"name", "hash", "classes", "counts", "excluded", "rules", "notes", "roots", "noise_files", "hashes"}


@dataclass(frozen=True)
class WrongClip:
    """A clip with a wrong answer, and the softmax score of that answer."""

    utt_id: str
    position: int
    true: str
    heard: str
    score: float


@dataclass(frozen=True)
class Evidence:
    """What a report shows beside result.json."""

    counts: Counts
    protocol: Mapping[str, Any]  # the feature file's: name, hash, and where known rules, counts, excluded, notes
    confusions: Sequence[Confusion]
    surest_errors: Sequence[WrongClip]
    stages: Sequence[str]  # training stages of curves.png; empty: there is no such picture
    analog_bits: int
    integer: Answers | None  # None: the network has no integer form, for the reason `obstacle`
    obstacle: str
    sound: SoundAnswers | None  # None: not run from sound, for the reason `silence`
    silence: str
    hardware: Figures | None  # None: there is no hardware model of the network, for the reason `no_hardware`
    no_hardware: str
    chips: programmed.Study | None  # None: a single chip was scored
    noise: str = ""  # the section on noise
    deltas: str = ""  # the sections of a delta network


def report(result: Mapping[str, Any], evidence: Evidence) -> str:
    """The page as Markdown; `result` is the content of result.json."""
    sections = [
        _headline(result, evidence),
        _protocol(result, evidence.protocol),
        _integer(result, evidence),
        programmed.section(evidence.chips),
        evidence.noise,
        _classes(result),
        _confusions(evidence),
        _training(evidence),
        _layers(evidence),
        evidence.deltas or hardware_section(evidence.hardware, evidence.no_hardware),
        _reproduce(result),
        _files(evidence),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _headline(result: Mapping[str, Any], evidence: Evidence) -> str:
    low, high = result["ci95"]
    frames, width = evidence.counts.input_shape
    correct = sum(entry["correct"] for entry in result["per_class"].values())
    noise = describe_devices(result["deviations"])
    rows: list[Sequence[Any]] = [
        ("accuracy", f"{percent(result['accuracy'], 2)} ({correct:,} of {result['n']:,} clips)"),
        ("95 % interval (Wilson)", f"{percent(low, 2)} to {percent(high, 2)}"),
        ("protocol, split", f"`{result['protocol']['name']}`, {result['split']}"),
        ("parameters", result["parameters"]),
        ("multiply-adds per clip", f"{result['macs']:,} at input {frames} x {width} (frames x values)"),
        ("weights as stored", f"{result['weight_bytes']:,} bytes"),
        ("RAM for tensors of the integer model (C arena; no front end, no stack)", _ram(result["peak_ram_bytes"])),
        ("noise in evaluation", noise),
        *(
            [("energy per decision (model)", f"{evidence.hardware.energy.total_uj:,.3f} µJ")]
            if evidence.hardware
            else []
        ),
        ("seed, chip", f"{result['seed']}, {result['chip']}"),
    ]
    if evidence.integer is not None:
        right = evidence.integer.integer
        text = f"{percent(right.value, 2)} ({right.correct:,} of {right.n:,} clips), without device noise"
        rows.insert(2, ("accuracy of the integer model", text))
    if result["ties"]:
        rows.append(("ties", f"{result['ties']:,} clips with the largest logit in several classes; the first is taken"))
    return f"# {result['recipe']} / {result['tag']}\n\n" + table(("", ""), rows)


def _ram(size: int | None) -> str:
    return "none: there is no C form" if size is None else f"{size:,} bytes"


def _protocol(result: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    lines = [
        "## Protocol",
        "",
        f"`{result['protocol']['name']}`, {len(result['per_class'])} classes, corpus `{result['corpus']}`, "
        f"front end `{result['frontend']}`. SHA-256 over its lists of clips:",
        "",
        f"`{result['protocol']['hash']}`",
    ]
    counts = protocol.get("counts")
    if isinstance(counts, Mapping) and counts and all(isinstance(entry, Mapping) for entry in counts.values()):
        splits = list(counts)
        rows: list[Sequence[Any]] = [
            (name, *(counts[split].get(name, 0) for split in splits)) for name in result["per_class"]
        ]
        rows.append(("all", *(sum(counts[split].values()) for split in splits)))
        lines += ["", "Clips of each split:", "", table(("class", *splits), rows)]
    plain = {key: value for key, value in protocol.items() if key not in _NOT_RULES}
    excluded = protocol.get("excluded")
    for title, entries in (("Rules", {**plain, **(protocol.get("rules") or {})}), ("Clips left out", excluded)):
        if isinstance(entries, Mapping) and entries:
            lines += ["", f"{title}:", "", table(("", ""), flat(entries))]
    notes = protocol.get("notes")
    if isinstance(notes, list) and notes:
        lines += ["", *(f"* {note}" for note in notes)]
    return "\n".join(lines)


def _integer(result: Mapping[str, Any], evidence: Evidence) -> str:
    title = "## Integer model\n\n"
    found = evidence.integer
    if found is None:
        return title + f"This network was not scored in integers: {evidence.obstacle}."
    names = (
        f"integer model, weights at {evidence.analog_bits} bits where they were trained analog",
        "fake-quant network with the same weight codes",
    )
    rows = [(name, *_row(right)) for name, right in zip(names, (found.integer, found.fake_quant), strict=True)]
    noise = result["evaluation_noise"]
    headline = "the accuracy at the top of this page is that of the trained weights" + (
        f" under device noise of {noise:g}, so it is not the one to compare the integer model with" if noise else ""
    )
    peaks = found.peaks
    lines = [
        "Both rows are computed without device noise, on the same clips; " + headline + ".",
        "",
        table(("", "accuracy", "95 % interval (Wilson)", "clips right"), rows),
        "",
        f"Difference: {found.points:+.2f} points. The two give the same answer for {found.same:,} of "
        f"{found.integer.n:,} clips ({percent(found.agreement, 2)}); their logits differ by at most "
        f"{found.largest_difference:.3g}, where one code of a logit stands for {found.logit_step:.3g}. "
        + _explanation(found),
        "",
        f"Peak values: accumulators can reach {peaks.accumulator:,} (`{peaks.accumulator_of}`), which takes "
        f"{peaks.accumulator_bits} of 32 bits; seen were features up to code {peaks.feature:,} of 32,767 "
        f"({peaks.clipped_features:,} saturated) and logits up to code {peaks.logit:,}.",
        "",
        _from_sound(evidence),
    ]
    return title + "\n".join(lines)


def _from_sound(evidence: Evidence) -> str:
    """Accuracy with the fixed-point front end."""
    found = evidence.sound
    if found is None:
        return f"Not run from sound with the fixed-point front end: {evidence.silence}."
    if found.largest is None or found.mean is None:
        return (
            "The network was trained on the features of the fixed-point front end, so the accuracy of the integer model is that "
            "from sound to class in integers; there are no float features to compare it with."
        )
    text = (
        f"From sound to class in integers (fixed-point front end): {percent(found.right.value, 2)} ({found.right.correct:,} of "
        f"{found.right.n:,} clips), {found.points:+.2f} points against float features, the same answer for {found.same:,} clips. "
        f"Features differ by at most {found.largest:,} and by {found.mean:.3f} codes on average; a code is {found.step:g}."
    )
    if abs(found.points) > ALLOWED_SOUND_POINTS:
        text += f" The difference is more than {ALLOWED_SOUND_POINTS:g} points; one clip is {100 / found.right.n:.2f} points here."
    return text


def _row(right: Accuracy) -> tuple[str | None, str, str]:
    low, high = right.ci95
    interval = f"{100 * low:.2f}-{100 * high:.2f} %"
    return percent(right.value, 2), interval, f"{right.correct:,} of {right.n:,}"


def _explanation(found: Answers) -> str:
    """Where other answers come from, and what a large difference is made of."""
    others = found.integer.n - found.same
    text = (
        f"Of the {others:,} other answers {found.float32:,} are rounding errors of float32: computed in float64 from the "
        "same feature codes, the fake-quant network answers as the integer model does. "
        if others and found.float32 is not None
        else ""
    )
    if found.float32 is not None and others > found.float32:
        text += (
            f"For {others - found.float32:,} the integer model itself rounds otherwise: features have 16 bits in it, and "
            "their post-processing and wide tables are integers, too. "
        )
    if abs(found.points) > ALLOWED_POINTS:
        text += (
            f"The difference is more than {ALLOWED_POINTS:g} points: {found.gained:,} clips are right in integers alone, "
            f"{found.lost:,} in the fake-quant network alone, and one clip is {100 / found.integer.n:.2f} points here."
        )
    return text.strip()


def _classes(result: Mapping[str, Any]) -> str:
    rows = []
    for name, entry in result["per_class"].items():
        bounds = entry["recall_ci95"]
        interval = None if bounds is None else f"{100 * bounds[0]:.1f}-{100 * bounds[1]:.1f} %"
        shares = (percent(entry[key]) for key in ("precision", "recall", "f1"))
        rows.append((name, entry["n"], entry["correct"], *shares, interval))
    header = ("class", "clips", "right", "precision", "recall", "F1", "95 % interval of recall")
    return "## Classes\n\n" + table(header, rows)


def _confusions(evidence: Evidence) -> str:
    lines = ["## Confusions", "", "![confusion matrix](confusion.png)"]
    if not evidence.confusions:
        return "\n".join([*lines, "", "Every answer is right."])
    lines += ["", "Most frequent wrong answers:", ""]
    for pair in evidence.confusions:
        share = percent(pair.count / pair.n)
        lines.append(f"* {pair.true!r} was heard as {pair.heard!r} in {pair.count:,} of {pair.n:,} clips ({share}).")
    lines += ["", "Wrong answers of which the network was surest (all clips are in scores.csv):", ""]
    rows = [(clip.utt_id, clip.position, clip.true, clip.heard, f"{clip.score:.3f}") for clip in evidence.surest_errors]
    lines.append(table(("clip", "position", "true class", "answer", "score"), rows))
    return "\n".join(lines)


def _training(evidence: Evidence) -> str:
    if not evidence.stages:
        return "## Training\n\nNo metrics.csv of this checkpoint's training was at hand, so there are no curves."
    names = " and ".join(evidence.stages)
    text = f"Error and loss of {names}; the dotted line marks the weights that were kept."
    return f"## Training\n\n{text}\n\n![curves](curves.png)"


def _layers(evidence: Evidence) -> str:
    counts = evidence.counts
    frames, width = counts.input_shape
    rows: list[Sequence[Any]] = [(row["name"], row["parameters"], row["macs"]) for row in counts.layers]
    rows.append(("all", counts.parameters, counts.macs))
    lines = [
        "## Layers",
        "",
        table(("layer", "parameters", "multiply-adds per clip"), rows),
        "",
        f"Counted for one clip of {frames} x {width} (frames x values) after feature post-processing. A multiply-add "
        "is 1; activations, normalisation, biases, the front end and post-processing are not counted. A parameter "
        "counts once. Bytes are those of the packed weights and biases with their scales; weights that were trained "
        f"without quantisation are stored at {evidence.analog_bits} bits.",
        "",
        _thop(counts),
    ]
    return "\n".join(lines)


def _thop(counts: Counts) -> str:
    check = counts.thop
    if check.macs is None:
        return f"Cross-check with thop: {check.note}."
    text = (
        f"Cross-check with thop, which saw {check.note}: {check.macs:,} in all, of which {check.extra:,} are "
        f"element-wise operations and biases that we do not count; {check.compared:,} "
        f"remain, against {counts.macs:,} of ours. "
    )
    if check.skipped:
        return text + f"thop does not support {'; '.join(check.skipped)}, so the figures cannot be compared."
    text += "Both agree." if counts.thop_agrees else "They differ."
    return text + f" thop saw {check.parameters:,} of the {counts.parameters:,} parameters."


def _reproduce(result: Mapping[str, Any]) -> str:
    dirty = {True: " with local changes", False: "", None: ""}[result["git_dirty"]]
    seconds = result["train_seconds"]
    rows = [
        ("checkpoint, SHA-256", f"`{result['checkpoint_sha256']}`"),
        ("configuration, SHA-256", f"`{result['config_hash']}`"),
        ("git commit", f"`{result['git_commit']}`{dirty}" if result["git_commit"] else "unknown (not a git checkout)"),
        ("torch, device", f"{result['torch']}, {result['device']}"),
        ("batch size of evaluation", result["batch_size"]),
        ("seconds of training", None if seconds is None else f"{seconds:,.1f}"),
    ]
    return f"## How to reproduce\n\n```\n{result['command']}\n```\n\n" + table(("", ""), rows)


def _files(evidence: Evidence) -> str:
    lines = [
        "## Files",
        "",
        "* result.json: the figures of this page, for programs",
        "* scores.csv: a line per clip with its true class, the answer and the softmax score of every class",
        *(["* sparsity.csv: a line per clip with its shares of zero deltas and its cycles"] if evidence.deltas else []),
        "* confusion.png"
        + (", curves.png" if evidence.stages else "")
        + (", chips.png" if evidence.chips else "")
        + (", sparsity.png, deltas.png" if evidence.deltas else ""),
    ]
    return "\n".join(lines)

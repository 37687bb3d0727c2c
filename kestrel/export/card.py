"""card.md: what an exported network is, what it was measured on, and how to run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kestrel.export.form import Part
from kestrel.hw.markdown import section as hardware_section
from kestrel.hw.result import Figures
from kestrel.models.evaluate import Accuracy
from kestrel.store.markdown import flat, percent, table


@dataclass(frozen=True)
class Subject:
    """The network that is exported, for the card."""

    identity: Mapping[str, Any]
    protocol: Mapping[str, str]  # name and hash of the clips that accuracies were measured on
    split: str
    provenance: Mapping[str, Any]
    input_shape: tuple[int, ...]  # of a feature file: frames, values
    network_shape: tuple[int, ...]  # after feature post-processing
    layers: Sequence[Mapping[str, Any]]
    parameters: int
    macs: int
    hardware: Figures | None  # None: there is no hardware model of the network, for the reason `no_hardware`
    no_hardware: str


# What an export does not hold yet, in the words of the card, beside what its parts name themselves.
NOT_INCLUDED = ("Sound as the input of the ONNX models: they take the features of the front end named above.",)


def card(
    subject: Subject,
    accuracies: Mapping[str, Accuracy],
    parts: Sequence[Part],
    files: Mapping[str, tuple[int, str]],
) -> str:
    """The card as Markdown.

    `accuracies` by what computed them, the exported form first; `files` maps each file to its bytes and SHA-256.
    """
    sections = [
        _headline(subject, accuracies, parts),
        _interface(subject),
        *(f"## {part.title}\n\n{part.text}" for part in parts),
        _layers(subject),
        hardware_section(subject.hardware, subject.no_hardware),
        _files(parts, files),
        "## Not included\n\n" + "\n".join(f"* {line}" for line in _missing(parts)),
        _origin(subject),
    ]
    return "\n\n".join(sections) + "\n"


def _missing(parts: Sequence[Part]) -> list[str]:
    return [*(line for part in parts for line in part.missing), *NOT_INCLUDED]


def _headline(subject: Subject, accuracies: Mapping[str, Accuracy], parts: Sequence[Part]) -> str:
    rows = []
    for name, right in accuracies.items():
        low, high = right.ci95
        rows.append(
            (name, percent(right.value, 2), f"{100 * low:.2f}-{100 * high:.2f} %", f"{right.correct:,} of {right.n:,}")
        )
    facts: list[Sequence[Any]] = [("parameters", subject.parameters), ("multiply-adds per clip", subject.macs)]
    if subject.hardware is not None:
        facts.append(("energy per decision (model)", f"{subject.hardware.energy.total_uj:,.3f} µJ"))
    facts += [fact for part in parts for fact in part.facts.items()]
    return "\n".join(
        [
            f"# {subject.identity['recipe']} / {subject.identity['tag']}",
            "",
            f"Keyword spotter for {len(subject.identity['classes'])} classes. Accuracy on the {subject.split} clips of "
            f"protocol `{subject.protocol['name']}` (SHA-256 of its lists of clips: `{subject.protocol['hash']}`):",
            "",
            table(("computed by", "accuracy", "95 % interval (Wilson)", "clips right"), rows),
            "",
            table(("", ""), facts),
        ]
    )


def _interface(subject: Subject) -> str:
    frames, width = subject.input_shape
    frontend, feature = subject.identity.get("frontend"), subject.identity.get("feature") or {}
    post = feature.get("post", subject.identity.get("post")) or []
    lines = [
        "## Input and output",
        "",
        f"Input: features, float32 [clips, {frames}, {width}] (frames x values). Output: logits, float32 [clips, "
        f"{len(subject.identity['classes'])}]; the largest is the answer. Classes in their order:",
        "",
        "`" + " ".join(subject.identity["classes"]) + "`",
        "",
        "Feature post-processing, part of the network: " + ("; ".join(_step(step) for step in post) or "none") + ".",
    ]
    if isinstance(frontend, Mapping):
        lines += [
            "",
            "Front end, which makes the features from audio:",
            "",
            table(("setting", "value"), flat(frontend)),
        ]
    else:
        lines += ["", f"Front end: {frontend or 'not known, the features were given as files'}."]
    return "\n".join(lines)


def _step(step: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in step.items()) if isinstance(step, Mapping) else str(step)


def _layers(subject: Subject) -> str:
    frames, width = subject.network_shape
    rows: list[Sequence[Any]] = [(row["name"], row["parameters"], row["macs"]) for row in subject.layers]
    rows.append(("all", subject.parameters, subject.macs))
    return "\n".join(
        [
            "## Layers",
            "",
            table(("layer", "parameters", "multiply-adds per clip"), rows),
            "",
            f"For one clip of {frames} x {width} (frames x values) after post-processing. A multiply-add is 1; "
            "activations, normalisation, biases, front end and post-processing are not counted.",
        ]
    )


def _files(parts: Sequence[Part], files: Mapping[str, tuple[int, str]]) -> str:
    about = {"export.json": "the figures of this card, for programs"}
    about |= {name: text for part in parts for name, text in part.files.items()}
    rows = [(name, size, f"`{digest}`", about.get(name, "")) for name, (size, digest) in files.items()]
    return "## Files\n\n" + table(("file", "bytes", "SHA-256", "content"), rows)


def _origin(subject: Subject) -> str:
    dirty = {True: " with local changes", False: "", None: ""}[subject.provenance.get("git_dirty")]
    commit = subject.provenance.get("git_commit")
    rows = [
        ("checkpoint, SHA-256", f"`{subject.provenance.get('checkpoint_sha256')}`"),
        ("configuration, SHA-256", f"`{subject.identity.get('config_hash')}`"),
        ("git commit", f"`{commit}`{dirty}" if commit else "unknown (not a git checkout)"),
        ("torch", subject.provenance.get("torch")),
    ]
    command = subject.provenance.get("command")
    return f"## Origin\n\n```\n{command}\n```\n\n" + table(("", ""), rows)

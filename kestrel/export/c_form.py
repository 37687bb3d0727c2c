"""The C program of a spotter: c/, proven to answer as the integer model, bit by bit, on every clip."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kestrel.errors import KestrelError
from kestrel.export.c_check import BATCH, Array, Batch, Checked, Programs, Toolchain, extremes, feature_batches
from kestrel.export.c_device import BOARD_BYTES, Build, Emulated, Image, check_limits, measured_devices
from kestrel.export.c_files import files, write_c
from kestrel.export.c_frontend import WavInput, wav_input
from kestrel.export.c_model import CModel, generate
from kestrel.export.c_sound import Sound, SoundModel, check_clips, prove_extremes, prove_sound, sound_extremes
from kestrel.export.form import Part, Work
from kestrel.export.spec import ExportSpec
from kestrel.frontend.fixed import FixedFrontend
from kestrel.frontend.spec import FrontendSpec
from kestrel.lower.graph import IntegerGraph, input_codes
from kestrel.lower.spotter import FEATURES
from kestrel.models.evaluate import Accuracy
from kestrel.settings import build
from kestrel.store.markdown import percent, table

TITLE = "C program"
FOLDER = "c"
FROM_SOUND = "integer model behind the fixed-point front end (c/), from sound"
EMULATED_CLIPS = 2  # of the split, and as many extreme inputs


@dataclass(frozen=True)
class _Proof:
    """All that was compared and measured of a C model."""

    model: CModel
    checked: Checked
    images: Sequence[Image]
    unmeasured: str  # why there are no images
    emulated: Sequence[Emulated]
    sound_extremes: int
    sound: Sound | None


def c_form(work: Work, folder: Path) -> Part:
    """c/ with source, runtime and Makefile.

    Raises KestrelError where it differs from the integer model, exceeds the limits of the settings, or there is no compiler.
    """
    if work.graph is None or work.integer is None:
        refuse_limits(work.settings, f"the network has no C form: {work.obstacle}")
        text = f"Left out: {work.obstacle}."
        return Part(TITLE, text, missing=(f"C program: {work.obstacle}.",))
    wav, obstacle = _wav(work, work.graph)
    proof = _prove(work, work.graph, work.integer.logits, wav)
    write_c(proof.model, folder / FOLDER)
    missing = () if wav else (f"Sound as the input of the C program: {obstacle}.",)
    accuracies: dict[str, Accuracy] = {} if proof.sound is None else {FROM_SOUND: proof.sound.right}
    return Part(
        TITLE,
        _text(proof),
        {f"{FOLDER}/{name}": what for name, what in files(proof.model).items()},
        accuracies,
        {"c": _figures(proof)},
        _facts(proof),
        missing,
    )


def refuse_limits(settings: ExportSpec, reason: str) -> None:
    """Raise KestrelError where a limit is set that cannot be checked, for the given reason."""
    for name in ("flash_limit", "ram_limit"):
        if getattr(settings, name) is not None:
            raise KestrelError(f"export.{name} is set, but {reason}; --set export.{name}=null exports without it")


def _wav(work: Work, graph: IntegerGraph) -> tuple[WavInput | None, str]:
    samples = work.data.protocol.get("clip_samples")
    if not samples:
        return None, "the features do not say how many samples a clip has"
    try:
        return wav_input(work.data.frontend, int(samples), graph.tensors[FEATURES]), ""
    except KestrelError as error:
        return None, str(error)


# --------------------------------------------------------------------------------------------------------------- proof


def _prove(work: Work, graph: IntegerGraph, answers: Array, wav: WavInput | None) -> _Proof:
    toolchain = Toolchain.host()
    model = generate(graph, work.data.classes, wav)
    sound_model, sound, wild = None, None, 0
    if wav is not None:
        if work.audio is not None:
            check_clips(work.audio, work.data, wav.clip_samples)
        front_end = FixedFrontend(build(FrontendSpec, dict(work.data.frontend)))
        sound_model = SoundModel(front_end, graph, wav)
    with ExitStack() as stack:
        builds = [stack.enter_context(Build(model, device)) for device in measured_devices(toolchain)]
        images, unmeasured = _measure(builds, graph, work.settings)
        emulated = _emulate(work, builds, graph, sound_model, images)
    total, advance = len(answers), work.next_pass()
    with Programs(model, graph, toolchain) as programs:
        counts = {"extremes": 0, "clips": 0}
        for kind, batches in (
            ("extremes", feature_batches(graph, [extremes(graph)])),
            ("clips", _known(work, graph, answers)),
        ):
            for batch in programs.prove(batches):
                counts[kind] += len(batch.given)
                advance(counts["clips"], total)
        if sound_model is not None and wav is not None:
            wild = prove_extremes(programs, sound_model, wav.clip_samples)
        if work.audio is not None:
            advance = work.next_pass()
            if sound_model is not None:
                sound = prove_sound(
                    programs, sound_model, graph, work.audio, work.data, answers, lambda done: advance(done, total)
                )
            advance(total, total)
    return _Proof(model, Checked(**counts, compiler=toolchain.version()), images, unmeasured, emulated, wild, sound)


def _known(work: Work, graph: IntegerGraph, answers: Array) -> Iterator[Batch]:
    """Every clip of the split with the answers that the integer model gave."""
    for start in range(0, len(answers), BATCH):
        codes = _codes(work, graph, np.arange(start, min(start + BATCH, len(answers))))
        yield Batch(codes, codes, answers[start : start + BATCH])


def _codes(work: Work, graph: IntegerGraph, rows: Array) -> Array:
    return input_codes(work.data.rows(rows), graph.tensors[FEATURES])


def _measure(builds: Sequence[Build], graph: IntegerGraph, settings: ExportSpec) -> tuple[list[Image], str]:
    """Images for every device with a compiler; the first one has to keep the limits."""
    try:
        images = [build.measure(2 * graph.tensors[FEATURES].size) for build in builds]
    except KestrelError as error:
        if builds[0].device.folder is not None:
            raise
        refuse_limits(settings, str(error))  # a compiler of this computer that is not gcc
        return [], str(error)
    check_limits(images[0], settings)
    return images, ""


def _emulate(
    work: Work, builds: Sequence[Build], graph: IntegerGraph, sound: SoundModel | None, images: Iterable[Image]
) -> list[Emulated]:
    """A sample of clips on every device that is emulated here, from sound where there is a front end."""
    sizes = {image.device: image.flash_bytes for image in images}
    able = [build for build in builds if build.device.runs]
    rows = np.arange(min(EMULATED_CLIPS, work.data.shape[0]))
    if not able:
        return []
    if sound is None:
        given = np.concatenate([_codes(work, graph, rows), extremes(graph)[-EMULATED_CLIPS:]])
        (batch,) = feature_batches(graph, [given])
    else:
        batch = sound.batch(sound_extremes(sound.samples)[-EMULATED_CLIPS:])
        if work.audio is not None:
            batch = sound.batch(np.concatenate([work.audio.rows(rows), batch.given]))
    return [
        build.run(batch.given, batch.logits, sound=batch.sound)
        for build in able
        if sizes[build.device.name] + 2 * batch.given.size <= BOARD_BYTES
    ]


# ---------------------------------------------------------------------------------------------------------------- card


def _figures(proof: _Proof) -> dict[str, object]:
    model, checked = proof.model, proof.checked
    sound = None
    if model.wav is not None:
        sound = {"bit_identical_extreme_inputs": proof.sound_extremes} | (proof.sound.figures() if proof.sound else {})
    return {
        "bit_identical_clips": checked.clips,
        "bit_identical_extreme_inputs": checked.extremes,
        "sanitised_inputs": checked.clips + checked.extremes,
        "peak_ram_bytes": model.plan.size,
        "constant_bytes": dict(model.sections),
        "images": [
            {"device": image.device, "compiler": image.compiler, "flash_bytes": image.flash_bytes,
             "ram_bytes": image.ram_bytes, "flash": dict(image.flash), "ram": dict(image.ram)}
            for image in proof.images
        ],
        "emulated": [vars(run) for run in proof.emulated],
        "streaming": model.streaming,
        "wav": model.wav is not None,
        "sound": sound,
    }  # fmt: skip


def _facts(proof: _Proof) -> dict[str, str]:
    text = f"bit-identical on {proof.checked.clips:,} clips, "
    if proof.images:
        image = proof.images[0]
        text += f"{image.flash_bytes:,} bytes of flash and {image.ram_bytes:,} of RAM on {image.device}"
    else:
        text += f"{proof.model.plan.size:,} bytes of RAM for tensors"
    found = {"C program": text}
    if proof.sound is not None:
        points = "" if proof.sound.trained else f", {proof.sound.points:+.2f} points against float features"
        found["sound to class"] = f"{percent(proof.sound.right.value, 2)} with the fixed-point front end{points}"
    return found


def _text(proof: _Proof) -> str:
    model, checked = proof.model, proof.checked
    sound, frames = "", ""
    if model.wav:
        sound = f" or a wav file (16 bits, mono, up to {model.wav.clip_samples:,} samples)"
    if model.streaming:
        frames = " `kestrel_model_init`, `kestrel_model_push_frame` and `kestrel_model_finish` take the features frame by frame."
    parts = [
        f"`make -C c` builds the program `c/model`, which takes a file of int16 features{sound} and prints class and "
        f"logits. `kestrel_model_run` of c/model.h is the network: C99, no heap, no floating point.{frames}",
        f"Its logits are bit-identical with those of the integer model on {checked.clips:,} clips and {checked.extremes} "
        "extreme and random inputs, all of them with and without address and undefined-behaviour sanitizers, by the kernels for "
        f"this computer and by the portable ones ({checked.compiler}, -Wall -Wextra -Werror).",
        _sound_text(proof),
        _emulated_text(proof),
        _image_text(proof),
    ]
    return "\n\n".join(part for part in parts if part)


def _sound_text(proof: _Proof) -> str:
    if proof.model.wav is None:
        return ""
    same = (
        "features and logits of the C program are bit-identical with those of the integer front end and model in Python"
    )
    wild = f"{proof.sound_extremes} extreme and random clips, sanitizers included"
    found = proof.sound
    if found is None:
        return (
            f"From sound, {same} on {wild}. No audio of the split was given, so its clips were not compared as sound."
        )
    start = f"From sound, {same} on {found.clips:,} clips and on {wild}. "
    if found.trained:
        return (
            start
            + "The network was trained on the features of this front end, so there are no float features beside them."
        )
    return (
        f"{start}Codes of the fixed-point front end differ from those of the "
        f"float features by at most {found.largest:,} and by {found.mean:.3g} on average (one code stands for {found.step:.6g}). "
        f"With it {percent(found.right.value, 2)} of the clips are right ({found.right.correct:,} of {found.right.n:,}), "
        f"{found.points:+.2f} points against the integer model with float features; {found.others:,} clips get another answer."
    )


def _emulated_text(proof: _Proof) -> str:
    if not proof.emulated:
        return "No emulated microcontroller was at hand, so the program was run on this computer alone."
    kind = "front end and model together" if proof.model.wav else "model"
    rows = [(run.device, run.clips, run.instructions, run.stack) for run in proof.emulated]
    head = ("emulated by QEMU", "clips with equal bits", "instructions of an inference", "bytes of stack seen in use")
    return f"On emulated microcontrollers, {kind} (gcc -O2):\n\n" + table(head, rows)


def _image_text(proof: _Proof) -> str:
    if not proof.images:
        return f"Flash and stack were not measured: {proof.unmeasured}."
    rows: list[tuple[object, ...]] = []
    for kind, total in (("flash", "flash_bytes"), ("ram", "ram_bytes")):
        held = [getattr(image, kind) for image in proof.images]
        for name in dict.fromkeys(name for sizes in held for name in sizes):
            rows.append((f"{kind}: {name}", *(sizes.get(name, 0) for sizes in held)))
        rows.append((f"{kind}, all", *(getattr(image, total) for image in proof.images)))
    states = proof.model.plan.bytes_of(proof.model.plan.states)
    kept = f" Of the arena {states:,} bytes are states, which live from frame to frame." if states else ""
    return (
        "Bytes of the linked program without an application (gcc -O2, unused code left out): "
        + "; ".join(dict.fromkeys(image.compiler for image in proof.images))
        + ". The stack is a bound over all paths of calls, from what gcc states for each function (-fcallgraph-info=su); "
        f"library routines are not in it.{kept}\n\n"
        + table(("section", *(image.device for image in proof.images)), rows)
    )

"""The program for a microcontroller of 2 KB RAM without a multiplier: mcu/, proven from samples to logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kestrel.errors import KestrelError
from kestrel.export.c_check import Toolchain
from kestrel.export.c_sound import check_clips, sound_extremes
from kestrel.export.form import Part, Work
from kestrel.export.mcu_build import (
    CLOCK,
    CYCLES_PER_INSTRUCTION,
    FILES,
    FLASH,
    RAM,
    Chip,
    McuBuild,
    Ran,
    have_compiler,
    have_emulator,
    write_mcu,
)
from kestrel.export.stream_c import StreamModel, choose_straight, stream_model
from kestrel.frontend.filters import frame_count
from kestrel.frontend.shift_add import ShiftAddFeatures
from kestrel.frontend.spec import FrontendSpec
from kestrel.lower.graph import IntegerGraph
from kestrel.lower.narrow import narrow_form
from kestrel.lower.spotter import FEATURES, LOGITS
from kestrel.lower.stream import stream_program
from kestrel.lower.stream_steps import Pool
from kestrel.models.evaluate import Accuracy, accuracy
from kestrel.settings import build
from kestrel.store.markdown import percent, table

Array = np.ndarray
TITLE = "Microcontroller program"
FOLDER = "mcu"
NARROW = "narrow integer model behind the shift-add front end (mcu/)"
EMULATED_CLIPS, TIMED_CLIPS = 8, 2
BATCH = 128
SPARE_FLASH = 128  # bytes that straight-line code leaves
NO_KEYWORDS = ("silence", "unknown", "_silence_", "_unknown_")


@dataclass(frozen=True)
class _Proof:
    """All that was compared and measured."""

    model: StreamModel
    right: Accuracy
    changed: int  # clips with another answer than the integer model
    clips: int  # of the split with equal bits, from sound; 0 without audio
    extremes: int
    chip: Chip | None
    ran: Ran | None
    timed: Ran | None
    emulated: int
    frames: int  # of the timed clips together
    seconds: float  # of a hop


def mcu_form(work: Work, folder: Path) -> Part | None:
    """mcu/ with source, linker scripts and Makefile; None where features are not those of the shift-add front end.

    Raises KestrelError where an answer differs from the narrow integer model in Python, or the image does not fit the chip.
    """
    settings = dict(work.data.frontend or {})  # of features made elsewhere it may hold anything
    if settings.get("arithmetic") != "shift-add" or work.graph is None:
        return None
    spec = build(FrontendSpec, settings)
    front_end = ShiftAddFeatures(spec)
    samples = int(work.data.protocol.get("clip_samples") or spec.sample_rate)
    keywords = sum(1 << place for place, name in enumerate(work.data.classes) if name not in NO_KEYWORDS)
    try:
        narrow = narrow_form(work.graph)
        model = _fitted(narrow, front_end, samples, work)
    except KestrelError as error:
        return Part(TITLE, f"Left out: {error}.", missing=(f"Microcontroller program: {error}.",))
    with McuBuild(model, front_end.tables, samples, keywords) as program:
        proof = _prove(work, program, narrow, front_end)
        stack = proof.chip.stack if proof.chip else 184
    write_mcu(model, front_end.tables, keywords, stack, folder / FOLDER)
    return Part(
        TITLE,
        _text(proof),
        {f"{FOLDER}/{name}": what for name, what in FILES.items()},
        {NARROW: proof.right},
        {"mcu": _figures(proof)},
        _facts(proof),
    )


# --------------------------------------------------------------------------------------------------------------- proof


def _fitted(narrow: IntegerGraph, front_end: ShiftAddFeatures, samples: int, work: Work) -> StreamModel:
    """The model with the most segments that RAM has room for, and straight-line code where flash has.

    Raises KestrelError where it cannot run column by column, or does not fit whatever is chosen.
    """
    wanted = work.settings.mcu_segments
    program = stream_program(narrow, wanted)
    model = stream_model(program, work.data.classes)
    if not have_compiler():
        return model
    (pool,) = (step for step in program.steps if isinstance(step, Pool))
    fewer = [n for n in range(pool.segments - 1, 0, -1) if pool.segments * pool.columns % n == 0]
    for segments in [] if wanted else fewer:
        try:
            return _with_straight_code(model, front_end, samples, work)
        except KestrelError:
            model = stream_model(stream_program(narrow, segments), work.data.classes)
    return _with_straight_code(model, front_end, samples, work)


def _with_straight_code(model: StreamModel, front_end: ShiftAddFeatures, samples: int, work: Work) -> StreamModel:
    """Straight-line code for as many products as flash has room for (or as `export.mcu_straight` says)."""
    program, budget = model.program, work.settings.mcu_straight
    with McuBuild(model, front_end.tables, samples) as plain:
        room = FLASH - plain.chip().flash_bytes - SPARE_FLASH
    if budget is not None:
        return stream_model(program, work.data.classes, choose_straight(program, budget))
    while room > 0 and (chosen := choose_straight(program, room)):
        found = stream_model(program, work.data.classes, chosen)
        with McuBuild(found, front_end.tables, samples) as trial:
            try:
                trial.chip()
                return found
            except KestrelError:  # the estimate was too low, or its sums take too much stack
                room = room * 3 // 4
    return model


def _prove(work: Work, program: McuBuild, narrow: IntegerGraph, front_end: ShiftAddFeatures) -> _Proof:
    assert work.integer is not None and work.graph is not None
    toolchain = Toolchain.host()
    data, total = work.data, work.data.shape[0]
    step = narrow.tensors[FEATURES].scale or 1.0
    found = np.zeros_like(work.integer.logits)
    for start in range(0, total, BATCH):
        rows = np.arange(start, min(start + BATCH, total))
        codes = np.rint(np.asarray(data.rows(rows), np.float64) / step).astype(np.int64)
        found[rows] = narrow.run(codes)[LOGITS]
    wild = sound_extremes(program.clip_samples)
    plain, checked = program.host(toolchain, sanitize=False), program.host(toolchain, sanitize=True)
    expected = _python(narrow, front_end, wild)
    for host in (plain, checked):
        _same(program.run_host(host, wild), expected, "on this computer, extreme clip")
    clips = 0
    if work.audio is not None:
        check_clips(work.audio, data, program.clip_samples)
        for start in range(0, total, BATCH):
            rows = np.arange(start, min(start + BATCH, total))
            _same(program.run_host(plain, work.audio.rows(rows)), found[rows], "on this computer, clip", start)
            clips += len(rows)
    chip = program.chip() if have_compiler() else None
    ran, timed, given = None, None, wild[-2:]
    if have_emulator():
        if work.audio is not None:
            given = np.concatenate([work.audio.rows(np.arange(min(EMULATED_CLIPS, total))), given])
        ran = program.run(given, count=False)
        _same(ran.logits, _python(narrow, front_end, given), "on the emulated chip, clip")
        timed = program.run(given[:TIMED_CLIPS], timing=True)
    frames = frame_count(front_end.spec, program.clip_samples)
    changed = int((found.argmax(axis=1) != work.integer.logits.argmax(axis=1)).sum())
    return _Proof(
        program.model,
        accuracy(found, data.labels),
        changed,
        clips,
        len(wild),
        chip,
        ran,
        timed,
        len(given),
        min(TIMED_CLIPS, len(given)) * frames,
        front_end.spec.hop * front_end.spec.decimation / front_end.spec.sample_rate,
    )


def _python(narrow: IntegerGraph, front_end: ShiftAddFeatures, samples: Array) -> Array:
    import torch

    return narrow.run(front_end.codes(torch.from_numpy(np.ascontiguousarray(samples))).numpy())[LOGITS]


def _same(found: Array, expected: Array, where: str, first: int = 0) -> None:
    if found.shape != expected.shape:
        raise KestrelError(f"the microcontroller program gives {found.shape} logits, not {expected.shape}, {where}")
    places = np.argwhere(found != expected)
    if len(places):
        clip, logit = (int(i) for i in places[0])
        raise KestrelError(
            f"the microcontroller program differs from the integer model {where} {first + clip}: logits[{logit}] is "
            f"{found[clip, logit]}, expected {expected[clip, logit]}"
        )


# ---------------------------------------------------------------------------------------------------------------- card


def instructions_per_frame(timed: Ran, frames: int) -> dict[str, float]:
    """Instructions of a frame by part; logits are computed once for a segment."""
    return {name: count / frames for name, count in timed.instructions.items()}


def load(timed: Ran, frames: int, seconds: float) -> float:
    """Share of the chip's time, at CYCLES_PER_INSTRUCTION."""
    return sum(timed.instructions.values()) / frames / seconds * CYCLES_PER_INSTRUCTION / CLOCK


def _figures(proof: _Proof) -> dict[str, object]:
    program = proof.model.program
    found: dict[str, object] = {
        "bit_identical_clips": proof.clips,
        "bit_identical_extreme_inputs": proof.extremes,
        "other_answers": proof.changed,
        "state_bytes": program.state,
        "scratch_bytes": program.scratch,
        "constant_bytes": proof.model.constants,
        "layers": [dataclasses.asdict(layer) for layer in proof.model.layers],
    }
    if proof.chip is not None:
        found |= {
            "compiler": proof.chip.compiler,
            "flash_bytes": proof.chip.flash_bytes,
            "ram_bytes": proof.chip.ram_bytes,
            "stack_bound": proof.chip.stack,
            "flash": dict(proof.chip.flash),
            "ram": dict(proof.chip.ram),
        }
    if proof.ran is not None and proof.timed is not None:
        found |= {
            "emulated_clips": proof.emulated,
            "stack_seen": proof.ran.stack,
            "instructions_per_frame": {
                name: round(count) for name, count in instructions_per_frame(proof.timed, proof.frames).items()
            },
            "load": round(load(proof.timed, proof.frames, proof.seconds), 4),
            "cycles_per_instruction": CYCLES_PER_INSTRUCTION,
        }
    return found


def _facts(proof: _Proof) -> dict[str, str]:
    if proof.chip is None:
        return {}
    text = f"{proof.chip.flash_bytes:,} of {FLASH:,} bytes of flash and {proof.chip.ram_bytes:,} of {RAM:,} of RAM, stack included"
    if proof.timed is not None:
        text += f"; load {percent(load(proof.timed, proof.frames, proof.seconds), 1)} at 48 MHz"
    return {"CH32V003": text}


def _text(proof: _Proof) -> str:
    compared = f"{proof.clips:,} clips of the split and on " if proof.clips else ""
    parts = [
        "Samples, one by one, to logits on a processor without a multiplier (docs/microcontroller.md). `make -C mcu` builds the "
        "image for a CH32V003, `make -C mcu run` runs it under QEMU within the same limits.",
        f"Its logits are bit-identical with those of front end and narrow integer model in Python, from sound, on {compared}"
        f"{proof.extremes} extreme and random clips (the latter with address and undefined-behaviour sanitizers, too). The narrow "
        f"model, whose rescaling fits 32 bits, is right on {percent(proof.right.value, 2)} of the clips; it answers {proof.changed:,} "
        "of them otherwise than the integer model.",
        _image_text(proof.chip),
        _run_text(proof),
        _layers_text(proof.model),
    ]
    return "\n\n".join(part for part in parts if part)


def _image_text(chip: Chip | None) -> str:
    if chip is None:
        return "The image was not linked: gcc-riscv64-unknown-elf is not installed here."
    rows: list[Sequence[object]] = [(f"flash: {name}", size) for name, size in chip.flash.items()]
    rows.append((f"flash, all (of {FLASH:,})", chip.flash_bytes))
    rows += [(f"ram: {name}", size) for name, size in chip.ram.items()]
    rows += [("ram: stack (bound)", chip.stack), (f"ram, all (of {RAM:,})", chip.ram_bytes)]
    return (
        f"Bytes of the image for the chip, drivers included ({chip.compiler}, -Os, RV32EC). The stack is a bound over all paths of "
        "calls of the program and of its interrupt.\n\n" + table(("section", "bytes"), rows)
    )


def _run_text(proof: _Proof) -> str:
    if proof.ran is None or proof.timed is None:
        return "It was not run on an emulated chip: qemu-system-riscv32 or the compiler is not installed here."
    rows = [(name, round(count)) for name, count in instructions_per_frame(proof.timed, proof.frames).items()]
    share = percent(load(proof.timed, proof.frames, proof.seconds), 1)
    return (
        f"On the emulated RV32E, {proof.emulated} clips have equal bits; {proof.ran.stack} bytes of stack were seen in use. Instructions "
        f"of a frame of {1000 * proof.seconds:g} ms:\n\n"
        + table(("part", "instructions"), rows)
        + f"\n\nLoad at 48 MHz with {CYCLES_PER_INSTRUCTION:g} cycles an instruction (an assumption: the pipeline of the chip and its "
        f"flash are not emulated): {share}."
    )


def _layers_text(model: StreamModel) -> str:
    rows = [
        (
            layer.name,
            layer.weights,
            f"{layer.bits:g}",
            "straight-line code" if layer.straight else "tables",
            layer.bytes or "in the code",
        )
        for layer in model.layers
    ]
    return "Products:\n\n" + table(("layer", "weights", "bits", "computed by", "bytes of weights"), rows)

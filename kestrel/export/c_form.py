"""The C program of a spotter: c/, proven to answer as the integer model, bit by bit, on every clip."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kestrel.errors import KestrelError
from kestrel.export.c_check import BATCH, Checked, check
from kestrel.export.c_files import files, write_c
from kestrel.export.c_frontend import WavInput, wav_input
from kestrel.export.c_model import CModel, generate
from kestrel.export.form import Part, Work
from kestrel.lower.graph import input_codes
from kestrel.lower.spotter import FEATURES
from kestrel.store.markdown import table

TITLE = "C program"
FOLDER = "c"


def c_form(work: Work, folder: Path) -> Part:
    """c/ with source, runtime and Makefile. Raises KestrelError where it differs from the integer model, or no compiler."""
    if work.graph is None or work.integer is None:
        text = f"Left out: {work.obstacle}."
        return Part(TITLE, text, missing=(f"C program: {work.obstacle}.",))
    wav, obstacle = _wav(work)
    answers = work.integer.logits
    model = generate(work.graph, work.data.classes, wav)
    known = iter(np.split(answers, range(BATCH, len(answers), BATCH)))
    extremes_done = False
    graph = work.graph

    def expected(codes: np.ndarray) -> np.ndarray:
        nonlocal extremes_done
        if not extremes_done:  # come first, and are not among the clips
            extremes_done = True
            return graph.run(codes)[graph.outputs[0]]
        return next(known)

    advance = work.next_pass()
    checked = check(model, graph, _codes(work), expected=expected, progress=lambda done: advance(done, len(answers)))
    write_c(model, folder / FOLDER)
    names = {f"{FOLDER}/{name}": what for name, what in files(model).items()}
    figures = {
        "c": {
            "bit_identical_clips": checked.clips,
            "bit_identical_extreme_inputs": checked.extremes,
            "sanitised_inputs": checked.sanitised,
            "ram_bytes": model.plan.size,
            "constant_bytes": dict(model.sections),
            "streaming": model.streaming,
            "wav": wav is not None,
        }
    }
    missing = () if wav else (f"Sound as the input of the C program: {obstacle}.",)
    facts = {"C program": f"bit-identical on {checked.clips:,} clips, {model.plan.size:,} bytes of RAM for tensors"}
    return Part(TITLE, _text(model, checked), names, figures=figures, facts=facts, missing=missing)


def _wav(work: Work) -> tuple[WavInput | None, str]:
    assert work.graph is not None
    samples = work.data.protocol.get("clip_samples")
    if not samples:
        return None, "the features do not say how many samples a clip has"
    try:
        return wav_input(work.data.frontend, int(samples), work.graph.tensors[FEATURES]), ""
    except KestrelError as error:
        return None, str(error)


def _codes(work: Work) -> Iterator[np.ndarray]:
    assert work.graph is not None
    tensor, clips = work.graph.tensors[FEATURES], work.data.shape[0]
    for start in range(0, clips, BATCH):
        yield input_codes(work.data.rows(np.arange(start, min(start + BATCH, clips))), tensor)


def _text(model: CModel, checked: Checked) -> str:
    rows = [(f"constants: {name}", size) for name, size in model.sections.items() if size]
    rows.append(("constants, all", model.constants))
    rows.append(("RAM: arena of all tensors", model.plan.size))
    if model.plan.states:
        rows.append(("of these states between two frames", model.plan.bytes_of(model.plan.states)))
    if model.wav:
        rows.append(("front end: tables", model.wav.constants))
        rows.append(("front end: RAM", model.wav.ram))
    sound = ""
    if model.wav:
        sound = f" or a wav file (16 bits, mono, up to {model.wav.clip_samples:,} samples)"
    frames = ""
    if model.streaming:
        frames = " `kestrel_model_init`, `kestrel_model_push_frame` and `kestrel_model_finish` take the features frame by frame."
    return "\n".join(
        [
            f"`make -C c` builds the program `c/model`, which takes a file of int16 features{sound} and prints class and "
            f"logits. `kestrel_model_run` of c/model.h is the network: C99, no heap, no floating point.{frames}",
            "",
            f"Its logits are bit-identical with those of the integer model on {checked.clips:,} clips and {checked.extremes} "
            f"extreme and random inputs; {checked.sanitised:,} of them also ran with address and undefined-behaviour "
            f"sanitizers ({checked.compiler}, -Wall -Wextra -Werror).",
            "",
            table(("section", "bytes"), rows),
        ]
    )

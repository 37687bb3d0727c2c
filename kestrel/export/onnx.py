"""The whole spotter (feature post-processing and network) as ONNX, checked clip by clip against PyTorch."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import torch

from kestrel.errors import KestrelError
from kestrel.export.codes import write_npz
from kestrel.export.form import Part, Work
from kestrel.export.loop import with_loops
from kestrel.models.evaluate import Features, ProgressCallback
from kestrel.models.inventory import noise_off

if TYPE_CHECKING:
    from kestrel.models.spotter import KeywordSpotter

INPUT, OUTPUT = "features", "logits"
OPSET = 17
LARGEST_DISAGREEMENT = 0.005  # share of clips

EXAMPLES = 8  # clips of example.npz
SNIPPET = """\
import numpy, onnxruntime
example = numpy.load("example.npz")
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
logits = session.run(["logits"], {"features": example["features"]})[0]
print("answers:", *example["classes"][logits.argmax(axis=1)])
print("largest difference from PyTorch:", abs(logits - example["logits"]).max())
"""


@dataclass(frozen=True)
class Agreement:
    """onnxruntime against PyTorch on `n` clips: largest difference of a logit, and clips with another answer."""

    n: int
    largest_difference: float
    other_answers: int


def write_onnx(spotter: KeywordSpotter, input_shape: tuple[int, int], path: Path, notes: Mapping[str, Any]) -> None:
    """Write `spotter` for features [clips, *input_shape] in the evaluation phase, without device noise.

    The number of clips is free. `notes` become metadata of the model. The bytes depend on network and notes alone.
    Raises KestrelError where a layer has no ONNX form.
    """
    model = copy.deepcopy(spotter).cpu()
    model.net.set_phase("eval")
    model.eval()
    model.net = with_loops(model.net)
    example = torch.zeros(2, *input_shape)  # two clips, so that no operator mistakes the batch for a broadcast axis
    try:
        with noise_off(model.net), _quiet():
            torch.onnx.export(
                model,
                (example,),
                str(path),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={INPUT: {0: "clips"}, OUTPUT: {0: "clips"}},
                opset_version=OPSET,
                dynamo=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise KestrelError(
            f"this network has no ONNX form ({reason}); --set export.onnx=false leaves it out"
        ) from error
    graph = onnx.load(str(path))
    for node in graph.graph.node:
        node.doc_string = ""
    for key, value in notes.items():
        entry = graph.metadata_props.add()
        entry.key, entry.value = key, json.dumps(value, ensure_ascii=False)
    onnx.checker.check_model(graph, full_check=True)
    path.write_bytes(graph.SerializeToString(deterministic=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tracing exporter, which warns of its age and of each size that it fixes: checks find what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def most_others(clips: int) -> float:
    """How many of `clips` may get another answer, one at least: where a sum lies on a quantiser's edge, rounding decides."""
    return max(1.0, LARGEST_DISAGREEMENT * clips)


def compare(
    path: Path, reference: np.ndarray, data: Features, batch_size: int, progress: ProgressCallback | None = None
) -> Agreement:
    """Run the model at `path` on every clip of `data` and compare with PyTorch's logits `reference` [N, C].

    Raises KestrelError where more than `most_others` of the answers differ.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    difference, others, clips = 0.0, 0, len(reference)
    for start in range(0, clips, batch_size):
        rows = np.arange(start, min(start + batch_size, clips))
        logits = session.run([OUTPUT], {INPUT: data.rows(rows)})[0]
        difference = max(difference, float(np.abs(logits - reference[rows]).max()))
        others += int((logits.argmax(axis=1) != reference[rows].argmax(axis=1)).sum())
        if progress is not None:
            progress(int(rows[-1]) + 1, clips)
    if not np.isfinite(difference) or others > most_others(clips):
        raise KestrelError(
            f"onnxruntime answers {others} of {clips} clips otherwise than PyTorch (largest difference of a logit "
            f"{difference:.3g}); --set export.onnx=false leaves the ONNX model out"
        )
    return Agreement(clips, difference, others)


def onnx_form(work: Work, folder: Path) -> Part:
    """model.onnx and example.npz, with onnxruntime's answers on every clip compared with PyTorch's."""
    if not work.settings.onnx:
        return Part("ONNX", "Left out, since `export.onnx` is false.")
    shape = (work.data.shape[1], work.data.shape[2])
    notes = {"classes": work.data.classes, "protocol": dict(work.protocol)}
    write_onnx(work.spotter, shape, folder / "model.onnx", notes)
    agreement = compare(folder / "model.onnx", work.logits, work.data, work.batch_size, work.next_pass())
    rows = np.arange(min(EXAMPLES, agreement.n))
    example = {"features": work.data.rows(rows), "logits": work.logits[rows], "classes": np.array(work.data.classes)}
    write_npz(folder / "example.npz", example)
    text = (
        f"model.onnx (operator set {OPSET}) is the trained network with float32 weights, post-processing of features "
        f"included, device noise off. Input `{INPUT}`, output `{OUTPUT}`, any number of clips. onnxruntime against "
        f"PyTorch on {agreement.n:,} clips: largest difference of a logit {agreement.largest_difference:.3g}; "
        f"{agreement.other_answers:,} answers differ.\n\nTo run it (in this folder, with numpy and onnxruntime):\n\n"
        f"```python\n{SNIPPET}```"
    )
    files = {
        "model.onnx": "the network, float32",
        "example.npz": f"features and logits of {len(rows)} clips, class names",
    }
    return Part("ONNX", text, files, figures={"onnx": vars(agreement)})

"""Generated C programs end to end: bits, source, memory plan, sound, and what a damaged one says."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graph_kit
import lower_kit
import numpy as np
import proxyless_kit
import pytest
import quant_kit
import torch
from cc_kit import QUICK, needs_compiler
from torch import nn

from kestrel.errors import KestrelError
from kestrel.export.c_check import BATCH, Batch, Programs, Toolchain, check, extremes, logits_of, run_program
from kestrel.export.c_files import write_c
from kestrel.export.c_frontend import wav_input
from kestrel.export.c_model import generate
from kestrel.export.integer import packed
from kestrel.frontend.fixed import FixedFrontend
from kestrel.frontend.post import Post
from kestrel.frontend.spec import FrontendSpec
from kestrel.lower.graph import IntegerGraph, Scan
from kestrel.lower.memory import plan_memory, replaced_states
from kestrel.lower.ops import PRODUCTS, Accumulate, ArgMax, MatMul, Requantise, Reshape
from kestrel.lower.rnn import Thresholds
from kestrel.lower.spotter import lower
from kestrel.lower.tensor import Constant, Tensor, leaves_out_zeros, whole_bits
from kestrel.models.quant_net import LowBitPlan, QuantNet
from kestrel.models.spotter import KeywordSpotter
from kestrel.nn.cbtd import Balance, target_mask
from kestrel.quant.integer import Rescale, rounding_shift
from kestrel.settings import to_dict

GRIDS = ("8bit", "4bitsym", "2bitsym", "ternary", "binary", "fp130", "dorefa8")


def block_lstm(**model: Any) -> IntegerGraph:
    return lower(lower_kit.spotter_of([{"normalise": "channel"}, {"stack": 2}], **model), lower_kit.FEATURE_SCALE)


def net(make: Callable[[], nn.Module], **settings: Any) -> IntegerGraph:
    torch.manual_seed(4)
    return lower_kit.graph_of(lower_kit.settled(make()), **settings)


def pruned(make: Callable[[], nn.Module], **settings: Any) -> IntegerGraph:
    """A net with seven of eight weights zero, as `lower` stores it."""
    torch.manual_seed(4)
    module = make()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand_like(parameter) < 0.125)
    graph = lower_kit.graph_of(lower_kit.settled(module), **settings)
    graph.leave_out_zeros()
    return graph


def trained(grid: str, **settings: Any) -> IntegerGraph:
    """A net trained with few bits, with the codes and scales of its training."""
    torch.manual_seed(4)
    net = quant_kit.trained(quant_kit.LowBitNet(LowBitPlan(grid, **settings)), steps=6)
    return lower(KeywordSpotter(Post([], (lower_kit.FRAMES, lower_kit.WIDTH)), net), lower_kit.FEATURE_SCALE)


def delta(**model: Any) -> IntegerGraph:
    return lower(lower_kit.delta_spotter([{"normalise": "channel"}], **model), lower_kit.FEATURE_SCALE)


def balanced(kind: type[nn.LSTM | nn.GRU], balance: Balance) -> IntegerGraph:
    """A delta network whose columns were pruned as CBTD does it."""
    torch.manual_seed(4)
    module = lower_kit.Recurrent(kind, hidden=32)
    with torch.no_grad():
        for weight in (module.rnn.weight_ih_l0, module.rnn.weight_hh_l0):
            weight.mul_(3 * target_mask(weight, balance))
    graph = lower_kit.graph_of(lower_kit.settled(module), thresholds=Thresholds(0.1, 0.05))
    graph.leave_out_zeros()
    return graph


def proxyless(made: QuantNet) -> IntegerGraph:
    return lower(KeywordSpotter(Post([], (lower_kit.FRAMES, lower_kit.WIDTH)), made), lower_kit.FEATURE_SCALE)


FIXED = {"qa": 1, "qw": 1, "qc": 1, "qcw": 1}
GRAPHS: dict[str, Callable[[], IntegerGraph]] = {
    "blocks": block_lstm,
    "mixed": lambda: net(lower_kit.MixedNet),
    "mixed of 4 bits": lambda: net(lower_kit.MixedNet, weight_bits=4),
    "flat": lambda: net(lower_kit.FlatNet),
    "lstm": lambda: net(lambda: lower_kit.Recurrent(nn.LSTM)),
    "two layers of gru": lambda: net(lambda: lower_kit.Recurrent(nn.GRU, num_layers=2)),
    "delta gru": lambda: net(lambda: lower_kit.Recurrent(nn.GRU), thresholds=Thresholds(0.1, 0.2)),
    "pruned": lambda: pruned(lower_kit.MixedNet),
    "pruned gru of 4 bits": lambda: pruned(
        lambda: lower_kit.Recurrent(nn.GRU), thresholds=Thresholds(0.1, 0.2), weight_bits=4
    ),
    "delta network": lambda: delta(thx=0.3, thh=0.1, rnn_layers=2, fc_extra_size=7),
    "pruned delta lstm network": lambda: delta(
        rnn_type="LSTM", thx=0.3, thh=0.1, cbtd_from="pretrain", gamma_rnn=0.75, num_array_pe=4
    ),
    "fixed delta network": lambda: delta(thx=0.3, thh=0.1, decision="last_speech", **FIXED),
    "dense lstm network rounded down": lambda: delta(rnn_type="LSTM", **dict.fromkeys(FIXED, 2)),
    "hard delta network": lambda: delta(thx=0.3, thh=0.1, use_hardsigmoid=True, use_hardtanh=True),
    "balanced lstm": lambda: balanced(nn.LSTM, Balance(7 / 8, 4)),
    "balanced gru in groups": lambda: balanced(nn.GRU, Balance(5 / 6, 1, 16)),
    "delta lstm of 2 bits": lambda: net(
        lambda: lower_kit.Recurrent(nn.LSTM), thresholds=Thresholds(0.1, 0.05), weight_bits=2
    ),
    **{f"trained {grid}": functools.partial(trained, grid) for grid in GRIDS},
    "found by a search": lambda: proxyless(proxyless_kit.found(4)),
    "published network of a search": lambda: proxyless(proxyless_kit.given(2, net="5")),
    "trained and pruned": lambda: trained("4bitsym", prune=0.7),
}
STREAMING = {"blocks"}  # the others rescale all features first


@needs_compiler
@pytest.mark.parametrize("name", GRAPHS)
def test_c_equals_the_integer_model(name: str) -> None:
    graph = GRAPHS[name]()
    codes = lower_kit.codes_of(graph, lower_kit.features(9, 20))
    checked = check(generate(graph), graph, [codes], toolchain=QUICK)
    assert (checked.clips, checked.extremes) == (20, len(extremes(graph)))
    assert len(np.unique(graph.run(codes)[graph.outputs[0]])) > 10  # there is something to compare


@pytest.mark.parametrize("name", GRAPHS)
def test_source_is_reproducible_and_names_every_op(name: str) -> None:
    first, second = generate(GRAPHS[name](), ("a", "b")), generate(GRAPHS[name](), ("a", "b"))
    assert (first.source, first.header) == (second.source, second.header)
    for op, _ in GRAPHS[name]().all_ops():
        if not isinstance(op, (Scan, ArgMax, Reshape)):
            assert f" = {type(op).__name__}({', '.join(op.inputs)})" in first.source
    assert not re.search(r"float|double|malloc|/tmp|20[2-9][0-9]-", first.source)


GENERATED = [*GRAPHS.values(), *(lambda seed=seed: graph_kit.random_graph(seed) for seed in range(4))]


@pytest.mark.parametrize("number", range(len(GENERATED)))
def test_live_tensors_never_share_memory(number: int) -> None:
    graph = GENERATED[number]()
    plan = plan_memory(graph)
    owner = np.full(plan.size, -1)
    reads = lifetimes(graph)
    places = {name: place for name, place in plan.places.items() if place.buffer is not None}
    for moment in range(max(end for _, end in reads.values()) + 1):
        owner[:] = -1
        for number, (name, place) in enumerate(places.items()):
            begin, end = reads.get(root(graph, name), (0, -1))
            if place.step is None and begin <= moment <= end and root(graph, name) == name:
                size = tensor_of(graph, name).bytes
                taken = owner[place.offset : place.offset + size]
                others = {int(n) for n in np.unique(taken)} - {-1}
                shared = [n for n in others if not same_place(graph, name, list(places)[n])]
                assert not shared, f"{name} lies over {[list(places)[n] for n in shared]} at {moment}"
                owner[place.offset : place.offset + size] = number
                assert place.offset % 4 == 0 and place.offset + size <= plan.size
    lower_bound = max(
        sum(b.size for b in plan.buffers if b.start <= t <= b.end) for t in {b.start for b in plan.buffers}
    )
    assert lower_bound <= plan.size <= 1.5 * lower_bound + 64


def tensor_of(graph: IntegerGraph, name: str) -> Tensor:
    return next(tensor for other, tensor, _ in graph.all_tensors() if other == name)


def root(graph: IntegerGraph, name: str) -> str:
    """The tensor whose bytes `name` shows, from reshapes and slices alone (slices that lie in one piece)."""
    makers = {made: op for op, _ in graph.all_ops() for made in op.outputs}
    while name in makers:
        op = makers[name]
        shape = tensor_of(graph, op.inputs[0]).shape if op.inputs else ()
        whole = isinstance(op, Reshape) or (type(op).__name__ == "Slice" and int(np.prod(shape[: op.axis])) == 1)
        if isinstance(op, Scan) and name in op.outputs[len(op.emitted) :]:
            name = op.last[op.outputs.index(name) - len(op.emitted)]
            continue
        if not whole:
            return name
        name = op.inputs[0]
    return name


def lifetimes(graph: IntegerGraph) -> dict[str, tuple[int, int]]:
    """First and last moment at which a tensor's bytes are needed, by brute force, apart from the plan."""
    spans: dict[str, list[int]] = {}
    now = 0

    def touch(name: str) -> None:
        span = spans.setdefault(root(graph, name), [now, now])
        span[0], span[1] = min(span[0], now), max(span[1], now)

    for op in graph.ops:
        now += 1
        if set(op.outputs) & set(graph.outputs[1:]):
            continue
        for name in op.inputs:
            touch(name)
        if isinstance(op, Scan):
            begin = now
            for inner in op.body.ops:
                now += 1
                for name in (*inner.inputs, *inner.outputs):
                    touch(name)
            now += 1
            for name in (*op.emitted, *(state.next for state in op.states)):
                touch(name)
            held = [*op.inputs, *op.outputs, *(state.name for state in op.states)]
            for name in held:
                touch(name)
                spans[root(graph, name)][0] = min(spans[root(graph, name)][0], begin)
            continue
        for name in op.outputs:
            touch(name)
    now += 1
    touch(graph.outputs[0])
    return {name: (begin, end) for name, (begin, end) in spans.items()}


def same_place(graph: IntegerGraph, a: str, b: str) -> bool:
    """Whether one is the next value of the other, written over it on purpose."""
    for op in graph.ops:
        if isinstance(op, Scan):
            pairs = replaced_states(op)
            if pairs.get(a) == b or pairs.get(b) == a:
                return True
    return False


@needs_compiler
def test_frames_may_be_pushed_one_by_one(tmp_path: Path) -> None:
    graph = block_lstm()
    model = generate(graph)
    assert model.streaming
    write_c(model, tmp_path)
    (tmp_path / "main.c").write_text(
        """#include <stdio.h>
#include <string.h>
#include "model.h"
int main(void) {
    static int16_t frame[KESTREL_MODEL_FRAME_VALUES];
    int32_t logits[KESTREL_MODEL_LOGITS];
    kestrel_model_init();
    for (int t = 0; fread(frame, sizeof frame, 1, stdin) == 1; t++) {
        kestrel_model_push_frame(frame);
        memset(frame, 0x55, sizeof frame); /* the model may not look at it again */
    }
    kestrel_model_finish(logits);
    for (int i = 0; i < KESTREL_MODEL_LOGITS; i++) {
        printf("%d ", (int)logits[i]);
    }
    return 0;
}
"""
    )
    program = QUICK.build(tmp_path, "model")
    for codes in extremes(graph)[:12]:
        done = subprocess.run([program], input=codes.astype("<i2").tobytes(), capture_output=True, check=True)
        found = [int(word) for word in done.stdout.split()]
        np.testing.assert_array_equal(found, graph.run(codes[None])["logits"][0])


@pytest.mark.parametrize("name", GRAPHS)
def test_streaming_is_offered_where_one_scan_reads_the_features(name: str) -> None:
    model = generate(GRAPHS[name]())
    assert model.streaming == (name in STREAMING) == ("push_frame" in model.header)


def damage(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


@needs_compiler
@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        (
            damage(
                "kestrel_ops.c",
                "to[i] = table[tile[i] - op->first];",
                "to[i] = (int8_t)(table[tile[i] - op->first] + (i == 3));",
            ),
            "block0.i",
        ),
        (damage("kestrel_ops.c", "sum[i] += (int64_t)tile[i] * m;", "sum[i] -= (int64_t)tile[i] * m;"), "block0.gates"),
    ],
    ids=["table", "sum"],
)
def test_a_damaged_kernel_is_named_with_index_and_values(change: Callable[[Path], None], tensor: str) -> None:
    graph = block_lstm()
    with pytest.raises(
        KestrelError, match=rf"first difference is {re.escape(tensor)}\[0, 0, \d+\]: expected -?\d+, got"
    ) as caught:
        check(generate(graph), graph, toolchain=QUICK, change=change)
    assert "\n" not in str(caught.value)


@needs_compiler
def test_a_damaged_weight_is_named() -> None:
    graph = net(lower_kit.FlatNet)
    model = generate(graph)
    layer = next(op for op in graph.ops if isinstance(op, MatMul))
    start = model.source.index("{", model.source.index(f"{layer.outputs[0]}_weights[".replace(".", "_")))
    word = re.compile(r"-?\d+").search(model.source, start)
    assert word is not None
    wrong = str(-int(word.group()) or 77)
    change = damage("model.c", model.source[start : word.end()], model.source[start : word.start()] + wrong)
    with pytest.raises(KestrelError, match=rf"first difference is {re.escape(layer.outputs[0])}\[\d+, 0\]"):
        check(model, graph, toolchain=QUICK, change=change)


@needs_compiler
def test_undefined_behaviour_that_changes_no_logit_is_caught() -> None:
    graph = block_lstm()
    old = "sum[i] += (int64_t)tile[i] * m;"
    change = damage("kestrel_ops.c", old, f"{old} if (2147483647 + tile[i] == 5) {{ sum[i] = 0; }}")
    with pytest.raises(KestrelError, match="model-sanitize fails: .*signed integer overflow"):
        check(generate(graph), graph, toolchain=QUICK, change=change)


def test_a_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(
        KestrelError, match="no C compiler .* found.* apt-get install gcc make.* --set export.c=false"
    ) as caught:
        Toolchain.host()
    assert "\n" not in str(caught.value)


@needs_compiler
def test_the_sanitised_program_runs_on_every_clip() -> None:
    """Undefined behaviour that only the last clip of several batches reaches."""
    graph = net(lower_kit.FlatNet)
    codes = lower_kit.codes_of(graph, lower_kit.features(9, 2 * BATCH + 3))
    codes[:, 0, 0] = 1
    codes[-1, 0, 0] = 77
    wrong = "features[0] == 77 && 2147483646 + features[0] == 5"
    change = damage(
        "main.c",
        "kestrel_model_run(features, logits);",
        f"if ({wrong}) {{ clips++; }} kestrel_model_run(features, logits);",
    )
    check(generate(graph), graph, [codes[:-1]], toolchain=QUICK, change=change)
    with pytest.raises(KestrelError, match="model-sanitize fails: .*signed integer overflow"):
        check(generate(graph), graph, [codes], toolchain=QUICK, change=change)


@needs_compiler
def test_the_first_differing_input_is_named_in_order() -> None:
    graph = net(lower_kit.FlatNet)
    model = generate(graph)
    codes = lower_kit.codes_of(graph, lower_kit.features(9, 2 * BATCH))
    logits = logits_of(graph, codes)
    logits[BATCH + 7, 2] += 1
    logits[BATCH + 9, 1] += 1
    batches = [Batch(part, part, right) for part, right in zip(np.split(codes, 2), np.split(logits, 2), strict=True)]
    seen = []
    with (
        pytest.raises(
            KestrelError, match=rf"in input {BATCH + 7}: it is logits\[2\]: expected .*, and gone with tracing"
        ),
        Programs(model, graph, QUICK) as programs,
    ):
        seen.extend(programs.prove(batches))
    assert seen == batches[:1]
    assert not programs.folder.exists()


@needs_compiler
def test_source_that_does_not_compile_is_one_line() -> None:
    graph = block_lstm()
    with pytest.raises(KestrelError, match=r"does not compile \(model\): .*error") as caught:
        check(generate(graph), graph, toolchain=QUICK, change=damage("model.c", "#include", "#inclade"))
    assert "\n" not in str(caught.value)


@needs_compiler
def test_the_stated_ram_is_checked_when_it_is_compiled() -> None:
    graph = block_lstm()
    model = generate(graph)
    wrong = f"sizeof memory == {model.plan.size + 4}"
    with pytest.raises(KestrelError, match="does not compile"):
        check(
            model, graph, toolchain=QUICK, change=damage("model.c", "sizeof memory == KESTREL_MODEL_RAM_BYTES", wrong)
        )


# --------------------------------------------------------------------------------------------------------------- sound

SAMPLES = 4000


def sound_model(scale: float) -> tuple[IntegerGraph, FrontendSpec]:
    """A product over all features of a front end."""
    spec = FrontendSpec(name="test", mel_bands=20, f_min=20.0, f_max=4000.0, coefficients=10)
    frames = FixedFrontend(spec).frames(SAMPLES)
    graph = IntegerGraph()
    graph.input("features", Tensor((frames, 10), -(1 << 15), (1 << 15) - 1, scale))
    graph.add(Requantise(inputs=("features",), outputs=("codes",), rescale=Rescale((1,), 3, -4096, 4095)))
    graph.add(Reshape(inputs=("codes",), outputs=("row",), shape=(frames * 10,)))
    weight = Constant.of(np.random.default_rng(0).integers(-9, 10, (4, frames * 10)), 8)
    graph.output(graph.add(MatMul(inputs=("row",), outputs=("logits",), weight=weight)))
    graph.output(graph.add(ArgMax(inputs=("logits",), outputs=("class",))))
    return graph, spec


def write_wav(path: Path, samples: np.ndarray, rate: int = 16000, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


@needs_compiler
@pytest.mark.parametrize("shift", [2, 0, -1])
def test_sound_gives_the_logits_of_the_integer_front_end(shift: int, tmp_path: Path) -> None:
    spec = sound_model(1.0)[1]
    front_end = FixedFrontend(spec)
    graph, _ = sound_model(front_end.scale * 2.0**shift)
    wav = wav_input(to_dict(spec), SAMPLES, graph.tensors["features"])
    assert wav.shift == shift
    model = generate(graph, ["yes", "no", "up", 'a "quoted" one'], wav)
    write_c(model, tmp_path)
    program = QUICK.build(tmp_path, "model-sanitize")
    rng = np.random.default_rng(1)
    for length in (SAMPLES, SAMPLES - 1001, 1):
        sound = np.clip(rng.normal(0, 6000, length), -32768, 32767).astype(np.int16)
        front = (SAMPLES - length) // 2
        clip = np.pad(sound, (front, SAMPLES - length - front))
        made = front_end(clip[None]).astype(np.int64)
        codes = rounding_shift(made, shift) if shift >= 0 else made << -shift
        codes = np.clip(codes, -(1 << 15), (1 << 15) - 1)
        done = subprocess.run(
            [program, write_wav(tmp_path / "a.wav", sound)], capture_output=True, text=True, check=True
        )
        _, number, name, logits = done.stdout.rstrip("\n").split("\t")
        expected = graph.run(codes)
        np.testing.assert_array_equal([int(word) for word in logits.split()], expected["logits"][0])
        assert int(number) == expected["class"][0, 0]
        assert name == ["yes", "no", "up", 'a "quoted" one'][int(number)]


@needs_compiler
def test_a_wrong_sound_file_is_one_line(tmp_path: Path) -> None:
    graph, spec = sound_model(2.0**-9)
    write_c(generate(graph, (), wav_input(to_dict(spec), SAMPLES, graph.tensors["features"])), tmp_path)
    program = QUICK.build(tmp_path, "model-sanitize")
    quiet = np.zeros(SAMPLES, np.int16)
    eight_bits = write_wav(tmp_path / "eight.wav", quiet)
    eight_bits.write_bytes(eight_bits.read_bytes().replace(b"\x02\x00\x10\x00data", b"\x01\x00\x08\x00data"))
    cut = write_wav(tmp_path / "cut.wav", quiet)
    cut.write_bytes(cut.read_bytes()[:-100])
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "empty.wav").write_bytes(b"")
    cases = {
        write_wav(tmp_path / "rate.wav", quiet, rate=8000): "8000 samples per second",
        write_wav(tmp_path / "long.wav", np.zeros(SAMPLES + 1)): f"has {SAMPLES + 1} samples",
        write_wav(tmp_path / "none.wav", np.zeros(0)): "has 0 samples",
        write_wav(tmp_path / "stereo.wav", quiet, channels=2): "one channel",
        eight_bits: "not 16-bit",
        cut: "ends too early",
        tmp_path / "text.wav": "not a wav file",
        tmp_path / "empty.wav": "not a wav file",
        tmp_path / "absent.wav": "cannot be read",
    }
    for path, reason in cases.items():
        done = subprocess.run([program, path], capture_output=True, text=True)
        assert done.returncode == 1 and reason in done.stderr and done.stderr.count("\n") == 1, done.stderr


@needs_compiler
def test_features_that_are_no_whole_clip_are_refused(tmp_path: Path) -> None:
    graph = net(lower_kit.FlatNet)
    write_c(generate(graph), tmp_path)
    program = QUICK.build(tmp_path, "model")
    codes = extremes(graph)[:3]
    assert run_program(program, codes).shape == (3, lower_kit.CLASSES)
    done = subprocess.run([program, "-"], input=codes.tobytes()[:-2], capture_output=True, text=False)
    assert done.returncode == 1 and b"ends within a clip" in done.stderr
    assert subprocess.run([program], capture_output=True).returncode == 2
    for arguments in ([write_wav(tmp_path / "a.wav", np.zeros(9))], ["-s", "-"]):
        done = subprocess.run([program, *arguments], input=b"", capture_output=True)
        assert done.returncode == 1 and b"without a front end" in done.stderr and done.stderr.count(b"\n") == 1
    for arguments in (["-x", "-"], ["-f"], ["-f", tmp_path / "f"]):
        assert subprocess.run([program, *arguments], capture_output=True).returncode == 2
    done = subprocess.run([program, "-f", tmp_path / "no" / "folder", "-"], input=b"", capture_output=True)
    assert done.returncode == 1 and b"cannot be written" in done.stderr


def test_graphs_of_other_forms_are_refused() -> None:
    graph = graph_kit.random_graph(2)
    graph.outputs.append(graph.ops[3].outputs[0])
    with pytest.raises(KestrelError, match="one input and one output"):
        generate(graph)


@pytest.mark.parametrize(
    ("name", "storage", "column"),
    [("balanced lstm", "balanced", 2 * 128 // 8), ("balanced gru in groups", "groups", 17)],
)
def test_pruned_columns_hold_what_was_kept(name: str, storage: str, column: int) -> None:
    """The writer finds in the weights how they were pruned: 16 of 128 rows, or one of 6 groups of 16, for each column."""
    graph = GRAPHS[name]()
    products = [op for op, _ in graph.all_ops() if isinstance(op, Accumulate)]
    assert [op.weight.storage for op in products] == [storage] * 2
    model = generate(graph)
    assert model.source.count(f".kind = KESTREL_{storage.upper()}") == 2
    fields = re.findall(rf"KESTREL_{storage.upper()}.*?row_bytes = (\d+)", model.source, re.DOTALL)
    assert fields == [str(column)] * 2
    others = [op for op, _ in graph.all_ops() if isinstance(op, MatMul)]
    dense = sum(op.weight.values.size + (0 if op.bias is None else 4 * op.bias.values.size) for op in others)
    assert model.sections["weights"] == column * (lower_kit.WIDTH + 32) + dense
    assert all(len(packed(op.weight, op)) == column * op.weight.shape[1] for op in products)  # what the card counts


@pytest.mark.parametrize("name", ["pruned", "pruned gru of 4 bits"])
def test_zeros_take_no_bytes_of_weights(name: str) -> None:
    sparse = GRAPHS[name]()
    stored = [op.weight.storage for op, _ in sparse.all_ops() if isinstance(op, PRODUCTS)]
    assert any(storage.startswith(("sparse", "masked")) for storage in stored)
    bytes_sparse = generate(sparse).sections["weights"]
    for program in (sparse, *(op.body for op in sparse.ops if isinstance(op, Scan))):
        for place, op in enumerate(program.ops):
            if isinstance(op, PRODUCTS) and leaves_out_zeros(op.weight.storage):
                dense = Constant(op.weight.values, f"int{whole_bits(op.weight.storage)}")
                program.ops[place] = dataclasses.replace(op, weight=dense)
    assert bytes_sparse < 0.75 * generate(sparse).sections["weights"]

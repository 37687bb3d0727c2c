"""The C model on emulated microcontrollers: the same bits as the integer model, instructions, and stack."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import graph_kit
import lower_kit
import pytest
import sound_kit
import torch
from torch import nn

from kestrel.errors import KestrelError
from kestrel.export.c_check import extremes, logits_of
from kestrel.export.c_device import DEVICES, Build, Device
from kestrel.export.c_model import generate
from kestrel.export.c_sound import sound_extremes
from kestrel.lower.graph import IntegerGraph
from kestrel.lower.spotter import lower

PACKAGES = (
    "gcc-riscv64-unknown-elf picolibc-riscv64-unknown-elf qemu-system-misc "
    "gcc-arm-none-eabi picolibc-arm-none-eabi qemu-system-arm"
)
CLIPS = 4
MODELS: dict[str, Callable[[], IntegerGraph]] = {
    "blocks": lambda: lower(lower_kit.spotter_of([{"stack": 2}]), lower_kit.FEATURE_SCALE),
    "mixed of 4 bits": lambda: lower_kit.graph_of(lower_kit.settled(lower_kit.MixedNet()), weight_bits=4),
    "gru": lambda: lower_kit.graph_of(lower_kit.settled(lower_kit.Recurrent(nn.GRU))),
    "every storage of weights": lambda: graph_kit.all_storages(3),
    "every op": lambda: graph_kit.random_graph(1),
}


def needed(device: Device) -> None:
    if not device.runs and not os.environ.get("CI"):
        pytest.skip(f"needs {device.cc} and {device.emulator}: apt-get install {PACKAGES}")


def cases(names: Iterable[str], every: str) -> list[Any]:
    """Devices with models; a Cortex-M7, which runs the instructions of a Cortex-M3, with one of them."""
    pairs = [(device, name) for name in names for device in DEVICES if device.name != "Cortex-M7" or name == every]
    return [pytest.param(device, name, id=f"{name}-{device.name}") for device, name in pairs]


@pytest.mark.parametrize(("device", "name"), cases(MODELS, "blocks"))
def test_emulated_microcontrollers_give_the_same_bits(device: Device, name: str) -> None:
    needed(device)
    torch.manual_seed(4)
    graph = MODELS[name]()
    codes = extremes(graph)[[0, 1, 3, -1]]
    with Build(generate(graph), device) as build:
        found = build.run(codes, logits_of(graph, codes), sound=False)
    assert found.clips == len(codes) and found.instructions > 100 and found.stack > 20


@pytest.mark.parametrize(("device", "kind"), cases(sound_kit.KINDS, "frames"))
def test_front_end_and_model_run_together_within_the_stated_stack(device: Device, kind: str) -> None:
    needed(device)
    graph, front_end, wav = sound_kit.sound_model(kind)
    model = generate(graph, (), wav)
    batch = sound_kit.python(graph, front_end, wav).batch(sound_extremes(sound_kit.SAMPLES)[[3, 9, -1]])
    with Build(model, device) as build:
        image, found = build.measure(0), build.run(batch.given, batch.logits, sound=True)
    assert found.clips == 3
    assert image.ram["stack (bound)"] - 200 <= found.stack <= image.ram["stack (bound)"] + 32  # a few words of libc


def test_another_bit_on_the_emulator_is_named() -> None:
    needed(DEVICES[0])
    graph = MODELS["gru"]()
    codes = extremes(graph)[:3]
    logits = logits_of(graph, codes)
    logits[2, 1] += 1
    with (
        Build(generate(graph), DEVICES[0]) as build,
        pytest.raises(
            KestrelError, match=rf"emulated Cortex-M3 differs .* in sample 2: logits\[1\] is {logits[2, 1] - 1}, exp"
        ),
    ):
        build.run(codes, logits, sound=False)

"""What a C model takes on a device: sections of a linker's map, stack along calls, limits."""

from __future__ import annotations

import re
import shutil
import subprocess

import lower_kit
import numpy as np
import pytest
import torch

from kestrel.errors import KestrelError
from kestrel.export.c_check import Toolchain
from kestrel.export.c_device import (
    DEVICES,
    Build,
    Device,
    Image,
    check_limits,
    measured_devices,
    read_map,
    sample_header,
    stack_bound,
)
from kestrel.export.c_model import generate
from kestrel.export.spec import ExportSpec

MAP = """Discarded input sections

 .text.unused   0x00000000       0x99 kestrel_ops.o

Linker script and memory map

.text           0x00000000      0x100
 .text.a_function_with_a_long_name
                0x00000000       0x30 model.o
                0x00000000                a_function_with_a_long_name
 *fill*         0x00000030        0x2 
 .text.b        0x00000032       0x10 kestrel_ops.o
 .rodata.table  0x00000044       0x20 /somewhere/model.o
 .text.memcpy   0x00000064        0x8 /usr/lib/libc.a(memcpy.o)

.data           0x20000000        0x4
 .data.x        0x20000000        0x4 sound.o

.bss            0x20000004       0x40
 .bss.memory    0x20000004       0x40 model.o
 COMMON         0x20000044        0x8 model.o

.debug_info     0x00000000      0x7d1
 .debug_info    0x00000000      0x7d1 model.o
"""


def test_a_map_is_read_by_kind_and_object() -> None:
    assert read_map(MAP) == {
        ("code", "model.o"): 0x30,
        ("code", ""): 2,
        ("code", "kestrel_ops.o"): 0x10,
        ("constants", "model.o"): 0x20,
        ("code", "libc.a(memcpy.o)"): 8,
        ("data", "sound.o"): 4,
        ("zero", "model.o"): 0x48,
    }


def graph_text(sizes: dict[str, str], calls: list[tuple[str, str]]) -> str:
    nodes = [f'node: {{ title: "{name}" label: "{name}\\nx.c:1:1\\n{size}" }}' for name, size in sizes.items()]
    edges = [f'edge: {{ sourcename: "{a}" targetname: "{b}" label: "x.c:2:2" }}' for a, b in calls]
    return "\n".join([*nodes, *edges])


def test_stack_is_that_of_the_deepest_path() -> None:
    first = graph_text({"run": "10 bytes (static)", "x.c:a": "5 bytes (static)"}, [("run", "x.c:a"), ("run", "far")])
    second = graph_text(
        {
            "far": "100 bytes (dynamic,bounded)",
            "y.c:by_pointer": "40 bytes (static)",
            "y.c:called": "70 bytes (static)",
            "unused": "999 bytes (static)",
        },
        [("far", "__indirect_call"), ("far", "memcpy"), ("unused", "y.c:called")],
    )
    assert stack_bound([first, second], ["run"]) == 10 + 100 + 40
    assert stack_bound([first], ["run"]) == 15
    assert stack_bound([second], ["unused", "far"]) == 999 + 70


def test_stack_without_a_bound_is_refused() -> None:
    with pytest.raises(KestrelError, match="x.c:a takes an unbounded amount of stack"):
        stack_bound([graph_text({"x.c:a": "5 bytes (dynamic)"}, [])], ["x.c:a"])
    loop = graph_text({"a": "5 bytes (static)", "b": "5 bytes (static)"}, [("a", "b"), ("b", "a")])
    with pytest.raises(KestrelError, match="calls itself"):
        stack_bound([loop], ["a"])


IMAGE = Image("Cortex-M3", "gcc", {"code: model": 900, "constants: weights": 100}, {"arena": 60, "stack (bound)": 40})


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"flash_limit": 999}, "takes 1,000 bytes of flash on Cortex-M3, export.flash_limit is 999"),
        ({"ram_limit": 99}, "takes 100 bytes of ram on Cortex-M3, export.ram_limit is 99"),
    ],
)
def test_a_larger_image_is_one_line(settings: dict[str, int], text: str) -> None:
    check_limits(IMAGE, ExportSpec())
    check_limits(IMAGE, ExportSpec(flash_limit=1000, ram_limit=100))
    with pytest.raises(KestrelError, match=re.escape(text)) as caught:
        check_limits(IMAGE, ExportSpec(**settings))
    assert "\n" not in str(caught.value)


def test_samples_are_written_as_c() -> None:
    text = sample_header(np.array([[1, -32768], [3, 4]], np.int16), True)
    assert "#define SOUND\n#define CLIPS 2\n" in text and "{1, -32768},\n{3, 4}}" in text
    assert "SOUND" not in sample_header(np.zeros((1, 2), np.int16), False)


def test_this_computer_stands_in_where_there_is_no_other_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    (device,) = measured_devices(Toolchain("gcc"))
    assert device.folder is None and not device.compiles and not device.runs


HOST = Device("this computer", None, "gcc", variables=("TARGET=-fno-pie", "LINK=-no-pie"))


@pytest.mark.parametrize("device", [*DEVICES, HOST], ids=lambda device: device.name)
def test_every_byte_of_the_linked_program_is_accounted_for(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    if not device.compiles:
        pytest.skip(f"needs {device.cc} and make")
    torch.manual_seed(4)
    graph = lower_kit.graph_of(lower_kit.settled(lower_kit.MixedNet()))
    model = generate(graph)
    sizes: dict[str, int] = {}
    run = subprocess.run

    def look(command, *arguments, **options):
        done = run(command, *arguments, **options)
        if command[0] == "make":
            folder = command[command.index("-C") + 1]
            tool = shutil.which(device.cc.replace("gcc", "size"))
            lines = run([tool, "-A", f"{folder}/image.elf"], capture_output=True, text=True).stdout.splitlines()
            sizes.update({w[0]: int(w[1]) for line in lines if len(w := line.split()) == 3 and w[1].isdigit()})
        return done

    monkeypatch.setattr(subprocess, "run", look)
    with Build(model, device) as build:
        image = build.measure(2 * 120)
    if device.folder is not None:
        flash = sum(size for name, size in sizes.items() if name.startswith((".text", ".rodata", ".data", ".init")))
        assert flash - 16 <= image.flash_bytes <= flash
        static = sum(size for name, size in sizes.items() if name.startswith((".bss", ".data")))
        assert static == image.ram["tensors and states (arena)"]
    assert image.ram["features, given by the caller"] == 240
    assert 50 < image.ram["stack (bound)"] < 8000
    assert image.flash["constants: weights"] == model.sections["weights"] and image.flash["code: kernels"] > 1000
    assert image.ram_bytes == sum(image.ram.values())

"""The C model on emulated microcontrollers: the same bits as the integer model, and instructions per inference."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import lower_kit
import numpy as np
import pytest
import torch
from torch import nn

from kestrel.export.c_check import extremes
from kestrel.export.c_files import RUNTIME, write_c
from kestrel.export.c_model import generate
from kestrel.lower.graph import IntegerGraph
from kestrel.lower.spotter import lower

TOOLS = {
    "rv32imc": ("riscv64-unknown-elf-gcc", "qemu-system-riscv32"),
    "cortex-m": ("arm-none-eabi-gcc", "qemu-system-arm"),
}
PACKAGES = "gcc-riscv64-unknown-elf picolibc-riscv64-unknown-elf gcc-arm-none-eabi picolibc-arm-none-eabi"
CLIPS = 4
TIMEOUT = 120  # seconds


def graphs() -> dict[str, IntegerGraph]:
    torch.manual_seed(4)
    return {
        "blocks": lower(lower_kit.spotter_of([{"stack": 2}]), lower_kit.FEATURE_SCALE),
        "mixed of 4 bits": lower_kit.graph_of(lower_kit.settled(lower_kit.MixedNet()), weight_bits=4),
        "gru": lower_kit.graph_of(lower_kit.settled(lower_kit.Recurrent(nn.GRU))),
    }


@pytest.mark.parametrize("target", TOOLS)
def test_emulated_microcontrollers_give_the_same_bits(target: str, tmp_path: Path) -> None:
    absent = [tool for tool in (*TOOLS[target], "make") if shutil.which(tool) is None]
    if absent and not os.environ.get("CI"):
        pytest.skip(f"needs {' '.join(absent)}: apt-get install {PACKAGES} qemu-system-misc qemu-system-arm")
    for name, graph in graphs().items():
        folder = tmp_path / name.replace(" ", "-")
        write_c(generate(graph), folder)
        for source in (RUNTIME / "targets" / "sample.c", RUNTIME / "targets" / target / "Makefile"):
            shutil.copy(source, folder / source.name)
        codes = np.concatenate([extremes(graph)[3:5], lower_kit.codes_of(graph, lower_kit.features(9, CLIPS - 2))])
        rows = ",\n".join("{" + ", ".join(map(str, clip.reshape(-1).tolist())) + "}" for clip in codes)
        (folder / "sample.h").write_text(
            f"#define CLIPS {CLIPS}\nstatic const int16_t clips[CLIPS][KESTREL_MODEL_FEATURES] = {{\n{rows}}};\n"
        )
        done = subprocess.run(["make", "-s", "-C", folder, "run"], capture_output=True, text=True, timeout=TIMEOUT)
        assert done.returncode == 0, done.stderr
        *lines, count = (done.stdout + done.stderr).strip().splitlines()
        found = [[int(word) for word in line.split()] for line in lines]
        np.testing.assert_array_equal(found, graph.run(codes)[graph.outputs[0]])
        assert int(count.split()[1]) > 100
        print(f"{target}, {name}: {count}")

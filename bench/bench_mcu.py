"""The microcontroller program on many real clips: every clip on this computer, a sample of them on emulated RV32E processors.

    python -m bench.bench_mcu EXPORT CLIPS [--emulated 240] [--spike]

EXPORT is the export folder of a network behind the shift-add front end (it holds integer/), CLIPS a folder of sound files in
GSC layout. Logits have to be identical with those of front end and narrow integer model in Python. Prints one line for each proof,
the image and the instructions of a frame. Needs gcc, gcc-riscv64-unknown-elf and qemu-system-misc; --spike also the simulator spike.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import soundfile
import torch

from kestrel.export.c_check import Toolchain
from kestrel.export.mcu import instructions_per_frame, load
from kestrel.export.mcu_build import CYCLES_PER_INSTRUCTION, SPIKE, WITHOUT_SPIKE, McuBuild
from kestrel.export.stream_c import choose_straight, stream_model
from kestrel.frontend.shift_add import ShiftAddFeatures
from kestrel.frontend.spec import FrontendSpec
from kestrel.lower import files
from kestrel.lower.narrow import narrow_form
from kestrel.lower.stream import stream_program
from kestrel.settings import build, load_yaml

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = 16000
BATCH = 256


def read(paths: list[Path]) -> np.ndarray:
    """int16 [n, SAMPLES], zeros behind short clips."""
    clips = np.zeros((len(paths), SAMPLES), np.int16)
    for row, path in zip(clips, paths, strict=True):
        found = soundfile.read(path, dtype="int16", frames=SAMPLES)[0]
        row[: len(found)] = found
    return clips


def main() -> None:
    """Proves and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--frontend", default="tinyspeech_mcu", help="a file of conf/frontends")
    parser.add_argument("--emulated", type=int, default=240, help="clips on the emulator")
    parser.add_argument("--straight", type=int, default=0, help="bytes of flash for straight-line code")
    parser.add_argument("--segments", type=int, help="parts of a clip after each of which it answers")
    parser.add_argument("--spike", action="store_true", help="run them under spike, too")
    given = parser.parse_args()
    if given.spike and SPIKE is None:
        parser.error(WITHOUT_SPIKE)
    torch.set_num_threads(1)
    spec = build(FrontendSpec, load_yaml(ROOT / "conf" / "frontends" / f"{given.frontend}.yaml"), "front end")
    front_end = ShiftAddFeatures(spec)
    narrow = narrow_form(files.load(given.export / "integer"))
    program = stream_program(narrow, given.segments)
    names = [f"class {number}" for number in range(program.streams[program.logits].size)]
    model = stream_model(program, names, choose_straight(program, given.straight))
    paths = sorted(path for path in given.clips.glob("*/*") if path.suffix in (".flac", ".wav"))
    with McuBuild(model, front_end.tables, SAMPLES, 2) as built:
        host = built.host(Toolchain.host(), sanitize=False)
        checked = built.host(Toolchain.host(), sanitize=True)
        same, wanted = 0, {}
        for start in range(0, len(paths), BATCH):
            part = paths[start : start + BATCH]
            clips = read(part)
            expected = narrow.run(front_end.codes(torch.from_numpy(clips)).numpy())["logits"]
            found = built.run_host(host, clips)
            same += int((found == expected).all(axis=1).sum())
            if start == 0:
                assert np.array_equal(built.run_host(checked, clips), expected)
            wanted |= dict(zip(part, expected, strict=True))
        print(f"this computer: {same} of {len(paths)} clips identical ({min(BATCH, len(paths))} with sanitizers)")
        some = paths[:: max(1, len(paths) // given.emulated)][: given.emulated]
        expected = np.stack([wanted[path] for path in some])
        ran = built.run(read(some), count=False)
        equal = int((ran.logits == expected).all(axis=1).sum())
        print(f"emulated RV32E (QEMU): {equal} of {len(some)} clips identical, {ran.stack} bytes of stack seen in use")
        if given.spike:
            found = built.run_spike(read(some))
            equal = int((found == expected).all(axis=1).sum())
            print(f"emulated RV32EC (spike): {equal} of {len(some)} clips identical")
        chip = built.chip()
        print(f"image: {chip.flash_bytes} bytes of flash, {chip.ram_bytes} of RAM with a stack of {chip.stack}")
        timed = built.run(read(some[:4]), timing=True)
        frames = 4 * front_end.frames(SAMPLES)
        counts = ", ".join(f"{name} {count:.0f}" for name, count in instructions_per_frame(timed, frames).items())
        share = load(timed, frames, spec.hop * spec.decimation / spec.sample_rate)
        print(f"instructions of a frame: {counts}")
        print(f"load at 48 MHz: {100 * share:.1f} % with {CYCLES_PER_INSTRUCTION:g} cycles an instruction")


if __name__ == "__main__":
    main()

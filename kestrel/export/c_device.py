"""A C model on microcontrollers: bytes of flash and RAM by what takes them, and its answers on emulated ones."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kestrel.errors import KestrelError
from kestrel.export.c_check import Toolchain, processors
from kestrel.export.c_files import RUNTIME, write_c
from kestrel.export.c_model import CModel
from kestrel.export.spec import ExportSpec

Array = np.ndarray
ENTRIES = ("kestrel_sound_start", "kestrel_sound_push", "kestrel_sound_finish")
ENTRIES_OF_FEATURES = ("kestrel_model_run",)
TIMEOUT = 900  # seconds of an emulated run
BOARD_BYTES = 0x3F0000  # of flash that emulated boards have for model and sample


@dataclass(frozen=True)
class Device:
    """A processor: its folder in runtime/targets, compiler, emulator, and settings of the Makefile.

    Without a folder it is this computer, which stands in where there is no other compiler.
    """

    name: str
    folder: str | None
    cc: str
    emulator: str | None = None
    variables: tuple[str, ...] = ()

    @property
    def compiles(self) -> bool:
        """Whether its compiler and make are installed."""
        return shutil.which(self.cc.split()[0]) is not None and shutil.which("make") is not None

    @property
    def runs(self) -> bool:
        """Whether its emulator is installed, too."""
        return self.compiles and self.emulator is not None and shutil.which(self.emulator) is not None


_ARM = ("cortex-m", "arm-none-eabi-gcc", "qemu-system-arm")
DEVICES = (
    Device("Cortex-M3", *_ARM, ("CPU=cortex-m3", "MACHINE=mps2-an385")),
    Device("Cortex-M7", *_ARM, ("CPU=cortex-m7", "MACHINE=mps2-an500")),
    Device("RV32IMC", "rv32imc", "riscv64-unknown-elf-gcc", "qemu-system-riscv32"),
)


def measured_devices(toolchain: Toolchain) -> list[Device]:
    """The devices whose compilers are installed, or this computer."""
    found = [device for device in DEVICES if device.compiles]
    return found or [Device("this computer", None, toolchain.cc, variables=("TARGET=-fno-pie", "LINK=-no-pie"))]


@dataclass(frozen=True)
class Image:
    """Bytes of a linked model with its front end and the library routines that they call, at -O2, without an application.

    `flash` and `ram` by what takes them. Of RAM `stack` is a bound over the call graph, from the compiler's account of
    each function (-fcallgraph-info=su); library routines, which take a few words, are not in it.
    """

    device: str
    compiler: str
    flash: Mapping[str, int]
    ram: Mapping[str, int]

    @property
    def flash_bytes(self) -> int:
        """All code and constants."""
        return sum(self.flash.values())

    @property
    def ram_bytes(self) -> int:
        """All memory, stack included."""
        return sum(self.ram.values())


@dataclass(frozen=True)
class Emulated:
    """`clips` that gave the bits of the integer model; instructions of one inference, and the stack that was seen used."""

    device: str
    clips: int
    instructions: int
    stack: int


def check_limits(image: Image, settings: ExportSpec) -> None:
    """Raise KestrelError where the image is larger than the settings allow."""
    for kind, needed, limit in (
        ("flash", image.flash_bytes, settings.flash_limit),
        ("ram", image.ram_bytes, settings.ram_limit),
    ):
        if limit is not None and needed > limit:
            raise KestrelError(
                f"the C program takes {needed:,} bytes of {kind} on {image.device}, export.{kind}_limit is {limit:,}: make "
                "the network smaller, choose fewer bits or a higher limit"
            )


class Build:
    """A model in a temporary folder, to be compiled for `device`; what is measured and what runs share their objects."""

    def __init__(self, model: CModel, device: Device) -> None:
        self.device, self._model = device, model
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name)
        write_c(model, self._path)
        sources = [RUNTIME / "targets" / "device.mk", RUNTIME / "targets" / "sample.c"]
        (self._path / "Makefile").write_text("include device.mk\n", encoding="ascii")
        if device.folder is not None:
            sources.append(RUNTIME / "targets" / device.folder / "Makefile")
        for path in sources:
            shutil.copyfile(path, self._path / path.name)

    def __enter__(self) -> Build:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def measure(self, input_bytes: int) -> Image:
        """Link the program without an application. Raises KestrelError where that fails.

        `input_bytes`: features of a clip, which the caller holds where there is no front end.
        """
        model = self._model
        self._make("image.elf")
        sections = read_map((self._path / "image.map").read_text(encoding="utf-8"))
        graphs = [path.read_text(encoding="utf-8") for path in sorted(self._path.glob("*.ci")) if path.stem != "sample"]
        stack = stack_bound(graphs, ENTRIES if model.wav else ENTRIES_OF_FEATURES)
        ram = _ram(model, sections, 0 if model.wav else input_bytes, stack)
        return Image(self.device.name, Toolchain(self.device.cc).version(), _flash(model, sections), ram)

    def run(self, clips: Array, logits: Array, *, sound: bool) -> Emulated:
        """Run `clips` int16 [n, ...], samples if `sound` else features, on the emulator and compare with `logits` [n, C].

        Raises KestrelError where it fails or a bit differs.
        """
        (self._path / "sample.h").write_text(sample_header(clips, sound), encoding="ascii")
        text, name = self._make("run"), self.device.name
        lines = [line.split() for line in text.strip().splitlines()]
        try:
            found = np.array([[int(word) for word in line] for line in lines[:-2]], np.int64)
            (_, instructions), (_, stack) = lines[-2:]
        except ValueError:
            raise KestrelError(f"the C program on emulated {name} answers {' '.join(text.split())[-200:]!r}") from None
        if found.shape != logits.shape:
            raise KestrelError(
                f"the C program on emulated {name} gives {list(found.shape)} logits, not {list(logits.shape)}"
            )
        places = np.argwhere(found != logits)
        if len(places):
            clip, logit = (int(i) for i in places[0])
            raise KestrelError(
                f"the C model on emulated {name} differs from the integer model in sample {clip}: logits[{logit}] is "
                f"{found[clip, logit]}, expected {logits[clip, logit]}"
            )
        return Emulated(name, len(clips), int(instructions), int(stack))

    def _make(self, target: str) -> str:
        """What `make target` prints."""
        device = self.device
        command = ["make", "-s", f"-j{processors()}", "-C", str(self._path), target]
        try:
            done = subprocess.run(
                [*command, *device.variables, f"CC={device.cc}", "CFLAGS=-O2"],
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            raise KestrelError(f"the C program on emulated {device.name} does not end within {TIMEOUT} s") from None
        if done.returncode:
            text = done.stderr.splitlines() + done.stdout.splitlines()
            lines = [line for line in text if "error" in line.lower()] or text or ["make failed"]
            raise KestrelError(f"the C program for {device.name} cannot be made ({target}): {lines[0].strip()}")
        return done.stdout + done.stderr  # emulators differ in where they print


def sample_header(clips: Array, sound: bool) -> str:
    """The text of sample.h for clips int16 [n, ...]."""
    rows = ",\n".join("{" + ", ".join(map(str, clip.reshape(-1).tolist())) + "}" for clip in clips)
    size = "KESTREL_MODEL_CLIP_SAMPLES" if sound else "KESTREL_MODEL_FEATURES"
    head = "#define SOUND\n" if sound else ""
    return f"{head}#define CLIPS {len(clips)}\nstatic const int16_t clips[CLIPS][{size}] = {{\n{rows}}};\n"


# ------------------------------------------------------------------------------------------------------ reading the map

_PLACED = re.compile(r"^ (\.\S+|COMMON|\*fill\*)\s+0x([0-9a-f]+)\s+0x([0-9a-f]+)(?: (\S.*))?\s*$")
_OUTPUT = re.compile(r"^(\.\S+)(?:\s|$)")
_PREFIXES = {
    "code": (".text", ".init", ".fini", ".literal"),
    "constants": (".rodata", ".srodata"),
    "data": (".data", ".sdata"),
    "zero": (".bss", ".sbss", "COMMON"),
}


def read_map(text: str) -> dict[tuple[str, str], int]:
    """Bytes by (kind, object file) of a map file of GNU ld; kinds are code, constants, data, zero.

    Bytes between sections, for alignment, count for the kind in front of them, with object "".
    """
    _, _, placed = text.partition("Linker script and memory map")
    joined = re.sub(r"^( \.\S+)\n +0x", r"\1 0x", placed, flags=re.MULTILINE)
    found: dict[tuple[str, str], int] = {}
    kind: str | None = None
    for line in joined.splitlines():
        if _OUTPUT.match(line):
            kind = None
        match = _PLACED.match(line)
        if match is None:
            continue
        name, _, size, owner = match.groups()
        if name != "*fill*":
            kind = next((k for k, heads in _PREFIXES.items() if name.startswith(heads)), None)
        if kind is not None and int(size, 16):
            key = kind, "" if name == "*fill*" else Path(owner or "").name
            found[key] = found.get(key, 0) + int(size, 16)
    return found


def _part(name: str) -> str:
    """What an object file belongs to."""
    if not name:
        return "alignment"
    if name == "model.o":
        return "model"
    if name in ("kestrel_frontend.o", "sound.o"):
        return "front end"
    return "kernels" if name.startswith("kestrel_") else "library"


def _flash(model: CModel, sections: Mapping[tuple[str, str], int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for (kind, name), size in sections.items():
        if kind == "zero":
            continue
        part = _part(name)
        key = part if part == "alignment" else f"{kind}: {part}"
        found[key] = found.get(key, 0) + size
    held = found.pop("constants: model", 0)
    arrays = {f"constants: {name}": size for name, size in model.sections.items() if size}
    rest = held - sum(arrays.values())
    found |= arrays if rest >= 0 else {"constants: model": held}
    if rest > 0:
        found["constants: descriptors of ops"] = rest
    return dict(sorted(found.items(), key=lambda row: (row[0] == "alignment", row[0])))


def _ram(model: CModel, sections: Mapping[tuple[str, str], int], input_bytes: int, stack: int) -> dict[str, int]:
    found: dict[str, int] = {"tensors and states (arena)": model.plan.size}
    for (kind, name), size in sections.items():
        if kind in ("zero", "data"):
            part = {"front end": "front end and features", "model": "position in the clip"}.get(
                _part(name), _part(name)
            )
            found[part] = found.get(part, 0) + size - (model.plan.size if (kind, name) == ("zero", "model.o") else 0)
    found["features, given by the caller"] = input_bytes
    found["stack (bound)"] = stack
    return {name: size for name, size in found.items() if size}


# ---------------------------------------------------------------------------------------------------------------- stack

_NODE = re.compile(r'^node: \{ title: "([^"]+)" label: "[^"]*?(\d+) bytes \(([^)]*)\)')
_EDGE = re.compile(r'^edge: \{ sourcename: "([^"]+)" targetname: "([^"]+)"')
_INDIRECT = "__indirect_call"


def stack_bound(graphs: Iterable[str], entries: Iterable[str]) -> int:
    """The most stack along any path of calls from `entries`, by the texts that gcc's -fcallgraph-info=su writes.

    A call through a pointer may reach every function of a file that nobody calls by name. Raises KestrelError where a
    function calls itself, or takes an unbounded amount.
    """
    own: dict[str, int] = {}
    calls: dict[str, set[str]] = {}
    for text in graphs:
        for line in text.splitlines():
            if node := _NODE.match(line):
                name, size, how = node.groups()
                if how == "dynamic":
                    raise KestrelError(f"the C function {name} takes an unbounded amount of stack")
                own[name] = max(own.get(name, 0), int(size))
            elif edge := _EDGE.match(line):
                calls.setdefault(edge[1], set()).add(edge[2])
    called = {name for names in calls.values() for name in names}
    calls[_INDIRECT] = {name for name in own if ":" in name and name not in called}
    return max((_deepest(name, own, calls, ()) for name in entries), default=0)


def _deepest(name: str, own: Mapping[str, int], calls: Mapping[str, set[str]], path: Sequence[str]) -> int:
    if name in path:
        raise KestrelError(f"the C function {name} calls itself, so its stack has no bound")
    below = (_deepest(other, own, calls, (*path, name)) for other in calls.get(name, ()))
    return own.get(name, 0) + max(below, default=0)

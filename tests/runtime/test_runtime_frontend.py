"""The C front end against the integer model, bit by bit, on extreme, random and real clips."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from kestrel.frontend import fixed_c
from kestrel.frontend.fixed import FixedFrontend
from kestrel.frontend.spec import FrontendSpec
from kestrel.settings import build, load_yaml

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("frontend_driver.c")
SOURCE = ROOT / "runtime" / "src" / "kestrel_frontend.c"
INCLUDE = ROOT / "runtime" / "include"
NAMES = sorted(
    path.stem
    for path in (ROOT / "conf" / "frontends").glob("*.yaml")
    if not {"arithmetic: shift-add", "filters: iir"} & set(path.read_text().splitlines())
)
WARNINGS = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Wshadow", "-Wstrict-prototypes", "-Werror"]
SANITIZERS = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
COMPILER = shutil.which("gcc") or shutil.which("cc")

pytestmark = pytest.mark.skipif(
    COMPILER is None and not os.environ.get("CI"), reason="no C compiler: install gcc to compare the C front end"
)


def spec_of(name: str) -> FrontendSpec:
    return build(FrontendSpec, load_yaml(ROOT / "conf" / "frontends" / f"{name}.yaml"), name)


class Program:
    """The driver, compiled for one front end with sanitizers."""

    def __init__(self, spec: FrontendSpec, folder: Path) -> None:
        self.frontend = FixedFrontend(spec)
        self.path = folder / "driver"
        fixed_c.write_header(self.frontend.tables, folder / fixed_c.HEADER_NAME)
        assert COMPILER is not None, "CI needs gcc"
        sources = [str(SOURCE), str(DRIVER)]
        command = [COMPILER, *WARNINGS, *SANITIZERS, f"-I{folder}", f"-I{INCLUDE}", *sources, "-o", str(self.path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def _run(self, mode: str, clips: np.ndarray) -> np.ndarray:
        command = [str(self.path), mode, str(len(clips)), str(clips.shape[1])]
        done = subprocess.run(command, input=clips.astype("<i2").tobytes(), capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        return np.frombuffer(done.stdout, "<i2")

    def check(self, clips: np.ndarray) -> None:
        """Whole clips and streams of blocks, features and logs."""
        frontend = self.frontend
        wanted, logs = frontend(clips), frontend.logs(clips)
        got = self._run("clip", clips).reshape(wanted.shape)
        assert np.array_equal(got, wanted), _first_difference(got, wanted)
        both = self._run("stream", clips).reshape(len(clips), -1)
        got_logs, got = both[:, : logs[0].size].reshape(logs.shape), both[:, logs[0].size :].reshape(wanted.shape)
        assert np.array_equal(got_logs, logs), _first_difference(got_logs, logs)
        assert np.array_equal(got, wanted), _first_difference(got, wanted)


def _first_difference(got: np.ndarray, wanted: np.ndarray) -> str:
    place = tuple(int(index) for index in np.argwhere(got != wanted)[0])
    return f"first difference at [clip, frame, feature] = {list(place)}: C {got[place]}, Python {wanted[place]}"


@pytest.fixture(scope="module", params=NAMES)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(spec_of(request.param), tmp_path_factory.mktemp(request.param))


def extreme_clips(samples: int = 16000) -> np.ndarray:
    """What breaks integer code: full scale of both signs, square waves, silence, single samples, the least of noises."""
    draw = np.random.default_rng(5)
    time = np.arange(samples)
    impulse, last, dc = (np.zeros(samples) for _ in range(3))
    impulse[samples // 3], last[-1], dc[:] = 32767, -32768, 1
    noise = draw.integers(-1, 2, samples)
    rows = [
        np.zeros(samples),
        np.full(samples, -32768),
        np.full(samples, 32767),
        np.where(time % 2, 32767, -32768),
        np.where(time // 8 % 2, 32767, -32768),  # 1 kHz
        np.where(time // 160 % 2, -32768, 32767),
        impulse,
        last,
        dc,
        noise,
        np.where(time < samples // 2, 0, noise),
        np.where(time < samples // 2, noise, draw.integers(-32768, 32768, samples)),
        np.where(np.sin(time**2 * 1e-4) > 0, 32767, -32768),  # every frequency at full scale
        np.rint(32767 * np.sin(2 * np.pi * 440 / 16000 * time)),
    ]
    return np.stack(rows).astype(np.int16)


def random_clips(count: int, samples: int = 16000, seed: int = 0) -> np.ndarray:
    """Noise of all loudnesses, white and with falling spectrum."""
    draw = np.random.default_rng(seed)
    spectrum = np.fft.rfft(draw.standard_normal((count, samples)))
    spectrum[::2] /= np.maximum(20.0, np.arange(spectrum.shape[1]))
    waves = np.fft.irfft(spectrum, samples)
    waves *= np.geomspace(1, 60000, count)[:, None] / np.abs(waves).max(1, keepdims=True)
    return np.rint(waves).clip(-32768, 32767).astype(np.int16)


def real_clips(count: int) -> np.ndarray | None:
    """Recordings of the test subset, or where it is absent the synthetic corpus; None where neither is there."""
    for folder in (ROOT.parent / "shared" / "data" / "gsc_test_subset", ROOT / "data" / "mini" / "raw" / "main"):
        files = sorted(file for file in folder.glob("*/*") if file.suffix in (".wav", ".flac"))
        if files:
            break
    else:
        return None
    clips = np.zeros((count, 16000), np.int16)
    for row, file in zip(clips, files[:: max(1, len(files) // count)], strict=False):
        samples = soundfile.read(file, dtype="int16", frames=16000)[0]
        row[: len(samples)] = samples
    return clips


def test_extreme_clips_are_identical(program: Program) -> None:
    program.check(extreme_clips())


def test_random_clips_are_identical(program: Program) -> None:
    program.check(random_clips(12))


def test_real_clips_are_identical(program: Program) -> None:
    clips = real_clips(16)
    if clips is None:
        pytest.skip("neither ../shared/data/gsc_test_subset nor data/mini is there")
    program.check(clips)


@pytest.mark.parametrize("samples", [15982, 16300, 8000, 2048])
def test_clips_of_other_lengths_are_identical(program: Program, samples: int) -> None:
    program.check(random_clips(3, samples))


ODD_ONES = {
    "factors 7 3 4": {"n_fft": 168, "window": 168, "hop": 60, "center": True, "mel_bands": 9, "coefficients": 9},
    "factors 5 5 2": {
        "n_fft": 100,
        "window": 99,
        "hop": 130,
        "center": False,
        "mel_bands": 8,
        "log": "db",
        "top_db": 20.0,
    },
    "short window in the middle": {
        "n_fft": 256,
        "window": 61,
        "hop": 50,
        "mel_bands": 12,
        "window_function": "hamming",
    },
    "odd length, centre on a sample": {"n_fft": 101, "window": 80, "hop": 33, "mel_bands": 5, "coefficients": 5},
    "odd length, centre between two": {
        "n_fft": 135,
        "window": 135,
        "hop": 40,
        "mel_bands": 7,
        "log": "db20",
        "log_floor": 1e-4,
        "power": 1.0,
    },
    "a high floor": {"n_fft": 64, "window": 64, "hop": 32, "mel_bands": 6, "log_floor": 3.0, "coefficients": 4},
    "a floor far below one code": {
        "n_fft": 64,
        "window": 64,
        "hop": 32,
        "mel_bands": 30,
        "log_floor": 1e-30,
        "power": 1.0,
    },
    "zeros after the end": {
        "n_fft": 64,
        "window": 50,
        "hop": 20,
        "mel_bands": 6,
        "framing": "window",
        "center": False,
        "log_floor": 1e-3,
    },
}


@pytest.mark.parametrize("name", ODD_ONES)
def test_other_settings_are_identical(name: str, tmp_path: Path) -> None:
    """Branches that no front end of conf/frontends takes, down to the shortest clip."""
    spec = FrontendSpec(**{"name": "test", "mel_bands": 10, **ODD_ONES[name]})
    program = Program(spec, tmp_path)
    shortest = 1 if spec.framing == "window" else spec.n_fft // 2 + 1 if spec.center else spec.n_fft
    for samples in (shortest, shortest + 1, shortest + 37, 1003):
        program.check(np.concatenate([extreme_clips(samples), random_clips(4, samples)]))


def test_short_clips_are_refused(program: Program) -> None:
    spec = program.frontend.spec
    shortest = 1 if spec.framing == "window" else spec.n_fft // 2 + 1 if spec.center else spec.n_fft
    program.check(random_clips(1, shortest))
    done = subprocess.run([str(program.path), "clip", "1", str(shortest - 1)], input=bytes(40000), capture_output=True)
    assert done.returncode == 1 and b"ERROR" not in done.stderr


def test_a_wrong_memory_size_does_not_compile(tmp_path: Path) -> None:
    tables = FixedFrontend(spec_of("hello_edge")).tables
    text = fixed_c.header(tables)
    size = fixed_c.memory(tables).state
    assert f"#define KFE_STATE_BYTES {size}\n" in text and f"{size} bytes of RAM" in text
    assert COMPILER is not None, "CI needs gcc"
    for stated, code in ((size, 0), (size + 4, 1)):
        changed = text.replace(f"KFE_STATE_BYTES {size}", f"KFE_STATE_BYTES {stated}")
        (tmp_path / fixed_c.HEADER_NAME).write_text(changed)
        command = [COMPILER, *WARNINGS, f"-I{tmp_path}", f"-I{INCLUDE}", "-fsyntax-only", str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert code == 0 or "state_has_the_stated_size" in done.stderr


def test_source_has_no_floating_point_and_no_allocation() -> None:
    for path in (SOURCE, INCLUDE / "kestrel_frontend.h"):
        code = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        assert not re.search(r"\b(float|double|malloc|calloc|realloc|free|alloca)\b|\d\.\d", code)


TARGETS = {
    "riscv64-unknown-elf-gcc": ["-march=rv32imc", "-mabi=ilp32", "--specs=picolibc.specs"],
    "arm-none-eabi-gcc": ["-mcpu=cortex-m4", "-mthumb", "--specs=picolibc.specs"],
}
HELPERS = {"memcpy", "memmove", "memset", "__ashldi3", "__ashrdi3", "__lshrdi3", "__muldi3", "__aeabi_llsl", "__aeabi_lasr",
           "__aeabi_llsr", "__aeabi_lmul", "__clzsi2"}  # fmt: skip


def test_compiles_for_microcontrollers(tmp_path: Path) -> None:
    """With every cross compiler that is installed, and for the host without a C library; only integer helpers are called."""
    assert COMPILER is not None, "CI needs gcc"
    compilers = {name: options for name, options in TARGETS.items() if shutil.which(name)} | {
        COMPILER: ["-ffreestanding"]
    }
    for name in ("iscas21", "nas_kws", "spartus"):
        fixed_c.write_header(FixedFrontend(spec_of(name)).tables, tmp_path / fixed_c.HEADER_NAME)
        for compiler, options in compilers.items():
            target = tmp_path / "frontend.o"
            command = [
                compiler,
                *WARNINGS,
                "-Os",
                *options,
                f"-I{tmp_path}",
                f"-I{INCLUDE}",
                "-c",
                str(SOURCE),
                "-o",
                str(target),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            symbols = subprocess.run(["nm", "-u", str(target)], capture_output=True, text=True, check=False).stdout
            foreign = set(re.findall(r"U (\S+)", symbols)) - HELPERS - {"__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_"}
            assert not foreign, f"{compiler}: {foreign}"


EMULATORS = {
    "riscv64-unknown-elf-gcc": (
        ["--oslib=semihost", "--crt0=hosted", "-Wl,--defsym=__flash=0x80000000", "-Wl,--defsym=__flash_size=0x200000",
         "-Wl,--defsym=__ram=0x80200000", "-Wl,--defsym=__ram_size=0x200000"],
        ["qemu-system-riscv32", "-machine", "virt", "-bios", "none", "-cpu", "rv32", "-icount", "shift=0"],
    ),
    "arm-none-eabi-gcc": (
        ["--oslib=semihost", "--crt0=hosted", "-Wl,--defsym=__flash=0x00000000", "-Wl,--defsym=__flash_size=0x400000",
         "-Wl,--defsym=__ram=0x20000000", "-Wl,--defsym=__ram_size=0x400000"],
        ["qemu-system-arm", "-machine", "mps2-an386", "-cpu", "cortex-m4"],
    ),
}  # fmt: skip


if COMPILER is not None:  # the same program on this machine
    TARGETS[COMPILER] = []
    EMULATORS[COMPILER] = ([], [])


def fnv1a(data: bytes) -> int:
    value = 2166136261
    for byte in data:
        value = (value ^ byte) * 16777619 & 0xFFFFFFFF
    return value


def run_emulated(compiler: str, spec: FrontendSpec, clip: np.ndarray, folder: Path) -> str:
    """What the driver prints for one clip, on the emulated processor of `compiler` or on this machine."""
    link, emulator = EMULATORS[compiler]
    frontend = FixedFrontend(spec)
    fixed_c.write_header(frontend.tables, folder / fixed_c.HEADER_NAME)
    values = ",".join(str(value) for value in clip)
    text = f"#define SAMPLES {len(clip)}\n#define FRAMES {frontend.frames(len(clip))}\n"
    (folder / "clip.h").write_text(f"{text}static const int16_t clip[SAMPLES] = {{{values}}};\n")
    image = folder / "image.elf"
    command = [compiler, *WARNINGS, "-O2", "-DEMBEDDED", *TARGETS[compiler], *link, f"-I{folder}", f"-I{INCLUDE}"]
    done = subprocess.run(
        [*command, str(SOURCE), str(DRIVER), "-o", str(image)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    options = [
        "-nographic",
        "-monitor",
        "none",
        "-serial",
        "none",
        "-semihosting-config",
        "enable=on,target=native",
        "-kernel",
    ]
    start = [*emulator, *options] if emulator else []
    done = subprocess.run(
        [*start, str(image)], capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
    )
    return done.stdout + done.stderr


def test_emulated_microcontrollers_are_identical(tmp_path: Path) -> None:
    """One clip on this machine and on each emulator that is installed."""
    clip = random_clips(1, 4000, seed=3)[0] * np.int16(3) + np.int16(100)
    clip[2000:] = extreme_clips(2000)[12]
    for name in ("iscas21", "nas_kws", "spartus"):
        spec = spec_of(name)
        checksum = f"checksum {fnv1a(FixedFrontend(spec)(clip[None])[0].astype('<i2').tobytes()):08x}"
        for compiler, (_, emulator) in EMULATORS.items():
            if shutil.which(compiler) and all(shutil.which(program) for program in emulator[:1]):
                assert checksum in run_emulated(compiler, spec, clip, tmp_path)

"""Build of the native kernels: `python -m kestrel.nn.build` (part of the set-up; it never fails, it reports one line).

The library is kept under the hash of its source, its compiler flags and torch's version, inside the virtual environment
or else in the user's cache folder, so that a changed source or torch finds no stale one.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from kestrel.errors import KestrelError
from kestrel.store.atomic import atomic_path

SOURCES = tuple(sorted((Path(__file__).parent / "csrc").glob("*.[chi]*")))  # *.cpp, and *.h and *.inc that they include
LIBRARY = "native.so"
FLAGS = (
    *("-O3", "-std=c++20", "-fPIC", "-shared"),
    # No contraction into fused multiply-adds: the same rounding as PyTorch's operators, on every processor.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-unknown-pragmas", "-Wno-psabi"),
)
_SECONDS = 300


def cache_folders() -> list[Path]:
    """Folders that may hold the library, best first."""
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES))
    digest.update("\n".join([torch.__version__, platform.machine(), sys.platform, *FLAGS]).encode())
    name = f"native-{digest.hexdigest()[:16]}"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    inside = [Path(sys.prefix) / "share" / "kestrel" / name] if sys.prefix != sys.base_prefix else []
    return [*inside, home / "kestrel" / name]


def find() -> Path | None:
    """The built library for this source and this torch, if there is one."""
    return next((folder / LIBRARY for folder in cache_folders() if (folder / LIBRARY).is_file()), None)


def compiler() -> str | None:
    """The C++ compiler: CXX, else c++, g++ or clang++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def _exports_sgemm(folder: Path) -> bool:
    """Whether torch's library exports the BLAS it was built with; without, products go through ATen's operators."""
    return any(hasattr(ctypes.CDLL(str(path)), "sgemm_") for path in folder.glob("libtorch_cpu.*"))


def _command(cxx: str, output: Path, options: tuple[str, ...]) -> list[str]:
    root = Path(torch.__file__).parent
    macos = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()
    abi = int(torch.compiled_with_cxx11_abi())
    include, lib = root / "include", root / "lib"
    units = [str(source) for source in SOURCES if source.suffix == ".cpp"]
    return [
        *(cxx, *FLAGS, *options, *macos, f"-D_GLIBCXX_USE_CXX11_ABI={abi}"),
        *(f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}", *units, "-o", str(output)),
        *(f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch", "-ltorch_cpu", "-lc10"),
    ]


def _compile(cxx: str, output: Path, options: tuple[str, ...]) -> None:
    for openmp in (("-fopenmp",), ()):  # some compilers come without OpenMP
        command = _command(cxx, output, (*options, *openmp))
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KestrelError(f"{cxx} failed: {error}") from None
        if run.returncode == 0:
            break
    else:
        lines = [line for line in run.stderr.splitlines() if "error" in line.lower()] or run.stderr.splitlines()
        raise KestrelError(f"{cxx} failed: {(lines or ['no message'])[0].strip()}")
    try:
        ctypes.CDLL(str(output))
    except OSError as error:
        raise KestrelError(f"the library does not load: {error}") from None


def build(folder: Path | None = None, options: tuple[str, ...] | None = None) -> Path:
    """Compile the library into `folder` (default: the first cache folder that can be written) and return its path.

    `options` replaces the compiler options that depend on this machine. Raises KestrelError, in one line, where there is
    no compiler, it fails, or no folder can be written.
    """
    cxx = compiler()
    if cxx is None:
        raise KestrelError("no C++ compiler (install g++ or set CXX)")
    if options is None:
        options = ("-DKESTREL_SGEMM",) if _exports_sgemm(Path(torch.__file__).parent / "lib") else ()
    for place in [folder] if folder else cache_folders():
        try:
            place.mkdir(parents=True, exist_ok=True)
            writable = os.access(place, os.W_OK)
        except OSError:
            writable = False
        if writable:
            with atomic_path(place / LIBRARY) as temporary:
                _compile(cxx, temporary, options)
            return place / LIBRARY
    raise KestrelError(f"cannot write {cache_folders()[-1]}")


def main() -> int:
    """Build the library unless it is there; print one line. Always succeeds: there is a path in pure PyTorch."""
    start = time.perf_counter()
    try:
        known = find()
        path = known or build()
        print(
            f"native kernels: {'ready' if known else f'built in {time.perf_counter() - start:.0f} s'} ({path.parent})"
        )
    except (KestrelError, OSError) as error:
        print(f"native kernels: not built, the pure PyTorch path will be used ({error})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

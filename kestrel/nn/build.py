"""Build of the native LSTM: `python -m kestrel.nn.build` (part of the set-up; it never fails, it reports one line).

The library is kept under the hash of its source, its compiler flags and torch's version, inside the virtual environment
or else in the user's cache folder, so that a changed source or torch finds no stale one.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from kestrel.errors import KestrelError
from kestrel.store.atomic import atomic_path

SOURCE = Path(__file__).parent / "csrc" / "quant_lstm.cpp"
SOURCES = (SOURCE, SOURCE.with_name("quant_lstm_loops.inc"))
LIBRARY = "quant_lstm.so"
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
    named = os.environ.get("CXX")
    return next((found for name in ([named] if named else ["c++", "g++", "clang++"]) if (found := shutil.which(name))), None)


def _exports_sgemm(folder: Path) -> bool:
    """Whether torch's library exports the BLAS it was built with; without, products go through ATen's operators."""
    return any(hasattr(ctypes.CDLL(str(path)), "sgemm_") for path in folder.glob("libtorch_cpu.*"))


def _command(cxx: str, output: Path, openmp: bool) -> list[str]:
    root = Path(torch.__file__).parent
    macos = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    abi = int(torch.compiled_with_cxx11_abi())
    blas = ["-DKESTREL_SGEMM"] if _exports_sgemm(root / "lib") else []
    return [
        *(cxx, *FLAGS, *(["-fopenmp"] if openmp else []), *blas, *macos, f"-D_GLIBCXX_USE_CXX11_ABI={abi}"),
        *(f"-I{root / 'include'}", f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"),
        *(str(SOURCE), "-o", str(output), f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]


def build(folder: Path | None = None) -> Path:
    """Compile the library into `folder` (default: the first cache folder that can be written) and return its path.

    Raises KestrelError, in one line, where there is no compiler or it fails.
    """
    cxx = compiler()
    if cxx is None:
        raise KestrelError("no C++ compiler (install g++ or set CXX)")
    for place in [folder] if folder else cache_folders():
        try:
            with atomic_path(place / LIBRARY) as temporary:
                for openmp in (True, False):  # some compilers come without OpenMP
                    command = _command(cxx, temporary, openmp)
                    run = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
                    if run.returncode == 0:
                        break
                else:
                    errors = [line for line in run.stderr.splitlines() if "error" in line.lower()] or [run.stderr[-200:]]
                    raise KestrelError(f"{shlex.join(command[:1])} failed: {errors[0].strip()}")
            return place / LIBRARY
        except (OSError, KestrelError) as error:
            if isinstance(error, KestrelError) and "failed" in str(error):
                raise
            problem = error
        except subprocess.TimeoutExpired:
            raise KestrelError(f"{cxx} failed: no result after {_SECONDS} s") from None
    raise KestrelError(f"cannot write the library ({problem})")


def main() -> int:
    """Build the library unless it is there; print one line. Always succeeds: there is a path in pure PyTorch."""
    start = time.perf_counter()
    try:
        known = find()
        path = known or build()
        print(f"native LSTM: {'ready' if known else f'built in {time.perf_counter() - start:.0f} s'} ({path.parent})")
    except KestrelError as error:
        print(f"native LSTM: not built, the pure PyTorch path will be used ({error})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

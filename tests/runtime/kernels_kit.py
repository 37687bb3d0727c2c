"""Kernels of computers, compiled once per set of flags: a model takes far less time to compile than they do."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

from cc_kit import GCC

from kestrel.export.c_check import Toolchain
from kestrel.export.c_files import RUNTIME

KERNELS = ("kestrel_ops", "kestrel_isa", "kestrel_avx2", "kestrel_avx512", "kestrel_neon")
_folders: list[tempfile.TemporaryDirectory[str]] = []  # live as long as this process


@functools.cache
def toolchain(flags: str, cc: str = GCC) -> Toolchain:
    """gcc with `flags`, for models without a front end, that links kernels which were compiled with the same flags."""
    held = tempfile.TemporaryDirectory()
    _folders.append(held)
    objects = [str(Path(held.name) / f"{name}.o") for name in KERNELS]
    running = [
        subprocess.Popen(
            [*cc.split(), "-std=c99", "-Wall", "-Wextra", "-Werror", "-DKESTREL_SIMD", *flags.split(),
             f"-I{RUNTIME / 'include'}", "-c", str(RUNTIME / "src" / f"{name}.c"), "-o", target]
        )
        for name, target in zip(KERNELS, objects, strict=True)
    ]  # fmt: skip
    statuses = [process.wait() for process in running]
    assert not any(statuses), "the kernels do not compile"
    return Toolchain(cc, flags, ("SOURCES=main.c model.c", f"LDFLAGS={' '.join(objects)}"))

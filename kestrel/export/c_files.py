"""The folder of a C model: generated source, runtime, host program and Makefile."""

from __future__ import annotations

from pathlib import Path

from kestrel.errors import KestrelError
from kestrel.export.c_model import CModel
from kestrel.store.atomic import write_text

RUNTIME = Path(__file__).resolve().parents[2] / "runtime"
MODEL_FILES = {
    "model.c": "the network: constants, ops, memory",
    "model.h": "its entry points, shapes and scales",
    "kestrel.h": "the kernels, declared",
    "kestrel_ops.c": "the kernels, C99 without heap and floating point",
    "kestrel_inner.h": "what the files of kernels share",
    "kestrel_isa.h": "vector kernels of computers (-DKESTREL_SIMD; a microcontroller needs none of these files): names",
    "kestrel_isa.c": "the choice among them when a program starts",
    "kestrel_fast.h": "vector kernels, element by element",
    "kestrel_products.h": "vector kernels of products",
    "kestrel_sparse.h": "vector kernels of changes",
    "kestrel_vector.h": "vector operations of AVX2, AVX-512 and NEON",
    "kestrel_avx2.c": "kernels for AVX2",
    "kestrel_avx512.c": "kernels for AVX-512 with VNNI",
    "kestrel_neon.c": "kernels for NEON",
    "main.c": "host program: features or sound in, classes out",
    "Makefile": "make builds it, make sanitize with checks of memory and undefined behaviour",
}
WAV_FILES = {
    "kestrel_frontend_tables.h": "constants of the fixed-point front end",
    "kestrel_frontend.h": "the fixed-point front end, declared",
    "kestrel_frontend.c": "the fixed-point front end: samples in, features out",
    "sound.h": "the model behind the front end, declared",
    "sound.c": "the model behind the front end: a clip at once, or samples as they come",
    "wav.h": "sound files, declared",
    "wav.c": "sound files",
}
_FOLDERS = ("include", "src", "targets", "targets/host")


def files(model: CModel) -> dict[str, str]:
    """Names of the files of a C model, and what each is."""
    return MODEL_FILES | (WAV_FILES if model.wav else {})


def write_c(model: CModel, folder: Path) -> None:
    """Write the files of `model` into `folder`. Raises KestrelError where the runtime is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"model.c": model.source, "model.h": model.header}
    if model.wav:
        made["kestrel_frontend_tables.h"] = model.wav.tables
    for name in files(model):
        if name not in made:
            source = next((path for part in _FOLDERS if (path := RUNTIME / part / name).is_file()), None)
            if source is None:
                raise KestrelError(f"{name} is missing from the folder runtime/: export from a complete checkout")
            made[name] = source.read_text(encoding="utf-8")
        write_text(folder / name, made[name])

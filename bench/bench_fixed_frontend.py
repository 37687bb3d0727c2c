"""Fixed-point front ends against the float ones: difference of features and of quantiser codes, speed, memory.

    python -m bench.bench_fixed_frontend FOLDER [--clips N]

FOLDER holds word folders with 16 kHz clips (wav or flac), for example ../shared/data/gsc_test_subset.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

from kestrel.frontend import fixed_c
from kestrel.frontend.features import Frontend
from kestrel.frontend.fixed import FixedFrontend
from kestrel.frontend.spec import FrontendSpec
from kestrel.quant.quantiser import quantise
from kestrel.settings import build, load_yaml

CONF = Path(__file__).resolve().parents[1] / "conf" / "frontends"
RANGE = 128.0
BITS = (8, 4)


def read_clips(folder: Path, count: int) -> np.ndarray:
    """int16 [count, 16000], evenly from the sorted files below `folder`."""
    files = sorted(file for file in folder.glob("*/*") if file.suffix in (".wav", ".flac"))
    files = [files[len(files) * number // count] for number in range(count)] if len(files) > count else files
    clips = np.zeros((len(files), 16000), np.int16)
    for row, file in zip(clips, files, strict=True):
        samples = soundfile.read(file, dtype="int16", frames=16000)[0]
        row[: len(samples)] = samples
    return clips


def code_difference(fixed: torch.Tensor, wanted: torch.Tensor, bits: int) -> torch.Tensor:
    """|difference| in codes of an input quantiser of `bits` over +-RANGE."""
    step = RANGE / 2 ** (bits - 1)
    return (quantise(fixed, bits, RANGE) - quantise(wanted, bits, RANGE)).abs() / step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=1000)
    arguments = parser.parse_args()
    clips = read_clips(arguments.folder, arguments.clips)
    if not len(clips):
        parser.error(f"no clips in {arguments.folder}")
    columns = (
        "max diff | mean diff | 8 bits: max, mean codes | 4 bits: max, mean codes | s / 5,000 clips | RAM | tables"
    )
    print(f"{len(clips)} clips\nfront end | step | {columns}")
    for path in sorted(CONF.glob("*.yaml")):
        spec = build(FrontendSpec, load_yaml(path), path.stem)
        fixed = FixedFrontend(spec)
        start = time.perf_counter()
        codes = fixed(clips)
        seconds = (time.perf_counter() - start) * 5000 / len(clips)
        mine, wanted = torch.from_numpy(fixed.dequantise(codes)), Frontend(spec)(torch.from_numpy(clips))
        difference = (mine - wanted).abs()
        cells = [spec.name, f"2^-{fixed.fraction_bits}", f"{difference.max():.4f}", f"{difference.mean():.5f}"]
        for bits in BITS:
            changed = code_difference(mine, wanted, bits)
            cells.append(f"{changed.max():.0f}, {changed.mean():.5f}")
        use = fixed_c.memory(fixed.tables)
        print(" | ".join([*cells, f"{seconds:.0f}", str(use.state), str(use.tables)]), flush=True)


if __name__ == "__main__":
    main()

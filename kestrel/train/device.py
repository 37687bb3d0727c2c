"""Where to compute, and random numbers that a resumed run draws again."""

from __future__ import annotations

import ctypes
import os

import torch

from kestrel.errors import KestrelError
from kestrel.store.hashing import sha256_json

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names of the settings, from malloc.h of glibc
_LARGEST_MMAP_THRESHOLD = 32 << 20  # bytes; more is refused
_KEPT = (1 << 31) - 1  # bytes


def keep_memory() -> bool:
    """Let the C library keep freed memory: the next step needs as much, and fresh pages cost more than the arithmetic.

    Returns whether it does; only glibc is asked.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))


def choose_device(name: str) -> torch.device:
    """The device called auto, cpu, cuda or mps; auto is CUDA where there is a device, else the CPU.

    Under torchrun each process takes the CUDA device of its local rank. Raises KestrelError where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise KestrelError("train.device: no CUDA device can be used here; take auto or cpu")
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise KestrelError(f"there are {torch.cuda.device_count()} CUDA devices: start fewer processes")
        return torch.device("cuda", local)
    if name == "mps" and not torch.backends.mps.is_available():
        raise KestrelError("train.device: mps works on Apple machines only; take auto or cpu")
    return torch.device(name)


def seed_generator(device: torch.device, *key: int | str) -> None:
    """Start the device's default generator, and the CPU's, from a number made of `key`."""
    seed = int(sha256_json(list(key))[:15], 16)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)

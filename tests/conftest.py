"""What tests of whole runs share: a copy of the code to run in, and a small corpus of tones."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from run_kit import Checkout, copy_code, write_tone_corpus

# Exported programs share their kernels: where ccache is installed, equal sources are compiled once in all tests.
if shutil.which("ccache") and shutil.which("cc"):
    os.environ.setdefault("CC", "ccache cc")
    os.environ.setdefault("CCACHE_NOHASHDIR", "1")  # folders of builds differ


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A copy of the code, shared by all tests (use your own --tag); its path has a space."""
    return copy_code(tmp_path_factory.mktemp("checkout") / "kestrel copy")


@pytest.fixture
def own_checkout(tmp_path: Path) -> Checkout:
    """A copy of the code for one test alone."""
    return copy_code(tmp_path / "own kestrel")


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 words x 30 speakers x 1 clip of 0.5-1 s and two noise files of 24 s; do not change it. Its path has a space."""
    return write_tone_corpus(tmp_path_factory.mktemp("corpora") / "tiny corpus")

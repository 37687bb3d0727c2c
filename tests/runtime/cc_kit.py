"""The compiler of tests that build C: gcc, behind ccache where that is installed (tests/conftest.py)."""

from __future__ import annotations

import os
import shutil

import pytest

from kestrel.export.c_check import Toolchain

GCC = os.environ.get("CC", "gcc")
QUICK = Toolchain(GCC, "-O1", ("VECTORS=",))  # the portable kernels alone compile fast
needs_compiler = pytest.mark.skipif(
    shutil.which("gcc") is None or shutil.which("make") is None, reason="needs gcc and make: apt-get install gcc make"
)

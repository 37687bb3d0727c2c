"""The native library, built once where there is a compiler."""

from __future__ import annotations

import pytest

from kestrel.errors import KestrelError
from kestrel.nn import build, native


@pytest.fixture(scope="session")
def native_library():
    """Path of the built library; skips where there is no compiler."""
    if build.compiler() is None:
        pytest.skip("no C++ compiler: the native kernels cannot be built here")
    path = build.find() or build.build()
    native._load.cache_clear()
    if native._load() is None:
        raise KestrelError("the native kernels were built but does not load")
    return path

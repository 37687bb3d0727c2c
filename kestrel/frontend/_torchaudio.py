"""The single place that imports torchaudio, also where its compiled extension does not fit the installed torch.

torchaudio's wheels carry an extension built for CUDA, which cannot be loaded beside a CPU build of torch. Its
transforms and filter definitions are pure PyTorch and need no extension, so a stand-in takes its place, only after the
plain import failed.
"""

from __future__ import annotations

import logging
import sys
import types
import warnings

from kestrel.errors import KestrelError

_log = logging.getLogger("kestrel")
_EXTENSION = "torchaudio._extension"


def _without_extension() -> types.ModuleType:
    stub = types.ModuleType(_EXTENSION)
    stub.__path__ = []
    members = {
        "_IS_TORCHAUDIO_EXT_AVAILABLE": False,
        "_IS_ALIGN_AVAILABLE": False,
        "_check_cuda_version": lambda: None,
        "fail_if_no_align": lambda function: function,
    }
    for name, member in members.items():
        setattr(stub, name, member)
    return stub


def _load() -> types.ModuleType:
    try:
        import torchaudio
    except ModuleNotFoundError as error:
        if error.name != "torchaudio":
            raise
        raise KestrelError("torchaudio is not installed: run ./run.sh once, or pip install torchaudio") from None
    except (OSError, ImportError, RuntimeError) as error:
        _log.debug(
            "torchaudio's extension cannot be loaded (%s); using its pure-PyTorch parts", str(error).splitlines()[0]
        )
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
            del sys.modules[name]
        sys.modules[_EXTENSION] = _without_extension()
        import torchaudio
    return torchaudio


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecation notes of parts that are not used here
    torchaudio = _load()
    import torchaudio.functional as functional
    import torchaudio.transforms as transforms

__all__ = ["functional", "torchaudio", "transforms"]

"""The front end of settings, in the arithmetic that they ask for."""

from __future__ import annotations

from typing import TypeGuard

from kestrel.frontend.features import Frontend
from kestrel.frontend.filter_bank import FilterBank
from kestrel.frontend.fixed import FixedFeatures
from kestrel.frontend.shift_add import ShiftAddFeatures
from kestrel.frontend.spec import FrontendSpec

IntegerFrontend = FixedFeatures | ShiftAddFeatures
AnyFrontend = Frontend | FilterBank | IntegerFrontend


def make_frontend(spec: FrontendSpec) -> AnyFrontend:
    """The module from audio to features. Raises UsageError where the settings contradict each other, or have no fixed form."""
    if spec.arithmetic == "shift-add":
        return ShiftAddFeatures(spec)
    if spec.filters == "iir":
        return FilterBank(spec)
    return FixedFeatures(spec) if spec.arithmetic == "fixed" else Frontend(spec)


def makes_codes(frontend: AnyFrontend) -> TypeGuard[IntegerFrontend]:
    """Whether features are integer codes, with a `scale`."""
    return isinstance(frontend, (FixedFeatures, ShiftAddFeatures))

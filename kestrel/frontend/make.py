"""The front end of settings, in the arithmetic that they ask for."""

from __future__ import annotations

from kestrel.frontend.features import Frontend
from kestrel.frontend.fixed import FixedFeatures
from kestrel.frontend.spec import FrontendSpec

AnyFrontend = Frontend | FixedFeatures


def make_frontend(spec: FrontendSpec) -> AnyFrontend:
    """The module from audio to features. Raises UsageError where the settings contradict each other, or have no fixed form."""
    return FixedFeatures(spec) if spec.arithmetic == "fixed" else Frontend(spec)

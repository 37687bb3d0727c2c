"""Errors that a person can act on, and the exit codes of the step scripts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_AGAIN = 75  # EX_TEMPFAIL: the state is saved, run the same command again


class KestrelError(Exception):
    """A problem that the user can solve. Its text is one line that says what to do."""


class UsageError(KestrelError):
    """A wrong option, key or name on the command line or in a configuration file."""


class RunAgain(Exception):
    """Work was stopped by a signal after its state was saved (exit code 75)."""


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice closest to `name`, or None where nothing is close."""
    matches = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """An error for a name that is not among `choices`; it names the nearest match or all choices."""
    choices = sorted(choices)
    match = nearest(name, choices)
    hint = f"did you mean {match!r}?" if match else f"known: {', '.join(choices) or 'none'}"
    return UsageError(f"unknown {kind} {name!r}; {hint}")

"""Stopping on request: a handler only sets a flag, the loop saves at the next batch edge."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType

# SIGTERM: kill, cluster time limit. SIGUSR1: Slurm's early warning (--signal=B:USR1@120). SIGINT: Ctrl-C.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))


class StopFlag:
    """A context that turns stop signals into a flag: `if flag: save and leave`.

    A second signal changes nothing, so that a save is never cut short. Handlers go back to what they were at the end;
    the same flag may be entered again inside. Off the main thread, where Python allows no handlers, `set` still works.
    """

    asked = False  # whether a stop was asked of any flag of this process: it is about to end

    def __init__(self) -> None:
        self.signal: str | None = None
        self._old: dict[int, object] = {}
        self._depth = 0

    def __bool__(self) -> bool:
        return self.signal is not None

    def set(self, name: str) -> None:
        """Ask for a stop; `name` says who asked."""
        self.signal = self.signal or name
        StopFlag.asked = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.set(signal.Signals(number).name)

    def __enter__(self) -> StopFlag:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth:
            return
        for number, handler in self._old.items():
            # None: the old handler was not set from Python and cannot be put back from Python
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._old.clear()


def ignore_stop_signals() -> None:
    """For loader processes: a signal sent to the whole process group must not end them before the state is saved."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def held_stop_signals() -> Iterator[None]:
    """Hold stop signals back while processes are started, so that none meets a child that does not ignore them yet.

    The children inherit the mask and keep it; in this process a held signal arrives at the end of the block, or at once
    where another thread takes it.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    old = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)

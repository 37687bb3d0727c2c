"""Worker processes that neither outlive a killed parent nor answer Ctrl-C in its place."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class WorkerPool(ProcessPoolExecutor):
    """A pool of freshly started processes (not forked, so that no state of the parent gets in).

    After SIGKILL of the parent they end too. They are started with SIGINT held back: the parent alone reports Ctrl-C.
    """

    def __init__(self, workers: int, max_tasks_per_child: int | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        super().__init__(workers, context, initializer=_end_with_parent, max_tasks_per_child=max_tasks_per_child)

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        """As in ProcessPoolExecutor; processes, and the thread that replaces them, are started here."""
        old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(function, *arguments, **keywords)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)

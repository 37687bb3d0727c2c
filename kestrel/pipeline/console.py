"""What people see: log lines on the terminal and in a file, and a progress bar with the time left."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from pathlib import Path
from typing import ClassVar

log = logging.getLogger("kestrel")


def duration(seconds: float) -> str:
    """`75.2` as `1 min 15 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Progress:
    """A progress callback: a bar with the time left on a terminal, a line per quarter elsewhere."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.stream = sys.stderr
        self.terminal = self.stream.isatty()
        self.started: float | None = None
        self.offset = 0
        self.drawn = 0.0
        self.quarter = 0
        self.width = 0

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """Show that `done` of `total` is reached; `text` stands behind the bar."""
        now = time.monotonic()
        if self.started is None:
            self.started, self.offset = now, done
        if total <= 0:
            return
        rate = (done - self.offset) / (now - self.started) if now > self.started else 0.0
        if self.terminal:
            if now - self.drawn < 0.1 and done < total:
                return
            self.drawn = now
            left = f"{duration((total - done) / rate)} left" if rate > 0 and done < total else ""
            filled = int(24 * done / total)
            line = f"  {self.label} [{'#' * filled}{'.' * (24 - filled)}] {done}/{total}  {left}  {text}"
            line = line[: shutil.get_terminal_size((100, 20)).columns - 1]
            self.stream.write("\r" + line.ljust(self.width))
            self.width = len(line)
            self.stream.flush()
        elif done * 4 // total > self.quarter and done < total and now - self.started > 5:
            self.quarter = done * 4 // total
            log.info("%s %d/%d, %s left", self.label, done, total, duration((total - done) / rate) if rate > 0 else "?")

    def clear(self) -> None:
        """Wipe the bar, so that a log line can take its place."""
        if self.terminal and self.width:
            self.stream.write("\r" + " " * self.width + "\r")
            self.stream.flush()
            self.width = 0


class _Console(logging.StreamHandler):
    """Log lines on stderr that do not collide with a progress bar."""

    bars: ClassVar[list[Progress]] = []

    def emit(self, record: logging.LogRecord) -> None:
        for bar in self.bars:
            bar.clear()
        super().emit(record)


def progress(label: str) -> Progress:
    """A progress callback that log lines step around."""
    bar = Progress(label)
    _Console.bars.append(bar)
    return bar


def setup_logging(file: Path | None = None) -> None:
    """Send the `kestrel` log to stderr and, with dates, to the end of `file`."""
    logging.raiseExceptions = False  # a full disk must not add tracebacks of the log file to the one line about it
    logger = logging.getLogger("kestrel")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers.clear()
    console = _Console(sys.stderr)
    console.setFormatter(logging.Formatter("  %(message)s"))
    logger.addHandler(console)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(file, encoding="utf-8", delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)

"""Markdown for reports and cards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def cell(value: Any) -> str:
    """A value as the text of a table cell: whole numbers with thousands separators, None as `-`."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return " ".join(str(value).split()).replace("|", "\\|")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; columns that hold numbers alone are aligned to the right."""
    rows = [list(row) for row in rows]
    numeric = [
        bool(rows)
        and all(row[column] is None or isinstance(row[column], (int, float)) or _is_share(row[column]) for row in rows)
        for column in range(len(header))
    ]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join("--:" if right else "---" for right in numeric) + "|"]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _is_share(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(" %")


def percent(share: float | None, digits: int = 1) -> str | None:
    """A share 0-1 as `12.3 %`; None stays None."""
    return None if share is None else f"{100 * share:.{digits}f} %"


def flat(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, text) of nested settings."""
    rows: list[tuple[str, str]] = []
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows += flat(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            rows.append((name, " ".join(str(item) for item in value) or "none"))
        else:
            rows.append((name, "none" if value is None or value == {} else str(value)))
    return rows

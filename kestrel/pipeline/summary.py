"""The lines that end a run."""

from __future__ import annotations

from kestrel.pipeline.console import duration
from kestrel.pipeline.stages import STAGES, Run, done_file
from kestrel.pipeline.work import stage_seconds
from kestrel.store.atomic import read_json


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000 or unit == "MB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def summary(run: Run) -> str:
    """What the run made so far, for the terminal."""
    place = run.exp.relative_to(run.root)
    lines = ["", f"{run.config.recipe} / {run.config.tag}"]
    score = run.out("score")
    if done_file(score).exists():
        result = read_json(score / "result.json")
        low, high = result["ci95"]
        lines += [
            f"  accuracy    {100 * result['accuracy']:.2f} %  (95 % interval {100 * low:.2f} to {100 * high:.2f}; {result['n']} {result['split']} clips)",
            f"  protocol    {result['protocol']['name']}, {len(run.config.classes)} classes",
            f"  size        {result['parameters']:,} parameters, weights {_size(result['weight_bytes'])}, {result['macs'] / 1e6:.2f} M multiply-adds per clip",
        ]
    seconds = stage_seconds(run)
    times = ", ".join(f"{stage.name} {duration(seconds[stage.name])}" for stage in STAGES if stage.name in seconds)
    if times:
        lines.append(f"  time        {times}")
    if done_file(score).exists():
        lines.append(f"  report      {place}/score/report.md")
    if done_file(run.out("export")).exists():
        lines.append(f"  files       {place}/export/ (start with card.md)")
    lines.append(f"  logs        {place}/log/")
    lines.append(
        "  try next    ./run.sh --corpus path/to/your/folder --variant mini     your own keywords, in GSC layout"
    )
    if run.config.model is not None and hasattr(run.config.model, "n_msb"):
        lines.append("              ./run.sh --set model.n_msb=1 --tag one-block             one block instead of four")
    lines.append("              ./run.sh --help                                          all options and settings")
    return "\n".join(lines) + "\n"

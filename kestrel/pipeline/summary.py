"""The lines that end a run."""

from __future__ import annotations

from kestrel.pipeline.console import duration
from kestrel.pipeline.stages import STAGES, Run, done_file
from kestrel.pipeline.work import stage_seconds
from kestrel.settings import load_yaml
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
    recipe = load_yaml(run.root / "recipes" / run.config.recipe / "recipe.yaml")
    hints = {**recipe.get("try", {}), "./run.sh --help": "all options and settings"}
    width = max(map(len, hints))
    for number, (command, text) in enumerate(hints.items()):
        lines.append(f"  {'' if number else 'try next':<11} {command:<{width}}   {text}")
    return "\n".join(lines) + "\n"

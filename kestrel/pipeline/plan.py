"""From the command line of run.sh to the list of stages to run; `steps/plan.py` calls it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kestrel.errors import UsageError, nearest, unknown
from kestrel.pipeline.config import Config, Options, resolve, save_text, variants
from kestrel.pipeline.stages import BY_NAME, STAGES, Run, present, settings_of, status
from kestrel.pipeline.sweep import OPTIONS as SWEEP_OPTIONS
from kestrel.pipeline.sweep import Point, Sweep, about, load_sweep, write_points
from kestrel.settings import describe, load_yaml
from kestrel.store.atomic import write_json, write_text
from kestrel.store.hashing import sha256_json
from kestrel.store.lock import lock

_PLACEHOLDER = re.compile(r"(corpus\.(test_)?dir=)?\$(FEATS|CORPUS|TEST|CHECKPOINT|SWEEP)")
BACKENDS = ("local", "slurm")
SETTINGS = ("corpus", "protocol", "frontend", "feature", "augment", "model", "train", "retrain", "score", "export")
log = logging.getLogger("kestrel")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(message)


def _parser() -> _Parser:
    parser = _Parser(prog="./run.sh", add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("--recipe", default=Options.recipe, metavar="NAME", help="recipe: a folder of recipes/")
    add(
        "--corpus",
        default=Options.corpus,
        metavar="NAME|DIR",
        help="corpus of conf/corpora.yaml, or a folder in GSC layout",
    )
    add("--protocol", metavar="NAME", help="protocol of conf/protocols; default: the corpus's own")
    add(
        "--variant",
        metavar="NAME",
        help="variant of the recipe, or a+b: both deltas; default: mini for corpus mini, else base",
    )
    add("--tag", metavar="NAME", help="folder of the run; default: <variant>-<protocol>-seed<seed>")
    add("--seed", type=int, default=0, metavar="N", help="seed of everything random")
    add("--stage", type=int, metavar="N", help="first stage; default: 0 (3 with --feat-dir)")
    add("--stop-stage", type=int, metavar="N", help="last stage; default: 6")
    add("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="change one setting (repeatable)")
    add("--feat-dir", metavar="DIR", help="train on feature files made elsewhere (stages 0-2 fall away)")
    add("--sweep", metavar="FILE", help="run a grid of settings and gather the results")
    add("--checkpoint", metavar="FILE", help="checkpoint that score and export take")
    add(
        "--pretrained",
        action="store_true",
        help="score and export the checkpoint kept with the recipe, without training",
    )
    add("--backend", default="local", metavar="NAME", help="where stages run: local or slurm")
    add("--nproc", type=int, default=os.cpu_count() or 1, metavar="N", help="processes for data work")
    add("--force", action="store_true", help="run the stages even if up to date, or unfinished with other settings")
    add("--dry-run", action="store_true", help="print what would run and why, and stop")
    add("--jobs", type=int, default=1, metavar="N", help="points of a sweep that run at the same time")
    add("--keep", action="store_true", help="keep the result in recipes/<name>/results and renew RESULTS.md")
    add(
        "--keep-pretrained",
        action="store_true",
        help="keep the trained weights, small, in recipes/<name>/pretrained for --pretrained",
    )
    add("--profile", action="store_true", help="write a profile of each stage into its log folder")
    add("--help", "-h", action="store_true", help="show this page")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the options. Raises UsageError that names the nearest option for an unknown one."""
    parser = _parser()
    known = [option for action in parser._actions for option in action.option_strings]
    for argument in arguments:
        option = argument.split("=")[0]
        if option.startswith("-") and len(option) > 1 and not option[1].isdigit() and option not in known:
            raise unknown("option", option, known)
    values, rest = parser.parse_known_args(list(arguments))
    if rest:
        hint = nearest(f"--{rest[0]}", known) if len(rest[0]) > 2 else None
        raise UsageError(
            f"unexpected argument {rest[0]!r}" + (f"; did you mean {hint}?" if hint else "; see ./run.sh --help")
        )
    if values.backend not in BACKENDS:
        raise unknown("backend", values.backend, BACKENDS)
    for name in ("stage", "stop_stage"):
        number = getattr(values, name)
        if number is not None and not 0 <= number <= STAGES[-1].number:
            raise UsageError(f"--{name.replace('_', '-')} {number}: stages are 0..{STAGES[-1].number}")
    for name in ("nproc", "jobs"):
        if getattr(values, name) < 1:
            raise UsageError(f"--{name} {getattr(values, name)}: at least 1")
    return values


def _given(arguments: Sequence[str]) -> dict[str, Any]:
    """The options that stand on the command line, without the defaults of the others."""
    parser = _parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(list(arguments)))


def options_of(values: argparse.Namespace) -> Options:
    """The options that choose and change the configuration."""
    return Options(**{field.name: getattr(values, field.name) for field in dataclasses.fields(Options)})


def help_text(values: argparse.Namespace, root: Path, start: Path) -> str:
    """The help page, with the values that the other options on the command line give."""
    lines = [
        "usage: ./run.sh [options]",
        "",
        "Train, score and export a keyword spotter in numbered stages, each of which can be resumed.",
        "",
        "Stages:",
    ]
    lines += [f"  {stage.number}  {stage.name:<10} {stage.does}" for stage in STAGES]
    lines += ["", "Options (current value in brackets):"]
    for action in _parser()._actions:
        value = getattr(values, action.dest)
        shown = "" if value is None or value is False or value == [] or action.dest == "help" else f" [{value}]"
        name = ", ".join(reversed(action.option_strings)) + (f" {action.metavar}" if action.metavar else "")
        lines.append(f"  {name:<24} {action.help}{shown}")
    config = resolve(root, options_of(values), start)
    lines += ["", f"Recipes: {', '.join(p.parent.name for p in sorted((root / 'recipes').glob('*/recipe.yaml')))}"]
    lines.append(f"Variants of {config.recipe}: {', '.join(variants(root, config.recipe))}")
    corpora = load_yaml(root / "conf" / "corpora.yaml").get("corpora", {})
    lines.append(f"Corpora: {', '.join(corpora)}, or any folder in GSC layout")
    lines.append(f"Protocols: {', '.join(sorted(p.stem for p in (root / 'conf' / 'protocols').glob('*.yaml')))}")
    lines += ["", f"Settings for --set (recipe {config.recipe}, variant {config.variant}; current value):"]
    for section in SETTINGS:
        value = getattr(config, section)
        if value is not None:
            lines += [f"  {key}={shown}  {text}" for key, shown, text in describe(type(value), value, section)]
    return "\n".join(lines) + "\n"


def _canonical(values: argparse.Namespace, config: Config, *, placeholders: bool) -> list[str]:
    """The command that makes this run again. With placeholders: paths outside the repository by name."""

    def place(path: str, name: str) -> str:
        return f"${name}" if placeholders and Path(path).is_absolute() else path

    command = ["./run.sh", "--recipe", config.recipe]
    if config.feat_dir is not None:
        command += ["--feat-dir", place(config.feat_dir, "FEATS")]
    elif config.corpus is not None:
        folder = config.corpus.dir
        command += [
            "--corpus",
            (folder if Path(folder).is_absolute() else f"./{folder}") if folder else config.corpus.name,
        ]
        if folder:
            command[-1] = place(command[-1], "CORPUS")
    if values.protocol:
        command += ["--protocol", values.protocol]
    command += ["--variant", config.variant, "--seed", str(config.seed)]
    if values.tag:
        command += ["--tag", values.tag]
    for text in values.set:
        for key, name in (("dir", "CORPUS"), ("test_dir", "TEST")):
            folder = getattr(config.corpus, key, None)
            if folder and text.startswith(f"corpus.{key}="):
                text = f"corpus.{key}={place(folder, name)}"
        command += ["--set", text]
    if values.pretrained:
        command.append("--pretrained")
    elif config.checkpoint is not None:
        command += ["--checkpoint", place(config.checkpoint, "CHECKPOINT")]
    return command


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _quote(words: list[str]) -> str:
    return " ".join(word if _PLACEHOLDER.fullmatch(word) else shlex.quote(word) for word in words)


def uncommitted(root: Path) -> bool | None:
    """Whether a checkout has changes that its commit lacks; None where it is not a git checkout.

    Kept results do not count, since they change nothing that a run does: those of several runs of one commit are all of it.
    """
    kept = (":(exclude)recipes/*/results/*", ":(exclude)recipes/*/RESULTS.md")
    status = _git(root, "status", "--porcelain", "--untracked-files=all", "--", ".", *kept)
    return None if status is None else bool(status)


def write_run(root: Path, exp: Path, config: Config, values: argparse.Namespace) -> None:
    """Write config.yaml, command.sh and env.json of a run. Raises KestrelError while another run uses the folder."""
    with lock(exp, "the start of a run", wait=False):
        write_text(exp / "config.yaml", save_text(config))
        up = os.path.relpath(root, exp)
        command = _quote(_canonical(values, config, placeholders=False))
        if exp.parent.name != config.recipe:  # a point of a sweep keeps its folder
            command += f" --exp-dir {shlex.quote(str(exp.relative_to(root)))}"
        text = f'#!/usr/bin/env bash\n# Replays this run; options are passed on, such as --stage 5.\ncd "$(dirname "$0")/{up}" && exec {command} "$@"\n'
        write_text(exp / "command.sh", text)
        os.chmod(exp / "command.sh", 0o755)
        versions = {}
        for package in ("torch", "torchaudio", "numpy", "h5py", "soundfile", "pandas", "onnx", "onnxruntime"):
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = "not installed"
        environment = {
            "command": _quote(_canonical(values, config, placeholders=True)),
            "git_commit": _git(root, "rev-parse", "HEAD"),
            "git_dirty": uncommitted(root),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "host": platform.node(),
            "cores": os.cpu_count(),
            "versions": versions,
        }
        write_json(exp / "env.json", environment)


@dataclass
class Planned:
    """A run with the stages that it shall go through."""

    run: Run
    values: argparse.Namespace
    stages: list[str]
    group: int = 0  # runs of one group follow each other; groups may run at the same time
    scores_only: bool = False  # a point of a sweep that scores the weights of another one

    def up_to_date(self, known: dict[str, str]) -> bool:
        """Whether no stage has anything to do; `known` keeps the answers about data that points share."""
        for name in self.stages:
            key = sha256_json([name, str(self.run.out(name)), settings_of(self.run, name)])
            if BY_NAME[name].number > 2 or present(self.run, name) is not None:
                action = status(self.run, name).action
            else:
                action = known[key] = known.get(key) or status(self.run, name).action
            if action not in ("skip", "absent"):
                return False
        return True


def _dry_run(planned: list[Planned], errors: dict[str, str]) -> str:
    lines = []
    for item in planned:
        run, stages = item.run, item.stages
        lines.append(f"{run.exp.relative_to(run.root)}:")
        checkpoint = run.config.checkpoint
        if item.scores_only and checkpoint is not None and not (run.root / checkpoint).exists():
            lines.append(f"  run: after the training of {Path(checkpoint).parent.parent.name}")
            continue
        expected: set[str] = set()
        for name in stages:
            state = status(run, name, frozenset(expected))
            word = {
                "absent": "nothing to do",
                "skip": "skip",
                "run": "run",
                "resume": "resume",
                "extend": "extend",
            }.get(state.action, "stop")
            lines.append(f"  stage {BY_NAME[name].number} {name:<9} {word}: {state.reason}")
            if word == "stop":
                break
            if state.action in ("run", "resume", "extend"):
                expected.add(name)
    lines += [f"{name}:\n  cannot run: {error}" for name, error in errors.items()]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str], root: Path, plan_file: Path, start: Path) -> None:
    """Resolve the options; print help or a dry run, or write the plan that run.sh walks through.

    The plan is made of tab-separated lines: `backend NAME`, `jobs N`, `flags FLAG...`, `extra NAME TEXT` for
    optional packages that are missing, `keep`, `keep_pretrained`, `sweep FOLDER gather|- REFUSED` where the runs are points of
    a sweep, then `stage EXP NUMBER NAME GROUP` in order.
    """
    arguments = list(arguments)
    exp_dir = None
    if "--exp-dir" in arguments:  # only in command.sh of sweep points
        at = arguments.index("--exp-dir")
        exp_dir = root / arguments[at + 1]
        del arguments[at : at + 2]
    values = parse(arguments)
    if values.help:
        sys.stdout.write(help_text(values, root, start))
        return
    first = values.stage if values.stage is not None else (3 if values.feat_dir else 0)
    last = values.stop_stage if values.stop_stage is not None else STAGES[-1].number
    if last < first:
        raise UsageError(f"--stop-stage {last} comes before --stage {first}")
    if values.keep_pretrained and (values.sweep or values.pretrained or values.checkpoint):
        raise UsageError(
            "--keep-pretrained keeps the weights of one run that trains: leave out --sweep and checkpoints"
        )
    swept: _Swept | None = None
    if values.sweep:
        swept = _plan_sweep(root, arguments, values, first, start)
        planned = swept.planned
    else:
        config = resolve(root, options_of(values), start)
        if exp_dir is not None:
            config.tag = exp_dir.name
        run = Run(root, exp_dir or root / "exp" / config.recipe / config.tag, config, values.nproc, values.force)
        trained = ("pretrain", "retrain") if values.pretrained else ()
        stages = [name for name in _stages(first, last) if name not in trained]
        if not stages:
            raise UsageError("--pretrained: the weights are there, stages 3 and 4 have nothing to train")
        planned = [Planned(run, values, stages)]
    if values.dry_run:
        sys.stdout.write(_dry_run(planned, swept.errors if swept else {}))
        return
    flags = (
        ["--nproc", str(values.nproc)]
        + (["--force"] if values.force else [])
        + (["--profile"] if values.profile else [])
    )
    lines = [f"backend\t{values.backend}", f"jobs\t{values.jobs}", "\t".join(["flags", *flags])]
    synthetic = any(item.run.config.corpus and item.run.config.corpus.kind == "synthetic" for item in planned)
    downloads = any("download" in item.stages for item in planned)
    if synthetic and downloads and importlib.util.find_spec("espeakng_loader") is None:
        lines.append(
            "extra\tmini\tespeakng-loader, speech synthesiser eSpeak NG (licence GPL-3.0), used at run time for corpus mini only"
        )
    if values.keep:
        lines.append("keep")
    if values.keep_pretrained:
        lines.append("keep_pretrained")
    if swept is not None:
        swept.write()
        lines.append(
            f"sweep\t{swept.folder.relative_to(root)}\t{'gather' if swept.gathers else '-'}\t{len(swept.errors)}"
        )
        known: dict[str, str] = {}
        left = [
            item
            for item in planned
            if values.force or not (item.run.exp / "config.yaml").exists() or not item.up_to_date(known)
        ]
        if len(left) < len(planned):
            log.info("%d of %d runs of the sweep are up to date", len(planned) - len(left), len(planned))
        planned = left
    for item in planned:
        write_run(root, item.run.exp, item.run.config, item.values)
        exp = item.run.exp.relative_to(root)
        lines += [f"stage\t{exp}\t{BY_NAME[name].number}\t{name}\t{item.group}" for name in item.stages]
    write_text(plan_file, "\n".join(lines) + "\n")


def _stages(first: int, last: int) -> list[str]:
    return [stage.name for stage in STAGES if first <= stage.number <= last]


@dataclass
class _Swept:
    """A sweep resolved into runs; points that cannot be resolved are in `errors`."""

    folder: Path
    sweep: Sweep
    points: list[Point]
    planned: list[Planned]
    errors: dict[str, str]
    description: dict[str, Any]
    gathers: bool

    def write(self) -> None:
        """Write the list of points; says which of them cannot run."""
        for name, error in self.errors.items():
            log.error("point %s cannot run: %s", name, error)
        write_points(self.folder, self.sweep, self.points, self.description)


def _plan_sweep(root: Path, arguments: Sequence[str], values: argparse.Namespace, first: int, start: Path) -> _Swept:
    """Resolve each point of a sweep. What stands on the command line goes before what stands in the file.

    A point that cannot be resolved is recorded as failed; where none can, the error of the first is raised.
    """
    path = Path(os.path.abspath(start / Path(values.sweep).expanduser()))
    given = _given(arguments)
    chosen = {key: given[key] for key in SWEEP_OPTIONS if key in given}
    sweep = load_sweep(path).narrowed(chosen, values.set)
    if values.pretrained or (values.checkpoint is not None and not sweep.score):
        option = "--pretrained" if values.pretrained else "--checkpoint"
        raise UsageError(
            f"{option} and --sweep: each point of a sweep scores weights of its own (--checkpoint serves sweeps over score settings)"
        )
    if values.tag:
        sweep.name = values.tag
    recipe = chosen.get("recipe") or sweep.options.get("recipe") or values.recipe
    folder = root / "exp" / recipe / "sweeps" / sweep.name
    last = values.stop_stage if values.stop_stage is not None else sweep.stop_stage
    if last < first:
        raise UsageError(f"{path.name} stops after stage {last}, before --stage {first}: give --stop-stage")
    points, planned = sweep.points(), []
    weights: dict[str, str] = {}
    problems: list[tuple[Point, UsageError]] = []
    group = 0
    for point in points:
        group += point.trains
        if values.checkpoint is not None and point.trained is None:
            continue  # all points score the checkpoint that was given
        own = argparse.Namespace(
            **{**vars(values), **point.options, "tag": None, "set": [*point.set, *values.set, *point.grid]}
        )
        try:
            config = resolve(root, options_of(own), start)
        except UsageError as error:
            point.error = str(error)
            problems.append((point, error))
            continue
        config.tag = point.name
        run = Run(root, folder / point.name, config, values.nproc, values.force)
        if values.checkpoint is not None:
            stages = _stages(max(first, BY_NAME["score"].number), last)
        elif point.trained is not None:
            if point.trained not in weights:
                point.error = f"{point.trained} cannot run"
                continue
            config.checkpoint = weights[point.trained]
            stages = _stages(max(first, BY_NAME["score"].number), last)
        else:
            weights[point.name] = str(_weights(run).relative_to(root))
            stages = _stages(first, min(last, BY_NAME["retrain"].number) if sweep.score else last)
        planned.append(Planned(run, own, stages, group, not point.trains))
    if not planned:
        raise problems[0][1]
    config = planned[0].run.config
    place = str(path.relative_to(root)) if path.is_relative_to(root) else "$SWEEP"
    description = {
        "recipe": recipe,
        "about": about(path),
        "command": _quote(["./run.sh", "--sweep", place, *_sweep_options(chosen, values, config)]),
        "labels": _labels(sweep, config),
    }
    errors = {point.name: str(error) for point, error in problems}
    return _Swept(folder, sweep, points, planned, errors, description, last >= BY_NAME["score"].number)


def _weights(run: Run) -> Path:
    return run.out("pretrain" if run.config.retrain is None else "retrain") / "best.pt"


def _sweep_options(chosen: dict[str, Any], values: argparse.Namespace, config: Config) -> list[str]:
    """The options of a sweep's command; folders outside the repository by placeholders."""
    words = []
    for key, value in chosen.items():
        text = str(value)
        if key == "feat_dir" and config.feat_dir is not None:
            text = "$FEATS" if Path(config.feat_dir).is_absolute() else config.feat_dir
        elif key == "corpus" and config.corpus is not None and config.corpus.dir:
            text = "$CORPUS" if Path(config.corpus.dir).is_absolute() else f"./{config.corpus.dir}"
        words += [f"--{key.replace('_', '-')}", text]
    for text in values.set:
        for key, name in (("dir", "CORPUS"), ("test_dir", "TEST")):
            place = getattr(config.corpus, key, None)
            if place and Path(place).is_absolute() and text.startswith(f"corpus.{key}="):
                text = f"corpus.{key}=${name}"
        words += ["--set", text]
    if config.checkpoint is not None and values.checkpoint is not None:
        words += ["--checkpoint", "$CHECKPOINT" if Path(config.checkpoint).is_absolute() else config.checkpoint]
    return words + (["--tag", values.tag] if values.tag else [])


def _labels(sweep: Sweep, config: Config) -> dict[str, str]:
    """What each axis is, from the help of its setting."""
    labels = {"seed": "seed", "variant": "variant", "corpus": "corpus", "protocol": "protocol", "recipe": "recipe"}
    for section in SETTINGS:
        value = getattr(config, section)
        if value is not None:
            # The first clause says what it is; the type stands at the end, in brackets.
            labels |= {
                key: text.rsplit(" [", 1)[0].split(";")[0] for key, _, text in describe(type(value), value, section)
            }
    return {key: sweep.labels.get(key) or labels.get(key) or key for key in sweep.axes}

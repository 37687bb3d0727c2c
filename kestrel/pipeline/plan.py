"""From the command line of run.sh to the list of stages to run; `steps/plan.py` calls it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kestrel.errors import UsageError, nearest, unknown
from kestrel.pipeline.config import Config, Options, resolve, save_text, variants
from kestrel.pipeline.stages import BY_NAME, STAGES, Run, status
from kestrel.pipeline.sweep import load_sweep
from kestrel.settings import describe, load_yaml
from kestrel.store.atomic import write_json, write_text
from kestrel.store.lock import lock

_PLACEHOLDER = re.compile(r"(corpus\.(test_)?dir=)?\$(FEATS|CORPUS|TEST|CHECKPOINT)")
BACKENDS = ("local", "slurm")


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
    add("--variant", metavar="NAME", help="variant of the recipe; default: mini for corpus mini, else base")
    add("--tag", metavar="NAME", help="folder of the run; default: <variant>-<protocol>-seed<seed>")
    add("--seed", type=int, default=0, metavar="N", help="seed of everything random")
    add("--stage", type=int, metavar="N", help="first stage; default: 0 (3 with --feat-dir)")
    add("--stop-stage", type=int, metavar="N", help="last stage; default: 6")
    add("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="change one setting (repeatable)")
    add("--feat-dir", metavar="DIR", help="train on feature files made elsewhere (stages 0-2 fall away)")
    add("--sweep", metavar="FILE", help="run a grid of settings and gather the results")
    add("--checkpoint", metavar="FILE", help="checkpoint that score and export take")
    add("--backend", default="local", metavar="NAME", help="where stages run: local or slurm")
    add("--nproc", type=int, default=os.cpu_count() or 1, metavar="N", help="processes for data work")
    add("--force", action="store_true", help="run the stages even if up to date, or unfinished with other settings")
    add("--dry-run", action="store_true", help="print what would run and why, and stop")
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
    if values.nproc < 1:
        raise UsageError(f"--nproc {values.nproc}: at least 1")
    return values


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
    for section in (
        "corpus",
        "protocol",
        "frontend",
        "feature",
        "augment",
        "model",
        "train",
        "retrain",
        "score",
        "export",
    ):
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
    if config.checkpoint is not None:
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
        status_text = _git(root, "status", "--porcelain")
        versions = {}
        for package in ("torch", "torchaudio", "numpy", "h5py", "soundfile", "pandas", "onnx", "onnxruntime"):
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = "not installed"
        environment = {
            "command": _quote(_canonical(values, config, placeholders=True)),
            "git_commit": _git(root, "rev-parse", "HEAD"),
            "git_dirty": bool(status_text) if status_text is not None else None,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "host": platform.node(),
            "cores": os.cpu_count(),
            "versions": versions,
        }
        write_json(exp / "env.json", environment)


def _dry_run(runs: list[Run], stages: list[str]) -> str:
    lines = []
    for run in runs:
        lines.append(f"{run.exp.relative_to(run.root)}:")
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
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str], root: Path, plan_file: Path, start: Path) -> None:
    """Resolve the options; print help or a dry run, or write the plan that run.sh walks through.

    The plan is made of tab-separated lines: `backend NAME`, `flags FLAG...`, `extra NAME TEXT` for
    optional packages that are missing, `sweep FOLDER [gather]` where the runs are points of a sweep, then `stage EXP NUMBER NAME`
    in order.
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
    points: list[tuple[Path, Config, argparse.Namespace]] = []
    sweep_folder = None
    if values.sweep:
        sweep = load_sweep(Path(os.path.join(start, values.sweep)))
        sweep_folder = root / "exp" / (sweep.options.get("recipe") or values.recipe) / "sweeps" / sweep.name
        for point in sweep.points():
            own = argparse.Namespace(**{**vars(values), **point.options, "set": [*values.set, *point.set]})
            config = resolve(root, options_of(own), start)
            config.tag = point.name
            points.append((sweep_folder / point.name, config, own))
        last = values.stop_stage if values.stop_stage is not None else sweep.stop_stage
    else:
        config = resolve(root, options_of(values), start)
        points.append((exp_dir or root / "exp" / config.recipe / config.tag, config, values))
        if exp_dir is not None:
            config.tag = exp_dir.name
    stages = [stage.name for stage in STAGES if first <= stage.number <= last]
    if values.dry_run:
        sys.stdout.write(
            _dry_run([Run(root, exp, config, values.nproc, values.force) for exp, config, _ in points], stages)
        )
        return
    lines = [f"backend\t{values.backend}"]
    flags = (
        ["--nproc", str(values.nproc)]
        + (["--force"] if values.force else [])
        + (["--profile"] if values.profile else [])
    )
    lines.append("\t".join(["flags", *flags]))
    synthetic = [config for _, config, _ in points if config.corpus is not None and config.corpus.kind == "synthetic"]
    if synthetic and "download" in stages and importlib.util.find_spec("espeakng_loader") is None:
        lines.append(
            "extra\tmini\tespeakng-loader, speech synthesiser eSpeak NG (licence GPL-3.0), used at run time for corpus mini only"
        )
    if sweep_folder is not None:
        sweep.write_points(sweep_folder)
        lines.append(f"sweep\t{sweep_folder.relative_to(root)}\t{'gather' if last >= 5 else ''}")
    for exp, config, own in points:
        write_run(root, exp, config, own)
        relative = exp.relative_to(root)
        lines += [f"stage\t{relative}\t{BY_NAME[name].number}\t{name}" for name in stages]
    write_text(plan_file, "\n".join(lines) + "\n")

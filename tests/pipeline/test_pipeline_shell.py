"""The shell scripts: linted, and within bash 3.2 (macOS)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("run.sh", "path.sh", "cmd.sh", "test.sh", ".ci/run")
PORTABLE = ("run.sh", "path.sh", "cmd.sh", "test.sh")
# What came after bash 3.2, or what GNU has and macOS lacks.
LATER = {
    r"\b(declare|local|typeset)\s+-[a-zA-Z]*[Ang]": "associative arrays, namerefs",
    r"\b(mapfile|readarray|coproc)\b": "mapfile, coproc",
    r"\$\{[^}\"]*(\^|,,|@[QEPAaUuLK]\})": "case changes and transformations",
    r"&>>|\|&": "joined redirections",
    r"\bwait -n\b|\bwait -p\b": "waiting for any child",
    r"\[\[?.*\s-v\s": "tests for variables",
    r"\$\{\w+(\[[^]]*\])?:\s*-\d": "negative lengths",
    r"\w\[-\d+\]": "negative indices",
    r";;?&": "case fall-through",
    r"printf -v\s+\w+\[": "printf into arrays",
    r"\bread\b[^|;]* -[a-zA-Z]*[iN]\b": "options of read",
    r"\breadlink -f\b|\brealpath\b|\bsed -i\b|\bdate -d\b|\bgrep -P\b|\bmktemp --|\bstat -c\b": "GNU tools",
    r"\$\{?EPOCH|\$\{?BASHPID": "variables of later versions",
}
# Arrays that always have an element where they are expanded.
NEVER_EMPTY = {
    "run.sh": {"flags"},  # the plan always has --nproc
    "test.sh": {"layers", "report"},
}


def code(name: str) -> list[str]:
    """The lines of a script without comments."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [re.sub(r"(^|\s)#.*", "", line) for line in lines]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse_and_stop_at_errors(name: str) -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / name)], check=False).returncode == 0
    if name not in ("path.sh", "cmd.sh"):
        assert "set -euo pipefail" in code(name)
        assert os.access(ROOT / name, os.X_OK) and (ROOT / name).read_text().startswith("#!/usr/bin/env bash\n")


def test_shellcheck_is_content() -> None:
    if shutil.which("shellcheck") is None:
        assert not os.environ.get("CI"), "shellcheck is missing"
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", PORTABLE)
def test_nothing_newer_than_bash_3_2(name: str) -> None:
    for number, line in enumerate(code(name), 1):
        for pattern, what in LATER.items():
            assert not re.search(pattern, line), f"{name}:{number}: {what}: {line}"


def test_the_patterns_find_what_they_are_for() -> None:
    samples = (
        "declare -A x|local -n y=z|mapfile -t a|echo ${x,,}|echo ${x^^}|echo ${x@Q}|a &>> b|wait -n|[ -v x ]|"
        "echo ${x: -1:-1}|echo ${a[-1]}|readlink -f x|sed -i s/a/b/ c|echo $EPOCHSECONDS"
    ).split("|")
    for sample in [*samples, "a |& b", "x) y ;;&"]:
        assert any(re.search(pattern, sample) for pattern in LATER), sample


@pytest.mark.parametrize("name", PORTABLE)
def test_arrays_that_may_be_empty_are_guarded(name: str) -> None:
    """bash before 4.4 takes the expansion of an empty array for an unset variable under `set -u`."""
    allowed = NEVER_EMPTY.get(name, set())
    for number, line in enumerate(code(name), 1):
        rest = re.sub(r'\$\{(\w+)\[[@*]\]\+"\$\{\1\[[@*]\]\}"\}', "", line)
        for array in re.findall(r"\$\{(\w+)\[[@*]\]", rest):
            guarded = re.search(rf'"\$\{{#{array}\[@\]\}}" -(gt|eq) 0', line)  # on the same line, `||` or `&&`
            assert array in allowed or guarded, f"{name}:{number}: {line}"

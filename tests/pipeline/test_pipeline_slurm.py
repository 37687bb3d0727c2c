"""The Slurm backend: with a stand-in for sbatch, and with a real one-node Slurm."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_kit import Checkout, copy_code

from kestrel.errors import UsageError
from kestrel.pipeline.backend import flags
from kestrel.settings import load_yaml

ROOT = Path(__file__).resolve().parents[2]

# ----------------------------------------------------------------------------------------------------------- site flags


def site(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "slurm.yaml"
    path.write_text(text)
    return path


def test_a_stage_gets_the_flags_of_all_and_its_own(tmp_path: Path) -> None:
    path = site(tmp_path, "all: [--partition=a b, --mem=4G]\npretrain: [--gres=gpu:1]\nscore: []\n")
    assert flags(path, "pretrain") == ["--partition=a b", "--mem=4G", "--gres=gpu:1"]
    assert flags(path, "score") == flags(path, "download") == ["--partition=a b", "--mem=4G"]
    assert flags(site(tmp_path, ""), "score") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pretain: []", "unknown stage in slurm.yaml 'pretain'; did you mean 'pretrain'?"),
        ("all: --mem=4G", "slurm.yaml: all must be a list of flags"),
        ("all: [4]", "slurm.yaml: all must be a list of flags"),
        ("all:", "slurm.yaml: all must be a list of flags"),
    ],
)
def test_bad_site_files(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        flags(site(tmp_path, text), "pretrain")
    assert message in str(caught.value)


def test_the_shipped_site_file_signals_training_before_its_time_limit() -> None:
    path = ROOT / "conf" / "backends" / "slurm.yaml"
    for stage in ("pretrain", "retrain"):
        # B: sends it to the batch shell, which is the step itself; without, Slurm signals the steps of srun only.
        assert any(word.startswith("--signal=B:USR1@") for word in flags(path, stage))
    for stage in ("download", "prepare", "feature", "score", "export"):
        assert not any("--signal" in word for word in flags(path, stage)), "it would end these stages early"


# ----------------------------------------------------------------------------------------------------- stand-in sbatch

SBATCH = r"""#!/usr/bin/env bash
# Stands in for sbatch --parsable --wait --wrap COMMAND. What it does is in $FAKE: a word per call, the last one repeats.
printf '%s\n' "call" "$@" >>"$CALLS"
out="" wrap=""
while [ $# -gt 0 ]; do
  case $1 in
    --output=*) out=${1#--output=} ;;
    --wrap) wrap=$2; shift ;;
  esac
  shift
done
number=$(grep -c '^call$' "$CALLS")
words=($FAKE)
[ "$number" -le "${#words[@]}" ] || number=${#words[@]}
case ${words[$((number - 1))]} in
  run) code=0; bash -c "$wrap" >"$out" 2>&1 </dev/null || code=$? ;;
  again) echo "the state is saved" >"$out"; code=75 ;;
  fail) for line in $(seq 40); do echo "line $line of the job"; done >"$out"; code=3 ;;
  reject) echo "sbatch: error: invalid partition specified: nowhere" >&2; exit 1 ;;
  cancelled) code=0 ;;
esac
echo "4$number"
exit "$code"
"""


class Site:
    """A checkout with a stand-in for sbatch on the path."""

    def __init__(self, checkout: Checkout, folder: Path, corpus: Path) -> None:
        self.checkout, self.corpus = checkout, corpus
        self.bin, self.calls_file = folder / "bin", folder / "calls"
        self.bin.mkdir()
        (self.bin / "sbatch").write_text(SBATCH)
        (self.bin / "sbatch").chmod(0o755)
        self.calls_file.touch()

    def run(self, fake: str, tag: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Stage 0 through the backend, where calls of sbatch do what the words of `fake` say."""
        self.calls_file.write_text("")
        options = ["--corpus", str(self.corpus), "--variant", "mini", "--tag", tag, "--stop-stage", "0", "--nproc", "1"]
        environment = {"PATH": f"{self.bin}:{os.environ['PATH']}", "FAKE": fake, "CALLS": str(self.calls_file)}
        return self.checkout.run("--backend", "slurm", *options, *arguments, **environment)

    def calls(self) -> list[list[str]]:
        """The arguments of each call."""
        return [part.splitlines() for part in self.calls_file.read_text().split("call\n")[1:]]


@pytest.fixture
def fake_site(own_checkout: Checkout, tmp_path: Path, tiny_corpus: Path) -> Site:
    return Site(own_checkout, tmp_path, tiny_corpus)


def test_a_job_that_succeeds(fake_site: Site) -> None:
    done = fake_site.run("run", "good")
    assert done.returncode == 0, done.stderr
    (call,) = fake_site.calls()
    out = "exp/iscas21_lstm/good/log/download.slurm.out"
    assert call[:5] == ["--parsable", "--wait", "--job-name=kestrel-download", f"--output={out}", "--export=ALL"]
    assert call[-2] == "--wrap" and "'steps/download.py' 'exp/iscas21_lstm/good' --nproc 1" in call[-1]
    assert "" not in call, "no empty argument from an empty list of flags"
    assert f"stage 0 download: submitted to Slurm, log in {out}" in done.stderr
    assert "stage 0 download: done in" in done.stderr, "the job's log is shown"
    again = fake_site.run("fail", "good")
    assert again.returncode == 0 and "stage 0 download: up to date" in again.stderr
    assert fake_site.calls() == [], "what is up to date needs no job"


def test_the_site_flags_reach_sbatch(fake_site: Site) -> None:
    path = fake_site.checkout.root / "conf" / "backends" / "slurm.yaml"
    path.write_text("all: [--comment=two words, --mem=1G]\ndownload: [--time=5]\nprepare: [--time=9]\n")
    assert fake_site.run("run", "flags").returncode == 0
    assert fake_site.calls()[0][5:8] == ["--comment=two words", "--mem=1G", "--time=5"]


def test_a_bad_site_file_submits_nothing(fake_site: Site) -> None:
    (fake_site.checkout.root / "conf" / "backends" / "slurm.yaml").write_text("downlaod: [--time=5]\n")
    done = fake_site.run("run", "badsite")
    assert done.returncode == 2 and "did you mean 'download'?" in done.stderr
    assert fake_site.calls() == []


def test_a_job_that_fails_passes_its_code_and_shows_its_end(fake_site: Site) -> None:
    done = fake_site.run("fail", "bad", "--stop-stage", "2")
    assert done.returncode == 3
    assert "stage 0 download: job 41 ended with code 3; the end of exp/iscas21_lstm/bad/log/" in done.stderr
    assert "line 40 of the job" in done.stderr and "line 21 of the job" in done.stderr
    assert "line 20 of the job" not in done.stderr
    assert len(fake_site.calls()) == 1, "no further stage"


def test_a_stopped_job_is_submitted_again(fake_site: Site) -> None:
    done = fake_site.run("again again run", "again")
    assert done.returncode == 0, done.stderr
    assert len(fake_site.calls()) == 3
    assert done.stderr.count("stopped with its state saved, submitted again") == 2


def test_a_job_that_is_stopped_for_ever_ends(fake_site: Site) -> None:
    done = fake_site.run("again", "forever")
    assert done.returncode == 75
    assert len(fake_site.calls()) == 21


def test_a_job_that_slurm_rejects(fake_site: Site) -> None:
    done = fake_site.run("reject", "reject")
    assert done.returncode == 1
    assert "invalid partition specified: nowhere" in done.stderr
    assert "(no output: the job did not start)" in done.stderr
    assert "tail:" not in done.stderr


def test_a_job_cancelled_before_it_began_is_no_success(fake_site: Site) -> None:
    """sbatch --wait gives 0 for it."""
    done = fake_site.run("cancelled", "cancelled")
    assert done.returncode == 1
    assert "job 41 left no result; was it cancelled?" in done.stderr


def test_a_stage_that_cannot_run_is_said_without_a_job(fake_site: Site) -> None:
    done = fake_site.run("run", "early", "--stage", "2", "--stop-stage", "2")
    assert done.returncode == 1
    assert "stage 2 needs the result of stage 1 prepare" in done.stderr
    assert fake_site.calls() == []


def test_force_reaches_the_job(fake_site: Site) -> None:
    assert fake_site.run("run", "forced").returncode == 0
    done = fake_site.run("run", "forced", "--force")
    assert done.returncode == 0 and fake_site.calls()[0][-1].endswith(" --force")
    assert "(--force)" in done.stderr


def test_no_sbatch_on_the_path(fake_site: Site) -> None:
    (fake_site.bin / "sbatch").unlink()
    for name in ("bash", "dirname", "mktemp", "rm", "cat", "uname", "env", "tail", "mkdir", "ls"):
        (fake_site.bin / name).symlink_to(shutil.which(name) or "")
    options = ["--corpus", str(fake_site.corpus), "--variant", "mini", "--tag", "none", "--backend", "slurm"]
    done = fake_site.checkout.run(*options, "--stop-stage", "0", PATH=str(fake_site.bin))
    assert done.returncode == 1
    assert done.stderr.splitlines()[1:] == ["error: --backend slurm: sbatch is not on the path"]


# ------------------------------------------------------------------------------------------------------------ real Slurm

CONFIGURATION = """\
ClusterName=kestrel
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=500 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A one-node Slurm of our own; gives the environment that its commands need."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "squeue", "scancel") if program(name) is None]
    if missing:
        assert not os.environ.get("CI"), f"{', '.join(missing)} missing: apt-get install slurm-wlm"
        pytest.skip(f"no Slurm here ({', '.join(missing)} missing): apt-get install slurm-wlm")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    ports = free_ports(2)
    text = CONFIGURATION.format(
        folder=folder,
        host=socket.gethostname().split(".")[0],
        user=getpass.getuser(),
        controller_port=ports[0],
        node_port=ports[1],
    )
    (folder / "slurm.conf").write_text(text)
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    daemons = []
    try:
        for name in ("slurmctld", "slurmd"):
            command = [str(program(name)), "-D", "-f", environment["SLURM_CONF"]]
            with (folder / f"{name}.out").open("w") as out:
                daemons.append(subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **environment}))
        deadline = time.monotonic() + 30
        while True:
            state = subprocess.run(
                ["sinfo", "-h", "-o", "%t"],
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
                check=False,
            ).stdout.strip()
            if state == "idle":
                break
            logs = "\n".join((folder / f"{name}.out").read_text()[-2000:] for name in ("slurmctld", "slurmd"))
            assert time.monotonic() < deadline and all(one.poll() is None for one in daemons), f"Slurm: {state}\n{logs}"
            time.sleep(0.3)
        yield environment
    finally:
        subprocess.run(["scancel", "--user", getpass.getuser()], env={**os.environ, **environment}, check=False)
        for one in reversed(daemons):
            one.terminate()
        for one in reversed(daemons):
            try:
                one.wait(20)
            except subprocess.TimeoutExpired:
                one.kill()
                one.wait()


@pytest.mark.slow
def test_stages_run_as_real_jobs(slurm: dict[str, str], tmp_path: Path, tiny_corpus: Path) -> None:
    """Stages 0 and 1 in jobs of their own, then a failing one, and one that is cancelled while it waits in the queue."""
    checkout = copy_code(tmp_path / "kestrel on a cluster")
    options = ["--backend", "slurm", "--corpus", str(tiny_corpus), "--variant", "mini", "--nproc", "2"]

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            checkout.command(*options, *arguments),
            env=checkout.environment(**slurm),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    done = checkout.run(*options, "--tag", "real", "--stop-stage", "1", **slurm)
    assert done.returncode == 0, done.stderr
    assert "stage 0 download: done in" in done.stderr and "stage 1 prepare: done in" in done.stderr
    protocol = checkout.root / "data" / "tiny_corpus" / "tiny_corpus-12" / "protocol.json"
    assert load_yaml(protocol)["counts"]["train"]["yes"] == 18
    assert "SLURM" not in (checkout.root / "exp" / "iscas21_lstm" / "real" / "config.yaml").read_text()

    # Both wait for the answers of sbatch, which looks every ten seconds: side by side.
    failing = start("--tag", "fails", "--stop-stage", "1", "--set", "protocol.words=nonesuch")
    held = copy_code(tmp_path / "kestrel held")
    (held.root / "conf" / "backends" / "slurm.yaml").write_text("all: [--hold, --job-name=held]\n")
    waiting = subprocess.Popen(
        held.command(*options, "--tag", "held", "--stop-stage", "0"),
        env=held.environment(**slurm),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    listing = ["squeue", "-h", "--name=held", "-o", "%i"]
    while not (
        job := subprocess.run(listing, env={**os.environ, **slurm}, capture_output=True, text=True).stdout.strip()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    subprocess.run(["scancel", job], env={**os.environ, **slurm}, check=True)

    _, said = failing.communicate(timeout=90)
    assert failing.returncode == 2, said
    assert "stage 1 prepare: job " in said and " ended with code 2; the end of exp/iscas21_lstm/fails/log/" in said
    assert "nonesuch" in said.splitlines()[-1]
    _, said = waiting.communicate(timeout=90)
    assert waiting.returncode == 1, said
    assert "submitted to Slurm" in said and f"job {job} left no result; was it cancelled?" in said

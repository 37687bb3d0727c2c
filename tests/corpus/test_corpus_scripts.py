"""The stage-0 scripts of local/, run as run.sh runs them."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from kestrel.corpus.source import read_roots

REPOSITORY = Path(__file__).resolve().parents[2]


def run(script: Path, out: Path, spec: dict, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(script), "--spec", json.dumps(spec), "--out", str(out), *options]
    environment = {k: v for k, v in os.environ.items() if k.lower() not in ("http_proxy", "all_proxy", "pythonpath")}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def last_line(result: subprocess.CompletedProcess) -> str:
    assert "Traceback" not in result.stderr, result.stderr
    return result.stderr.strip().splitlines()[-1].strip()


def test_folder(tmp_path, make_corpus):
    script = REPOSITORY / "local" / "folder.py"
    main = make_corpus(tmp_path / "mine", {"yes": ["a_nohash_0"]})
    test = make_corpus(tmp_path / "apart", {"yes": ["b_nohash_0"]}, noise=0)
    raw = tmp_path / "data" / "mine" / "raw"
    spec = {"name": "mine", "kind": "folder", "dir": str(main)}
    assert run(script, raw, spec).returncode == 0
    assert read_roots(raw) == (main, None) and os.listdir(raw) == ["roots.json"]
    assert run(script, raw, spec | {"test_dir": str(test)}).returncode == 0
    assert read_roots(raw) == (main, test)

    result = run(script, raw, spec | {"dir": str(tmp_path / "none")})
    assert result.returncode == 1 and last_line(result) == f"error: corpus folder {tmp_path / 'none'} does not exist"
    result = run(script, raw, spec | {"dirr": "x"})
    assert result.returncode == 2 and "did you mean 'corpus.dir'" in last_line(result)
    result = run(script, raw, {"name": "mine"})
    assert result.returncode == 2 and "--corpus DIR" in last_line(result)


def test_synthetic(tmp_path):
    pytest.importorskip("espeakng_loader", reason="espeakng-loader is not installed")
    spec = {"name": "tiny", "kind": "synthetic", "speakers": 2, "keyword_takes": 1}
    result = run(REPOSITORY / "local" / "synthetic.py", tmp_path / "raw", spec, "--nproc", "1")
    assert result.returncode == 0, result.stderr
    assert "eSpeak NG (GPL-3" in result.stderr
    assert json.loads((tmp_path / "raw" / "roots.json").read_text()) == {"main": "main", "test": None}
    assert len(list((tmp_path / "raw" / "main").glob("*/*_nohash_0.wav"))) == 2 * 35


@pytest.fixture
def published(tmp_path, make_corpus):
    """A copy of the script whose conf/corpora.yaml names two archives on a local server."""
    site = tmp_path / "site"
    site.mkdir()
    make_corpus(tmp_path / "v1", {"yes": ["a_nohash_0"], "no": ["a_nohash_0"]})
    make_corpus(tmp_path / "t1", {"yes": ["b_nohash_0"], "_silence_": ["1"]}, noise=0)
    for name in ("v1", "t1"):
        with tarfile.open(site / f"{name}.tar.gz", "w:gz") as tar:
            tar.add(tmp_path / name, ".")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def archive(name: str, folder: str) -> str:
        data = (site / f"{name}.tar.gz").read_bytes()
        base = f"http://127.0.0.1:{server.server_port}"
        return (
            f"  {name}:\n    urls: [{base}/gone/{name}.tar.gz, {base}/{name}.tar.gz]\n    bytes: {len(data)}\n"
            f"    sha256: '{hashlib.sha256(data).hexdigest()}'\n    folder: {folder}\n"
        )

    project = tmp_path / "project"
    (project / "conf").mkdir(parents=True)
    (project / "conf" / "corpora.yaml").write_text("archives:\n" + archive("v1", "main") + archive("t1", "test"))
    shutil.copytree(REPOSITORY / "local", project / "local", ignore=shutil.ignore_patterns("__pycache__"))
    (project / "kestrel").symlink_to(REPOSITORY / "kestrel")
    yield project / "local" / "archive.py", site
    server.shutdown()
    server.server_close()


def test_archive(tmp_path, published):
    script, _ = published
    raw = tmp_path / "data" / "gsc" / "raw"
    spec = {"name": "gsc", "kind": "archive", "archives": ["v1", "t1"]}
    result = run(script, raw, spec)
    assert result.returncode == 0, result.stderr
    assert json.loads((raw / "roots.json").read_text()) == {"main": "main", "test": "test"}
    assert (raw / "main/yes/a_nohash_0.wav").read_bytes() == (tmp_path / "v1/yes/a_nohash_0.wav").read_bytes()
    assert (raw / "test/_silence_/1.wav").is_file()
    assert "404" in result.stderr  # the first address has nothing

    shutil.rmtree(raw / "archives")  # not needed any more
    again = run(script, raw, spec)
    assert again.returncode == 0 and again.stderr.count("unpacked already") == 2

    result = run(script, raw, spec | {"archives": ["v1", "t2"]})
    assert result.returncode == 2 and "did you mean 't1'" in last_line(result)


def test_corrupt_archive(tmp_path, published):
    script, site = published
    damaged = bytearray((site / "v1.tar.gz").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (site / "v1.tar.gz").write_bytes(damaged)
    raw = tmp_path / "raw"
    result = run(script, raw, {"name": "gsc", "kind": "archive", "archives": ["v1"]})
    assert result.returncode == 1
    assert "SHA-256" in last_line(result) and f"put the file here: {raw}/archives/v1.tar.gz" in last_line(result)
    assert not (raw / "main").exists() and not (raw / "roots.json").exists()
    assert os.listdir(raw / "archives") == []

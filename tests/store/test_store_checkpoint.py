"""Checkpoints: equal content gives equal bytes, a kill never destroys one, damaged and foreign files are refused."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kestrel.errors import KestrelError
from kestrel.store import checkpoint

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=6) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=12,
)


def example() -> dict[str, Any]:
    return {
        "model": {
            "weight": torch.arange(6.0).view(2, 3),
            "count": torch.tensor(3),
            "mask": torch.tensor([True, False]),
        },
        "optimizer": {"state": {0: {"step": torch.tensor(4.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]},
        "identity": {"classes": ["yes", "no"], "hash": "yes", "none": None},
    }


def same(one: Any, other: Any) -> bool:
    """Equal values of equal types."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(max_size=6), PLAIN, max_size=4))
def test_plain_content_comes_back_and_gives_the_same_bytes_again(content: dict[str, Any]) -> None:
    data = checkpoint.to_bytes(content)
    back = checkpoint.from_bytes(data)
    assert same(back, content)
    assert checkpoint.to_bytes(back) == data


def test_tensors_come_back_and_give_the_same_bytes_again(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.pt", example())
    back = checkpoint.load(tmp_path / "a.pt")
    assert same(back, example())
    checkpoint.save(tmp_path / "longer-name.pt", back)
    assert (tmp_path / "longer-name.pt").read_bytes() == (tmp_path / "a.pt").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "longer-name.pt"]


def test_bytes_do_not_depend_on_sharing_views_or_layout() -> None:
    """Pickle and torch write an object that is met again as a reference, and a view with all it is a view of."""
    word, weights = "a name", torch.arange(12.0).view(3, 4)
    shared = {"a": word, "b": [word, word], "w": weights, "v": weights, "t": weights.t(), "row": weights[1]}
    apart = {
        "a": "".join(["a", " name"]),
        "b": ["".join(["a ", "name"]), "".join(["a n", "ame"])],
        "w": weights.clone(),
        "v": weights.clone(),
        "t": weights.t().contiguous(),
        "row": weights[1].clone(),
    }
    assert checkpoint.to_bytes(shared) == checkpoint.to_bytes(apart)
    parameter = torch.nn.Parameter(weights.clone())
    assert checkpoint.to_bytes({"w": parameter}) == checkpoint.to_bytes({"w": weights})


def test_the_small_part_of_a_large_tensor_stays_small() -> None:
    assert len(checkpoint.to_bytes({"row": torch.zeros(1000, 1000)[0]})) < 10_000


def test_a_snapshot_does_not_follow_training() -> None:
    weight = torch.zeros(3)
    taken = checkpoint.snapshot({"w": weight})
    weight += 1
    assert taken["w"].tolist() == [0, 0, 0]


def test_plain_torch_reads_it_too(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.pt", example())
    assert same(torch.load(tmp_path / "a.pt", weights_only=True), example())


@pytest.mark.parametrize("value", [object(), {1, 2}, Path("x"), 1j, b"bytes", torch.float32, {1.5: 0}, {("a",): 0}])
def test_other_types_are_refused_before_anything_is_written(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match=r"checkpoint: .*\.b"):
        checkpoint.save(tmp_path / "a.pt", {"a": {"b": value}})
    assert not list(tmp_path.iterdir())


def refused(data: bytes, message: str) -> None:
    with pytest.raises(KestrelError, match=message) as caught:
        checkpoint.from_bytes(data, "exp/best.pt")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("exp/best.pt")


def test_every_damage_is_noticed() -> None:
    data = checkpoint.to_bytes(example())
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 0x10
        refused(bytes(broken), "damaged|not a Kestrel checkpoint")
    for length in (*range(0, len(data), 7), len(data) - 1):
        refused(data[:length], "cut short or damaged|not a Kestrel checkpoint")
    refused(data + b"more", "damaged|not a Kestrel checkpoint")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "foreign.pt")
    refused((tmp_path / "foreign.pt").read_bytes(), "not a Kestrel checkpoint")
    refused(b"", "not a Kestrel checkpoint")
    refused(b"RIFF....WAVE", "not a Kestrel checkpoint")
    with pytest.raises(KestrelError, match="cannot read .*none.pt: No such file"):
        checkpoint.load(tmp_path / "none.pt")


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("malicious-was-here",)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with a right digest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "snapshot", lambda content: content)
    data = checkpoint.to_bytes({"a": Malicious()})
    refused(data, "cannot be loaded safely")
    assert not (tmp_path / "malicious-was-here").exists()
    assert pickle.dumps(Malicious())  # the class itself is fine to pickle


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"a": 1})

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(KestrelError, match="no space left"):
            checkpoint.save(path, {"a": 2})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda self, data: self.open("wb").write(data[:-1]))
        with pytest.raises(KestrelError, match="other bytes than were written"):
            checkpoint.save(path, {"a": 2})
    assert checkpoint.load(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]


def test_a_kill_leaves_a_complete_state(tmp_path: Path) -> None:
    """100 kills at random times inside saves; the loader returns a complete older or newer state each time."""
    script = Path(__file__).with_name("checkpoint_kit.py")
    done = subprocess.run([sys.executable, script, tmp_path, "100"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    left, numbers = map(int, done.stdout.split())
    assert left > 5 and numbers > 1  # kills met saves that had begun and, in another try, ended

"""Stage 1: look at every clip of a corpus and write the three manifests of a protocol.

What a protocol contains depends on the clips and the settings alone: never on the order in which a folder is
listed, the number of workers, the locale or a random generator.
"""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kestrel.corpus import audio
from kestrel.corpus.manifest import PROTOCOL_FILE, SPLITS, Clip, protocol_hash, store_root, write_manifest
from kestrel.corpus.noise import NoiseFile, silence_windows
from kestrel.corpus.rules import (
    MARK,
    NOISE_FOLDER,
    SILENCE_FOLDER,
    UNKNOWN_FOLDER,
    hash_split,
    read_list,
    share_of,
    speaker_of,
)
from kestrel.corpus.spec import CorpusSpec, ProtocolSpec
from kestrel.corpus.workers import WorkerPool
from kestrel.errors import KestrelError, UsageError, unknown
from kestrel.store.atomic import atomic_path, write_json
from kestrel.store.hashing import keyed_rank

__all__ = ["hash_split", "prepare"]

Progress = Callable[[int, int], None]

UNKNOWN, SILENCE = "unknown", "silence"  # names of the two extra classes
VALIDATION_LIST, TESTING_LIST = "validation_list.txt", "testing_list.txt"
_CHUNK = 256  # clips that a worker looks at before it reports

# Reasons for which a sound clip is in no split (keys of "excluded" in protocol.json).
OTHER_WORD = "word not in the list"
OTHER_TEST_WORD = "test folder: word not in the list"
UNUSED_UNKNOWN = "other word, beyond the unknown percentage"
UNUSED_SILENCE = "silence folder of the main corpus (silence is made from noise)"
MAIN_TEST = "test part of the main corpus (a test folder is given)"
SPEAKER_VALIDATION = "speaker also in validation"
SPEAKER_TEST = "speaker also in test"


@dataclass(frozen=True, slots=True)
class _Found:
    """A file below a corpus root; `path` is `<root>:<relative path>`."""

    path: str
    folder: str
    stem: str

    @property
    def utt_id(self) -> str:
        return f"{self.folder}/{self.stem}"

    @property
    def speaker(self) -> str:
        return speaker_of(self.folder, self.stem)


@dataclass(slots=True)
class _Sound:
    """The clips and noise files of one root that can be used, and their lengths in samples."""

    clips: list[tuple[_Found, int]] = field(default_factory=list)
    noise: list[NoiseFile] = field(default_factory=list)


def _entries(folder: str) -> list[os.DirEntry]:
    """What a folder holds, hidden names left out, in an order that depends on the names alone."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise KestrelError(f"cannot list {folder}: {error.strerror}") from None


def _printable(name: str) -> str:
    """A file name as text that UTF-8 can hold."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _scan(root: str, where: Path, rejected: list[tuple[str, str]]) -> list[_Found]:
    """All files in the word folders of a corpus root; what cannot be a clip goes to `rejected`."""
    if not where.is_dir():
        raise KestrelError(f"corpus folder {where} does not exist")
    found: list[_Found] = []
    seen: dict[str, str] = {}
    for folder in _entries(os.fspath(where)):
        if not folder.is_dir():
            continue
        for entry in _entries(folder.path):
            path = f"{root}:{folder.name}/{entry.name}"
            if _printable(path) != path:
                rejected.append((_printable(path), "file name is not UTF-8"))
            elif not audio.is_audio_name(entry.name):
                if folder.name != NOISE_FOLDER:  # the archive keeps a README among its noise files
                    rejected.append((path, "not a .wav or .flac file"))
            else:
                item = _Found(path, folder.name, audio.stem(entry.name))
                if item.utt_id in seen:
                    raise KestrelError(f"{path} and {seen[item.utt_id]} are one clip twice; remove one of them")
                seen[item.utt_id] = path
                found.append(item)
    if not found:
        raise KestrelError(f"{where} is not in GSC layout: expected one folder per word with .wav or .flac clips")
    return found


def _probe_chunk(job: tuple[list[str], int]) -> list[audio.Probe]:
    paths, sample_rate = job
    return [audio.probe(path, sample_rate) for path in paths]


def _probe_all(paths: list[str], sample_rate: int, workers: int, progress: Progress | None) -> Iterator[audio.Probe]:
    """One Probe for each path, in their order, whatever the number of workers."""
    jobs = [(paths[start : start + _CHUNK], sample_rate) for start in range(0, len(paths), _CHUNK)]
    done = 0

    def report(results: Iterable[list[audio.Probe]]) -> Iterator[audio.Probe]:
        nonlocal done
        for result in results:
            yield from result
            done += len(result)
            if progress is not None:
                progress(done, len(paths))

    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from report(map(_probe_chunk, jobs))
        return
    try:
        with WorkerPool(workers) as pool:
            yield from report(pool.map(_probe_chunk, jobs))
    except BrokenProcessPool:
        raise KestrelError("a worker process died while reading clips; run stage 1 again with --nproc 1") from None


def _listen(
    found: list[_Found],
    roots: dict[str, Path],
    sample_rate: int,
    workers: int,
    progress: Progress | None,
    rejected: list[tuple[str, str]],
) -> dict[str, _Sound]:
    """Decode every file once; bad ones go to `rejected`, the others to the _Sound of their root."""
    sound = {root: _Sound() for root in roots}
    paths = [os.fspath(roots[f.path.partition(":")[0]] / f.path.partition(":")[2]) for f in found]
    for item, result in zip(found, _probe_all(paths, sample_rate, workers, progress), strict=True):
        root = sound[item.path.partition(":")[0]]
        if result.reason is not None:
            rejected.append((item.path, result.reason))
        elif item.folder == NOISE_FOLDER:
            root.noise.append(NoiseFile(item.path, item.stem, result.samples))
        else:
            root.clips.append((item, result.samples))
    return sound


@dataclass(slots=True)
class _Assignment:
    """Which clips belong to which split, before classes and percentages."""

    splits: dict[str, list[tuple[_Found, int]]] = field(default_factory=lambda: {s: [] for s in SPLITS})
    excluded: Counter[str] = field(default_factory=Counter)
    missing: list[str] = field(default_factory=list)  # named by a list file, not among the files


def _rule(main: Path, protocol: ProtocolSpec) -> str:
    """The rule of the splits: `list` or `hash`, `auto` being resolved by what the folder holds."""
    lists = [name for name in (VALIDATION_LIST, TESTING_LIST) if (main / name).is_file()]
    if protocol.split == "auto":
        return "list" if lists else "hash"
    if protocol.split == "list" and not lists:
        raise KestrelError(f"{main} has no {VALIDATION_LIST}; use --set protocol.split=hash")
    return protocol.split


def _read_lists(main: Path) -> dict[str, set[str]]:
    """The clips that the list files of the main corpus name for validation and test."""
    named = {
        split: read_list(main / name) if (main / name).is_file() else set()
        for split, name in (("validation", VALIDATION_LIST), ("test", TESTING_LIST))
    }
    if both := named["validation"] & named["test"]:
        raise KestrelError(f"{min(both)} is in both {VALIDATION_LIST} and {TESTING_LIST} of {main}")
    return named


def _assign(
    rule: str, main: Path, protocol: ProtocolSpec, sound: dict[str, _Sound], found: list[_Found]
) -> _Assignment:
    """Assign the clips of both roots to the splits so that no speaker is in two of them."""
    result = _Assignment()
    named: dict[str, set[str]] = {"validation": set(), "test": set()}
    if rule == "list" or protocol.benchmark:  # a benchmark by the hash rule still knows which clips must be there
        named = _read_lists(main)
        present = {f.utt_id for f in found if f.path.startswith("main:")}
        result.missing = sorted((named["validation"] | named["test"]) - present)
    if rule == "list":

        def split_of(item: _Found) -> str:
            return next((split for split, names in named.items() if item.utt_id in names), "train")
    else:

        def split_of(item: _Found) -> str:
            # the archive's rule saw wav files; only names without the mark keep their ending in the hash
            name = item.stem if MARK in item.stem else f"{item.stem}.wav"
            return hash_split(name, protocol.validation_percentage, protocol.testing_percentage)

    parts: dict[str, list[tuple[_Found, int]]] = {split: [] for split in SPLITS}
    for item, samples in sound["main"].clips:
        if item.folder == SILENCE_FOLDER:
            result.excluded[UNUSED_SILENCE] += 1
        else:
            parts[split_of(item)].append((item, samples))
    if "test" in sound:
        result.excluded[MAIN_TEST] += len(parts["test"])
        parts["test"] = sound["test"].clips

    speakers = {split: {item.speaker for item, _ in parts[split]} - {""} for split in ("validation", "test")}
    if rule == "list":  # a listed clip that is missing or damaged still tells where its speaker belongs
        for split in speakers if "test" not in sound else ("validation",):
            speakers[split] |= {speaker_of(*name.split("/", 1)) for name in named[split]} - {""}
    for split in SPLITS:
        for item, samples in parts[split]:
            if split != "test" and item.speaker in speakers["test"]:
                result.excluded[SPEAKER_TEST] += 1
            elif split == "train" and item.speaker in speakers["validation"]:
                result.excluded[SPEAKER_VALIDATION] += 1
            else:
                result.splits[split].append((item, samples))
    return result


def _classes(protocol: ProtocolSpec) -> list[str]:
    classes = list(protocol.words)
    if protocol.unknown_percentage is not None:
        classes.append(UNKNOWN)
    if protocol.silence_percentage is not None:
        classes.append(SILENCE)
    for name in classes:
        if classes.count(name) > 1:
            raise UsageError(f"protocol.words: {name!r} would be two classes; take it out of the list")
    if not protocol.words:
        raise UsageError("protocol.words is empty; give at least one word")
    return classes


def _select(
    protocol: ProtocolSpec,
    classes: list[str],
    assignment: _Assignment,
    sound: dict[str, _Sound],
    notes: list[str],
    log: logging.Logger,
) -> dict[str, list[Clip]]:
    """The rows of the three manifests: keywords, and as many unknown and silence clips as the count rule says."""
    label = {name: index for index, name in enumerate(classes)}
    words = set(protocol.words)
    noise = sound["main"].noise or (sound["test"].noise if "test" in sound else [])
    chosen: dict[str, list[Clip]] = {}

    def speech(item: _Found, samples: int, name: str) -> Clip:
        return Clip(item.utt_id, item.path, item.folder, label[name], item.speaker, 0, samples, 1.0)

    for split in SPLITS:
        separate = split == "test" and "test" in sound  # a test folder: used as it is
        rows: list[Clip] = []
        others: list[tuple[_Found, int]] = []
        foreign: Counter[str] = Counter()
        for item, samples in assignment.splits[split]:
            if item.folder in words:
                rows.append(speech(item, samples, item.folder))
            elif not separate:
                others.append((item, samples))
            elif item.folder == UNKNOWN_FOLDER and UNKNOWN in label:
                rows.append(speech(item, samples, UNKNOWN))
            elif item.folder == SILENCE_FOLDER and SILENCE in label:
                rows.append(speech(item, samples, SILENCE))
            else:
                foreign[item.folder] += 1
        keywords = sum(row.word in words for row in rows)
        if foreign:
            assignment.excluded[OTHER_TEST_WORD] += foreign.total()
            listed = ", ".join(f"{word} {count}" for word, count in sorted(foreign.items()))
            notes.append(f"test clips of other words excluded: {listed}")
            log.info("test folder: %d clips of other words excluded (%s)", foreign.total(), listed)

        if UNKNOWN in label and not separate:
            others.sort(key=lambda pair: keyed_rank(UNKNOWN, pair[0].utt_id))
            wanted = share_of(keywords, protocol.unknown_percentage)
            rows += [speech(item, samples, UNKNOWN) for item, samples in others[:wanted]]
            assignment.excluded[UNUSED_UNKNOWN] += len(others[wanted:])
            _say_if_fewer(split, UNKNOWN, wanted, len(others), notes, log)
        else:
            assignment.excluded[OTHER_WORD] += len(others)

        if SILENCE in label and not any(row.label == label[SILENCE] for row in rows):
            wanted = share_of(keywords, protocol.silence_percentage)
            windows = silence_windows(noise, split, wanted, protocol.clip_samples, label[SILENCE])
            rows += windows
            _say_if_fewer(split, SILENCE, wanted, len(windows), notes, log)
        chosen[split] = sorted(rows, key=lambda row: (row.utt_id, row.start))
    return chosen


def _say_if_fewer(split: str, name: str, wanted: int, there: int, notes: list[str], log: logging.Logger) -> None:
    if there < wanted:
        notes.append(f"{split}: only {there} of {wanted} {name} clips exist")
        log.warning("%s: %d %s clips wanted, only %d exist: all of them are used", split, wanted, name, there)


def _check_words(protocol: ProtocolSpec, sound: dict[str, _Sound], has_noise: bool, main: Path) -> None:
    folders = {item.folder for item, _ in sound["main"].clips}
    for word in protocol.words:
        if word not in folders:
            raise unknown(f"word of protocol.words (no folder of {main} with usable clips)", word, folders)
    if protocol.silence_percentage and not has_noise:
        raise KestrelError(
            f"{main} has no usable recordings in {NOISE_FOLDER}/ to make silence from; add some or use "
            "--set protocol.silence_percentage=null"
        )


def _check_counts(
    protocol: ProtocolSpec, chosen: dict[str, list[Clip]], rule: str, has_test: bool, log: logging.Logger
) -> None:
    for split in SPLITS:
        counts = Counter(clip.label for clip in chosen[split])
        absent = [word for index, word in enumerate(protocol.words) if not counts[index]]
        if len(absent) == len(protocol.words):
            hint = {"train": "", "validation": f" (its speakers come from {VALIDATION_LIST} or the hash rule)"}.get(
                split,
                " with a word of the list" if has_test else f": add {TESTING_LIST} or use --set corpus.test_dir=FOLDER",
            )
            raise KestrelError(f"no {split} clips by the {rule} rule{hint}")
        if absent and split == "train":
            raise KestrelError(f"no training clips of {', '.join(absent)}; take it out of protocol.words")
        if absent:
            log.warning("%s has no clips of %s", split, ", ".join(absent))
        expected = protocol.expect.get(split)
        if expected is not None and len(chosen[split]) != expected:
            raise KestrelError(
                f"{protocol.name}: {split} must have {expected} clips but has {len(chosen[split])}; "
                "the corpus is incomplete or of another version, run stage 0 again with --force"
            )


def _check_benchmark(
    protocol: ProtocolSpec, rejected: list[tuple[str, str]], assignment: _Assignment, out_dir: Path
) -> None:
    """Refuse to compute a benchmark number on fewer clips than others have."""
    clips = [(path, reason) for path, reason in rejected if audio.is_audio_name(path)]
    if clips:
        path, reason = clips[0]
        raise KestrelError(
            f"{protocol.name} needs every clip, but {len(clips)} cannot be used, first {path} ({reason}); "
            f"see {out_dir / 'rejected.csv'}, then run stage 0 again with --force"
        )
    if assignment.missing:
        raise KestrelError(
            f"{protocol.name} needs every clip, but {len(assignment.missing)} of the list files are missing, "
            f"first {assignment.missing[0]}; run stage 0 again with --force"
        )
    for reason in (SPEAKER_VALIDATION, SPEAKER_TEST):
        if assignment.excluded[reason]:
            raise KestrelError(
                f"{protocol.name}: {assignment.excluded[reason]} clips have a {reason}; this is not the official corpus"
            )


def _write_rejected(path: Path, rejected: list[tuple[str, str]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "reason"))
        writer.writerows(sorted(rejected))


def prepare(
    corpus: CorpusSpec,
    main_root: str | os.PathLike,
    test_root: str | os.PathLike | None,
    protocol: ProtocolSpec,
    out_dir: str | os.PathLike,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the manifests, rejected.csv and protocol.json of a protocol into `out_dir` = data/<corpus>/<protocol>.

    Every file below the roots is opened and decoded once; only names, lengths and reasons are kept in memory.
    The files of the roots are only read. Returns the content of protocol.json, which is written last.
    Raises KestrelError or UsageError with one line that says what to do: a word without clips, no clips in a
    split, a count that differs from `protocol.expect`, or, for a benchmark, any clip that is missing or rejected.
    """
    log = logging.getLogger("kestrel")
    out_dir = Path(out_dir)
    classes = _classes(protocol)
    if not protocol.test_folder:
        test_root = None
    roots = {"main": Path(main_root)} | ({} if test_root is None else {"test": Path(test_root)})
    rejected: list[tuple[str, str]] = []
    found = [item for root, where in roots.items() for item in _scan(root, where, rejected)]
    rule = _rule(roots["main"], protocol)
    sound = _listen(found, roots, protocol.sample_rate, workers, progress, rejected)

    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / PROTOCOL_FILE).unlink(missing_ok=True)  # old manifests count no longer
    _write_rejected(out_dir / "rejected.csv", rejected)
    if rejected:
        log.warning("%d files rejected, see %s", len(rejected), out_dir / "rejected.csv")

    assignment = _assign(rule, roots["main"], protocol, sound, found)
    if protocol.benchmark:
        _check_benchmark(protocol, rejected, assignment, out_dir)
    notes = ["evaluation silence = noise windows with a gain in 0..1, fixed by a hash, not zeros"]
    if "test" in sound and any(item.folder == SILENCE_FOLDER for item, _ in sound["test"].clips):
        notes[0] += "; test silence = the clips of the test folder"
    if assignment.missing:
        notes.append(f"{len(assignment.missing)} clips of the list files are missing")
        log.warning("%d clips of the list files are missing, first %s", len(assignment.missing), assignment.missing[0])
    nameless = sum(not i.speaker and i.folder != SILENCE_FOLDER for s in sound.values() for i, _ in s.clips)
    if nameless:
        notes.append(f"{nameless} clips name no speaker")
        log.warning("%d clips have no %r in their name: whether speakers straddle splits is unknown", nameless, MARK)
    has_noise = any(s.noise for s in sound.values())
    _check_words(protocol, sound, has_noise, roots["main"])
    chosen = _select(protocol, classes, assignment, sound, notes, log)
    _check_counts(protocol, chosen, rule, "test" in sound, log)

    noise_files = sound["main"].noise or (sound["test"].noise if "test" in sound else [])
    content: dict[str, Any] = {
        "name": protocol.name,
        "corpus": corpus.name,
        "classes": classes,
        "counts": {
            split: {name: sum(c.label == index for c in chosen[split]) for index, name in enumerate(classes)}
            for split in SPLITS
        },
        "excluded": {reason: count for reason, count in sorted(assignment.excluded.items()) if count},
        "rejected": len(rejected),
        "hash": protocol_hash(chosen),
        "roots": {"main": store_root(roots["main"], out_dir.parent), "test": None}
        | ({} if test_root is None else {"test": store_root(test_root, out_dir.parent)}),
        "sample_rate": protocol.sample_rate,
        "clip_samples": protocol.clip_samples,
        "rules": asdict(protocol) | {"split": rule},
        "noise_files": sorted(f.path for f in noise_files),
        "notes": notes,
    }
    for split in SPLITS:
        write_manifest(out_dir / f"{split}.csv", chosen[split])
    write_json(out_dir / PROTOCOL_FILE, content)
    log.info(
        "%s: %s clips of %d classes (train, validation, test), %d excluded, %d rejected, hash %s",
        protocol.name,
        ", ".join(str(len(chosen[split])) for split in SPLITS),
        len(classes),
        assignment.excluded.total(),
        len(rejected),
        content["hash"][:12],
    )
    return content

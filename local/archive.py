"""Stage 0 of a corpus that is published as archives: download, check, unpack."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import urlsplit

import stage0

from kestrel.corpus.download import Archive, extract, fetch, load_archives
from kestrel.corpus.source import check_layout
from kestrel.corpus.spec import CorpusSpec
from kestrel.errors import KestrelError
from kestrel.pipeline.console import log, progress
from kestrel.store.atomic import read_json, remove_stale, write_json

CORPORA = Path(__file__).resolve().parents[1] / "conf" / "corpora.yaml"


def unpack(name: str, archive: Archive, out: Path) -> Path:
    """The folder that holds what `archive` packs; nothing is done where it is there from this very archive."""
    folder, note = out / archive.folder, out / f"{archive.folder}.json"
    source = {"archive": name, "bytes": archive.bytes, "sha256": archive.sha256}
    if folder.is_dir() and note.exists() and read_json(note) == source:
        log.info("%s: unpacked already", name)
        return folder
    if not archive.urls:
        raise KestrelError(f"conf/corpora.yaml: archive {name} has no address")
    file = out / "archives" / Path(urlsplit(archive.urls[0]).path).name
    fetch(archive.urls, file, archive.bytes, archive.sha256, progress(f"{name} bytes"))
    shutil.rmtree(folder, ignore_errors=True)  # left by another archive: never audio of the user
    extract(file, folder, archive.strip, progress(f"{name} unpacked"))
    check_layout(folder)
    write_json(note, source)
    log.info("%s: unpacked into %s; %s is not needed any more", name, folder, file)
    return folder


def obtain(spec: CorpusSpec, out: Path, nproc: int) -> tuple[Path, Path | None]:
    """Main and test archive in `raw/main` and `raw/test`."""
    remove_stale(out)
    archives = load_archives(CORPORA, spec.archives)
    folders = {archive.folder: unpack(name, archive, out) for name, archive in archives.items()}
    return folders["main"], folders.get("test")


if __name__ == "__main__":
    stage0.main("Stage 0 of a corpus that is published as archives: download, check, unpack.", obtain)

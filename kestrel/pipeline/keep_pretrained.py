"""Keeping a trained checkpoint with its recipe: small, with the accuracy measured from the very file."""

from __future__ import annotations

import logging
import shlex
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from kestrel import recipe as recipes
from kestrel.errors import KestrelError
from kestrel.frontend.spec import FeatureSpec
from kestrel.pipeline.config import Config, variant_data
from kestrel.pipeline.pretrained import folder
from kestrel.pipeline.stages import BY_NAME, Run, done_file
from kestrel.pipeline.work import load_checkpoint, score_stage
from kestrel.settings import build
from kestrel.store.atomic import atomic_path, read_json, write_json, write_text
from kestrel.store.hashing import sha256_file
from kestrel.store.markdown import percent, table

LIMIT = 300_000  # bytes: the recipes keep several, and every clone of the repository carries them
LICENCE = "Apache-2.0"
FORMAT = "kestrel-compact-1"
MEASURED = (
    "split", "n", "accuracy", "ci95", "integer_accuracy", "evaluation_noise", "parameters", "macs", "weight_bytes",
    "corpus", "frontend",
)  # fmt: skip

log = logging.getLogger("kestrel")


def keep(run: Run) -> Path:
    """Write recipes/<recipe>/pretrained/<variant>.pt, .json and .md from a finished run; returns the first.

    Raises KestrelError where the run is unfinished, its network is not the variant's, or the file would be too large.
    """
    from kestrel.models.compact import compact
    from kestrel.models.inventory import parameters
    from kestrel.store.checkpoint import to_bytes

    config = run.config
    _check(run)
    spotter, who, trained = load_checkpoint(run)
    data = to_bytes({"format": FORMAT, "identity": who, **compact(spotter, config.export.weight_bits)})
    if len(data) > LIMIT:
        raise KestrelError(
            f"not kept: the checkpoint of {config.variant} has {len(data):,} bytes as stored ({parameters(spotter.net):,} "
            f"parameters), more than the {LIMIT:,} that a recipe keeps"
        )
    place = folder(run.root, config.recipe) / f"{config.variant}.pt"
    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(place) as temporary:
        temporary.write_bytes(data)
        facts = _facts(run, temporary, trained, place.name)
        write_text(place.with_suffix(".md"), card(facts))
    write_json(place.with_suffix(".json"), facts)
    log.info(
        "kept %s: %s bytes, %.2f %% of the %s clips", place.relative_to(run.root), f"{len(data):,}",
        100 * facts["accuracy"], facts["split"],
    )  # fmt: skip
    return place


def _check(run: Run) -> None:
    config = run.config
    stage = "pretrain" if config.retrain is None else "retrain"
    if not done_file(run.out(stage)).exists():
        raise KestrelError(f"not kept: stage {BY_NAME[stage].number} {stage} of the run is not finished")
    data = variant_data(run.root, config.recipe, config.variant)
    model = build(recipes.load(config.recipe, run.root).ModelSpec, data.get("model"), "model")
    changed = [f"model.{key}" for key, value in vars(model).items() if getattr(config.model, key) != value]
    if build(FeatureSpec, data.get("feature"), "feature").post != config.feature.post:
        changed.append("feature.post")
    if changed:
        raise KestrelError(
            f"not kept: the run changes {', '.join(changed)} of variant {config.variant}; train the variant as it is, or "
            "make one of these settings"
        )


def _facts(run: Run, file: Path, trained: Path, name: str) -> dict[str, Any]:
    """What the file is and how it scores, measured as `--pretrained --stage 5` does."""
    config = run.config
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=run.exp) as place:
        shutil.copy2(run.exp / "env.json", place)
        score_stage(replace(run, exp=Path(place), config=replace(config, checkpoint=str(file))))
        result = read_json(Path(place) / "score" / "result.json")
    environment = read_json(run.exp / "env.json")
    return {
        "file": name,
        "sha256": sha256_file(file),
        "bytes": file.stat().st_size,
        "licence": LICENCE,
        "recipe": config.recipe,
        "variant": config.variant,
        "seed": config.seed,
        "classes": config.classes,
        "protocol": result["protocol"],
        **{key: result[key] for key in MEASURED if key in result},
        "weight_bits": config.export.weight_bits,
        "command": _command(config),
        "trained_by": environment["command"],
        "trained_from": {key: environment[key] for key in ("git_commit", "git_dirty")},
        "trained_checkpoint_sha256": sha256_file(trained),
    }


def _command(config: Config) -> str:
    """The command that scores the file again."""
    words = ["./run.sh", "--recipe", config.recipe, "--variant", config.variant]
    if config.feat_dir is not None:
        words += ["--feat-dir", "$FEATS" if Path(config.feat_dir).is_absolute() else config.feat_dir]
    elif config.corpus is not None:
        words += ["--corpus", "$CORPUS" if config.corpus.dir else config.corpus.name]
    words += ["--seed", str(config.seed), "--pretrained"]
    if config.feat_dir is not None:
        words += ["--stage", "5"]
    return " ".join(word if word.startswith("$") else shlex.quote(word) for word in words)


def card(facts: dict[str, Any]) -> str:
    """The card of a kept checkpoint, as Markdown."""
    low, high = facts["ci95"]
    rows = [
        ("accuracy", f"{percent(facts['accuracy'], 2)} of {facts['n']:,} {facts['split']} clips"),
        ("95 % interval (Wilson)", f"{100 * low:.2f}-{100 * high:.2f} %"),
        ("accuracy of the integer model", percent(facts.get("integer_accuracy"), 2)),
        ("device noise in evaluation", facts["evaluation_noise"] or "none"),
        ("protocol", f"`{facts['protocol']['name']}`, SHA-256 of its lists `{facts['protocol']['hash']}`"),
        ("corpus, front end", f"{facts['corpus']}, {facts['frontend']}"),
        ("classes", " ".join(facts["classes"])),
        ("parameters", facts["parameters"]),
        ("multiply-adds per clip", facts["macs"]),
        ("bytes of the stored weights", facts["weight_bytes"]),
        ("file", f"`{facts['file']}`, {facts['bytes']:,} bytes"),
        ("SHA-256", f"`{facts['sha256']}`"),
        ("seed", str(facts["seed"])),
        ("licence of the weights", facts["licence"]),
    ]
    return f"""# {facts["recipe"]} / {facts["variant"]}

{table(("", ""), rows)}

The file holds the weights as integer codes with their scales, and clipping ranges and statistics in float32; the figures
above were measured from it. Score it again:

```
{facts["command"]}
```

Trained by:

```
{facts["trained_by"]}
```
"""

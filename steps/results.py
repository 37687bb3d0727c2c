#!/usr/bin/env python3
"""Kept results: renew RESULTS.md of the recipes, keep the result of a run or a sweep, or compare two models.

steps/results.py                          renew RESULTS.md of every recipe
steps/results.py --check                  exit code 1 where one is not what its result files give
steps/results.py --keep EXP...            keep exp/<recipe>/<tag> or exp/<recipe>/sweeps/<name>, then renew
steps/results.py --compare A... --with B...   difference B - A on the same clips (each a run folder, one of each seed)
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kestrel import recipe as recipes
from kestrel.errors import EXIT_ERROR, UsageError
from kestrel.pipeline.console import log, setup_logging
from kestrel.pipeline.results import keep, results_text, write_results
from kestrel.pipeline.step import ROOT, exit_code
from kestrel.score.compare import compare


def _folder(text: str) -> Path:
    folder = Path(os.path.abspath(ROOT / text))
    if not folder.is_dir():
        raise UsageError(f"no such folder: {text}")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--keep", nargs="+", metavar="EXP", default=[])
    parser.add_argument("--compare", nargs="+", metavar="A", default=[])
    parser.add_argument("--with", nargs="+", metavar="B", default=[], dest="other")
    options = parser.parse_args()
    if bool(options.compare) != bool(options.other):
        raise UsageError("--compare A... needs --with B...: run folders of two models")
    if options.compare:
        files = [[_folder(text) / "score" / "scores.csv" for text in side] for side in (options.compare, options.other)]
        found = compare(*files)
        print(
            f"{100 * found.value:+.2f} points (95 % paired interval {100 * found.low:+.2f} to {100 * found.high:+.2f}; "
            f"{found.n:,} clips, {len(options.other)} against {len(options.compare)} seeds)"
        )
        return 0
    for text in options.keep:
        log.info("kept: %s", keep(ROOT, _folder(text)).relative_to(ROOT))
    if options.keep:
        return 0
    stale = 0
    for recipe in recipes.names(ROOT):
        if options.check:
            page = ROOT / "recipes" / recipe / "RESULTS.md"
            if not page.exists() or page.read_text(encoding="utf-8") != results_text(ROOT, recipe):
                log.error(
                    "error: recipes/%s/RESULTS.md is not what its result files give: run steps/results.py", recipe
                )
                stale += 1
        else:
            log.info("%s", write_results(ROOT, recipe).relative_to(ROOT))
    return EXIT_ERROR if stale else 0


if __name__ == "__main__":
    setup_logging()
    try:
        code = main()
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        code = exit_code(error)
    sys.exit(code)

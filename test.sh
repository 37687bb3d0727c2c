#!/usr/bin/env bash
# Sets up what the tests need, then runs all of them, layer by layer, with the seconds of each.
# ./test.sh NAME... runs single layers: lint, unit, smoke. Further arguments after -- go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
KESTREL_EXTRAS=dev
. ./path.sh

layers=() rest=()
while [ $# -gt 0 ]; do
  case $1 in
    --)
      shift
      rest=("$@")
      break
      ;;
    lint | unit | smoke) layers+=("$1") ;;
    *) die "unknown layer '$1'; known: lint, unit, smoke" ;;
  esac
  shift
done
[ "${#layers[@]}" -gt 0 ] || layers=(lint unit smoke)

lint() {
  "$python" -m ruff check .
  "$python" -m ruff format --check .
  "$python" -m mypy
  "${python%python*}lint-imports" --no-cache
  if command -v shellcheck >/dev/null 2>&1; then
    shellcheck -x run.sh path.sh cmd.sh test.sh .ci/run
  elif [ -n "${CI:-}" ]; then
    die "shellcheck is missing"
  else
    say "shellcheck is not installed: the shell scripts were not checked (apt-get install shellcheck)"
  fi
}
# As many processes as processors, each with one thread; a test file stays in one process, runs are dealt out singly.
tests() { OMP_NUM_THREADS=1 "$python" -m pytest -n "${KESTREL_TEST_PROCESSES:-logical}" --durations=10 "$@" ${rest[@]+"${rest[@]}"}; }
unit() { tests -m "not smoke" --dist loadfile; }
smoke() { tests -m smoke --dist worksteal; }

failed=() report=()
for layer in "${layers[@]}"; do
  say "== $layer"
  begin=$SECONDS
  # In a subshell of its own, so that errexit holds inside the layer.
  code=0
  (set -e; "$layer") & wait $! || code=$?
  report+=("$layer: $((SECONDS - begin)) s$([ "$code" -eq 0 ] || echo ' FAILED')")
  [ "$code" -eq 0 ] || failed+=("$layer")
done
printf '%s\n' "${report[@]}" >&2
[ "${#failed[@]}" -eq 0 ] || die "failed: ${failed[*]}"
say "all layers passed"

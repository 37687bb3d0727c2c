#!/usr/bin/env bash
# Trains, scores and exports a keyword spotter in numbered stages. Try: ./run.sh --help
set -euo pipefail

KESTREL_START=$(pwd -P) # paths on the command line are relative to the user's folder
export KESTREL_START
CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")"
. ./path.sh
. ./cmd.sh

plan=$(mktemp "${TMPDIR:-/tmp}/kestrel-plan.XXXXXX")
trap 'rm -f "$plan"' EXIT
"$python" steps/plan.py --plan-file "$plan" "$@"
[ -s "$plan" ] || exit 0 # help or dry run

backend=local flags=() sweep="" gather="" last="" failed="" exp=""
while IFS=$'\t' read -r -u 3 kind first number name; do
  case $kind in
    backend) backend=$first ;;
    flags) IFS=$'\t' read -r -a flags <<<"$first"$'\t'"$number"$'\t'"$name" ;;
    extra) install_extra "$first" "$number" ;;
    sweep) sweep=$first gather=$number ;;
    stage)
      exp=$first
      [ "$exp" != "$failed" ] || continue
      [ "$exp" = "$last" ] || echo "$exp" >&2
      last=$exp
      code=0
      "run_$backend" "$exp" "$number" "$name" "${flags[@]}" || code=$?
      if [ "$code" -ne 0 ]; then
        # A failing point of a sweep is recorded and the others go on; a stop by a signal ends everything.
        if [ -n "$sweep" ] && [ "$code" -ne 75 ] && [ "$code" -lt 128 ]; then
          failed=$exp
        else
          exit "$code"
        fi
      fi
      ;;
  esac
done 3<"$plan"

if [ -n "$gather" ]; then
  "$python" steps/gather.py "$sweep"
elif [ -n "$sweep" ]; then
  [ -z "$failed" ]
else
  "$python" steps/summary.py "$exp"
fi

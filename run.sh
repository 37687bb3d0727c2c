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

backend=local jobs=1 flags=() sweep="" gather="" keep="" keep_pretrained="" exp="" groups=0 refused=0 failed=$'\n'
while IFS=$'\t' read -r -u 3 kind first second third group; do
  case $kind in
    backend) backend=$first ;;
    jobs) jobs=$first ;;
    flags) IFS=$'\t' read -r -a flags <<<"$first"$'\t'"$second"$'\t'"$third"$'\t'"$group" ;;
    extra) install_extra "$first" "$second" ;;
    keep) keep=1 ;;
    keep_pretrained) keep_pretrained=1 ;;
    sweep) sweep=$first gather=${second#-} refused=$third ;;
    stage) exp=$first groups=$group ;;
  esac
done 3<"$plan"

# Runs stages of the plan: walk GROUP FIRST LAST, a group of runs or all of them (GROUP empty). A failing point of a sweep
# is recorded in its log and the others go on; a stop by a signal ends everything.
walk() {
  local only=$1 from=$2 to=$3 kind exp number name group last="" code
  while IFS=$'\t' read -r -u 3 kind exp number name group; do
    if [ "$kind" != stage ] || [ "$number" -lt "$from" ] || [ "$number" -gt "$to" ]; then continue; fi
    [ -z "$only" ] || [ "$group" = "$only" ] || continue
    case $failed in *$'\n'"$exp"$'\n'*) continue ;; esac
    [ "$exp" = "$last" ] || echo "$exp" >&2
    last=$exp code=0
    "run_$backend" "$exp" "$number" "$name" "${flags[@]}" || code=$?
    [ "$code" -ne 0 ] || continue
    if [ -z "$sweep" ] || [ "$code" -eq 75 ] || [ "$code" -ge 128 ]; then
      return "$code"
    fi
    failed=$failed$exp$'\n'
  done 3<"$plan"
  return 0
}

# Walks through the groups, `jobs` of them at a time; what they print goes into a log of each.
walk_together() {
  local group pid pids="" code=0 got stop="" log
  trap 'stop=130' INT
  trap 'stop=143' TERM
  for ((group = 1; group <= groups; group++)); do
    while [ -z "$stop" ] && [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do sleep 0.5; done
    [ -z "$stop" ] || break
    grep -q "^stage.*$(printf '\t')$group\$" "$plan" || continue # its runs are up to date
    log="$sweep/group-$group.log"
    echo "  group $group of $groups: started, log in $log" >&2
    (
      trap - INT TERM
      code=0 before=$failed
      walk "$group" 3 6 >"$log" 2>&1 || code=$?
      [ "$code" -ne 0 ] || [ "$failed" = "$before" ] || code=1
      echo "  group $group of $groups: ended" >&2
      exit "$code"
    ) &
    pids="$pids $!"
  done
  # shellcheck disable=SC2086 # a list of numbers
  for pid in $pids; do
    while :; do
      if [ -n "$stop" ]; then
        kill -TERM $pids 2>/dev/null || true
      fi
      got=0
      wait "$pid" || got=$?
      # 128 and more: the wait was broken off by a signal, or the group was
      if [ "$got" -lt 128 ] || ! kill -0 "$pid" 2>/dev/null; then break; fi
    done
    case $got in
      0 | 127) ;;
      1) failed=${failed}group$'\n' ;; # recorded in its log
      *) code=$got ;;
    esac
  done
  trap - INT TERM
  return "${stop:-$code}"
}

if [ -n "$sweep" ] && [ "$jobs" -gt 1 ]; then
  walk "" 0 2 # data and features are shared
  walk_together
else
  walk "" 0 6
fi

code=0
if [ -n "$gather" ]; then
  "$python" steps/gather.py "$sweep" || code=$?
elif [ -n "$sweep" ]; then
  if [ "$failed" != $'\n' ] || [ "$refused" -gt 0 ]; then
    code=1
    echo "  error: points of the sweep failed ($refused could not start); the lines above and the logs in $sweep say why" >&2
  fi
else
  "$python" steps/summary.py "$exp"
fi
[ -z "$keep_pretrained" ] || "$python" steps/keep_checkpoint.py "$exp" || code=$?
[ -z "$keep" ] || "$python" steps/results.py --keep "${sweep:-$exp}" || code=$?
exit "$code"

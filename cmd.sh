# shellcheck shell=bash
# Sourced by run.sh: the job backends. Each is a function run_<name> EXP NUMBER STAGE FLAGS... that runs one stage
# and returns its exit code (75 = its state is saved, run it again).
: "${python:?source path.sh first}"

run_local() {
  local exp=$1 stage=$3
  shift 3
  "$python" "steps/$stage.py" "$exp" "$@"
}

# One sbatch job per stage; the site's flags stand in conf/backends/slurm.yaml. A job that stopped before its time limit
# with exit code 75 is submitted again.
run_slurm() {
  local exp=$1 number=$2 stage=$3 code job tries=0 flags=() line out
  shift 3
  command -v sbatch >/dev/null 2>&1 || {
    echo "error: --backend slurm: sbatch is not on the path" >&2
    return 1
  }
  if [ "$("$python" steps/status.py "$exp" "$stage" "$@")" = skip ]; then
    run_local "$exp" "$number" "$stage" "$@"
    return
  fi
  while IFS= read -r line; do flags+=("$line"); done < <("$python" steps/backend_flags.py slurm "$stage")
  mkdir -p "$exp/log"
  while :; do
    out="$exp/log/$stage.slurm.out"
    rm -f "$out"
    echo "  stage $number $stage: submitted to Slurm, log in $out" >&2
    code=0
    job=$(sbatch --parsable --wait --job-name="kestrel-$stage" --output="$out" --export=ALL ${flags[@]+"${flags[@]}"} \
      --wrap "exec '$python' 'steps/$stage.py' '$exp' $*") || code=$?
    if [ "$code" -eq 75 ] && [ "$tries" -lt 20 ]; then
      tries=$((tries + 1))
      echo "  stage $number $stage: stopped with its state saved, submitted again" >&2
      continue
    fi
    if [ "$code" -ne 0 ]; then
      echo "  stage $number $stage: job ${job:-?} ended with code $code; the end of $out:" >&2
      tail -n 20 "$out" >&2 2>/dev/null || echo "  (no output: the job did not start)" >&2
    else
      cat "$out" >&2 2>/dev/null || true
    fi
    return "$code"
  done
}

# shellcheck shell=bash
# Sourced by run.sh: the job backends. Each is a function run_<name> EXP NUMBER STAGE FLAGS... that runs one stage
# and returns its exit code (75 = its state is saved, run it again).
: "${python:?source path.sh first}"

# Runs a command and passes on the signals that reach run.sh alone (kill, a time limit), so that its state is saved.
# Ctrl-C reaches the command by itself.
attended() {
  local child got code=127 again
  "$@" &
  child=$!
  trap 'again=1; kill -TERM "$child" 2>/dev/null || true' TERM
  trap 'again=1; kill -USR1 "$child" 2>/dev/null || true' USR1
  trap 'again=1' INT
  while :; do
    again="" got=0
    wait "$child" || got=$?
    [ "$got" -eq 127 ] || code=$got # 127: it had ended already
    [ -n "$again" ] || break
  done
  trap - TERM USR1 INT
  return "$code"
}

run_local() {
  local exp=$1 stage=$3
  shift 3
  attended "$python" "steps/$stage.py" "$exp" "$@"
}

# Whether a stage has its result. A network file system may show a file of another machine late: listing helps it.
finished() { # finished EXP STAGE
  local try
  for try in 1 2 3; do
    [ "$("$python" steps/status.py "$1" "$2")" != skip ] || return 0
    ls -a "$1" "$1/$2" >/dev/null 2>&1 || true
    [ "$try" -eq 3 ] || sleep 1
  done
  return 1
}

# One sbatch job per stage; the site's flags stand in conf/backends/slurm.yaml. A job that stopped before its time limit
# with exit code 75 is submitted again.
run_slurm() {
  local exp=$1 number=$2 stage=$3 code job state tries=0 flags=() lines line out
  shift 3
  command -v sbatch >/dev/null 2>&1 || {
    echo "error: --backend slurm: sbatch is not on the path" >&2
    return 1
  }
  state=$("$python" steps/status.py "$exp" "$stage" "$@") || return
  case $state in
    run | resume | extend) ;;
    *) # up to date, or it cannot run: the step says so without a job
      run_local "$exp" "$number" "$stage" "$@"
      return
      ;;
  esac
  lines=$("$python" steps/backend_flags.py slurm "$stage") || return
  while IFS= read -r line; do
    [ -z "$line" ] || flags+=("$line")
  done <<<"$lines"
  mkdir -p "$exp/log"
  while :; do
    out="$exp/log/$stage.slurm.out"
    rm -f "$out"
    echo "  stage $number $stage: submitted to Slurm, log in $out (Ctrl-C leaves the job running: see squeue, scancel)" >&2
    code=0
    job=$(sbatch --parsable --wait --job-name="kestrel-$stage" --output="$out" --export=ALL ${flags[@]+"${flags[@]}"} \
      --wrap "exec '$python' 'steps/$stage.py' '$exp' $*") || code=$?
    if [ "$code" -eq 75 ] && [ "$tries" -lt 20 ]; then
      tries=$((tries + 1))
      echo "  stage $number $stage: stopped with its state saved, submitted again" >&2
      continue
    fi
    if [ "$code" -eq 0 ] && ! finished "$exp" "$stage"; then
      code=1 # sbatch --wait gives 0 for a job that was cancelled before it began
      echo "  stage $number $stage: job ${job:-?} left no result; was it cancelled?" >&2
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

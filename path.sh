# shellcheck shell=bash
# Sourced by run.sh and test.sh in the root of the repository: finds the Python environment, or makes it, and sets
# $python. Order: KESTREL_PYTHON, an activated venv or conda environment, .venv (made here at the first start).

root=$PWD
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=${PYTHONDONTWRITEBYTECODE:-}
# Threads that wait for others hand their core back soon (libgomp's own value where threads outnumber cores): its long spin
# makes training several times slower as soon as another program takes a part of a core.
[ -n "${OMP_WAIT_POLICY:-}" ] || export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:=1000}"
constraints=conf/constraints.txt
torch_cpu_index=https://download.pytorch.org/whl/cpu

say() { printf '%s\n' "$*" >&2; }
die() {
  say "error: $*"
  exit 1
}

python_version_ok() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2])' 2>/dev/null; }

find_base_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null 2>&1 && python_version_ok "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  die "Python 3.11 or newer is needed: apt-get install python3 python3-venv (or set KESTREL_PYTHON)"
}

has_nvidia() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }

# Arguments for pip that make it prefer a CPU build of torch; nothing where there is a GPU or the index is out of reach.
torch_arguments() {
  [ "$(uname -s)" = Linux ] && ! has_nvidia || return 0
  if "$1" - "$torch_cpu_index/torch/" 2>/dev/null <<'PROBE'; then
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=5).close()
PROBE
    printf '%s\n' --extra-index-url "$torch_cpu_index"
  fi
}

pip_install() { # pip_install PYTHON WHAT...
  local interpreter=$1 arguments=() line
  shift
  while IFS= read -r line; do arguments+=("$line"); done < <(torch_arguments "$interpreter")
  "$interpreter" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" \
    ${arguments[@]+"${arguments[@]}"} "$@" >&2
}

stamp_text() { cat pyproject.toml "$constraints" | cksum; }

make_environment() { # make_environment EXTRAS: .venv with the packages of pyproject.toml, pinned by the constraints
  local extras=$1 base stamp=.venv/.kestrel-$1
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(stamp_text)" ]; then
    return
  fi
  if ! mkdir .venv.lock 2>/dev/null; then
    die "another set-up of .venv is running (if not: rmdir .venv.lock)"
  fi
  trap 'rmdir .venv.lock 2>/dev/null || true' EXIT
  if [ ! -x .venv/bin/python ]; then
    base=$(find_base_python)
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
      die "this Python cannot make environments: apt-get install python3-venv"
    if has_nvidia; then
      say "Setting up .venv (once): about 3 GB to download, with CUDA"
    else
      say "Setting up .venv (once): about 400 MB to download with the CPU build of torch"
    fi
    "$base" -m venv .venv
  else
    say "Updating .venv (${extras})"
  fi
  if ! command -v cc >/dev/null 2>&1 || ! command -v make >/dev/null 2>&1; then
    say "No C compiler (cc, make): training will be slower and stage 6 cannot check its C program: apt-get install g++ make"
  fi
  pip_install .venv/bin/python --editable ".[$extras]" ||
    die "the set-up failed: see pip's message above, then run the same command again"
  .venv/bin/python -m kestrel.nn.build >&2
  stamp_text >"$stamp"
  rmdir .venv.lock
  trap - EXIT
}

install_extra() { # install_extra NAME WORDS: an optional package set, named on the screen
  say "Installing the optional packages '$1': $2"
  if [ "$python" = "$root/.venv/bin/python" ]; then
    pip_install "$python" --editable ".[$1]" || die "could not install the optional packages '$1'"
  else
    die "$python lacks the optional packages '$1': $python -m pip install -c $constraints -e '.[$1]'"
  fi
}

check_environment() { # check_environment PYTHON: an environment of the user's own is used as it is
  local missing
  python_version_ok "$1" || die "$1 is not Python 3.11 or newer"
  missing=$("$1" - <<'CHECK'
import importlib.util
needed = "torch torchaudio soundfile pandas h5py yaml thop numpy scipy matplotlib onnx onnxruntime".split()
print(*[name for name in needed if importlib.util.find_spec(name) is None])
CHECK
  )
  [ -z "$missing" ] || die "$1 lacks $missing: $1 -m pip install -c $constraints -e ."
}

if [ -n "${KESTREL_PYTHON:-}" ]; then
  python=$(command -v "$KESTREL_PYTHON") || die "KESTREL_PYTHON=$KESTREL_PYTHON: no such program"
  check_environment "$python"
elif [ -n "${VIRTUAL_ENV:-}" ] && [ "$VIRTUAL_ENV" != "$root/.venv" ]; then
  python=$VIRTUAL_ENV/bin/python
  check_environment "$python"
elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
  python=$CONDA_PREFIX/bin/python
  check_environment "$python"
else
  make_environment "${KESTREL_EXTRAS:-run}"
  python=$root/.venv/bin/python
fi
export python

# Sourced by the other scripts: finds, or makes, a Python that has what fp8dist needs.
# shellcheck shell=bash

repo_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$repo_root/.venv
# Stands in the venv while it is being filled. A venv that still has it was interrupted.
unfinished=$venv/.unfinished

die() {
  echo "$*" >&2
  exit 1
}

gpu_visible() {
  case ${CUDA_VISIBLE_DEVICES-unset} in "" | -1) return 1 ;; esac
  nvidia-smi -L 2>/dev/null | grep -q '^GPU ' || compgen -G '/dev/nvidia[0-9]*' >/dev/null
}

# probe PYTHON EXTRA: prints the number of GPUs, or fails and prints what is missing.
probe() {
  "$1" "$repo_root/scripts/probe_environment.py" "$2" 2>/dev/null
}

# The interpreter that a venv is made from, never one inside the venv itself.
base_python() {
  local found
  found=$(type -P "${PYTHON:-python3}") || die "fp8dist needs Python 3.10 or newer; \
${PYTHON:-python3} was not found. Install it, or name another with PYTHON=/path/to/python."
  "$found" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "fp8dist needs Python 3.10 \
or newer; $found is $("$found" -V 2>&1). Name another with PYTHON=/path/to/python."
  "$found" -c 'import sys; print(sys._base_executable)'
}

# make_venv EXTRA: fills .venv unless it is complete. One process at a time, where flock exists:
# the agents of several nodes may share the folder.
make_venv() (
  exec 9>"$repo_root/.venv.lock"
  if command -v flock >/dev/null && ! flock -n 9; then
    echo "Waiting for another process that is filling $venv" >&2
    flock 9
  fi
  if [[ ! -e $unfinished && -x $venv/bin/python ]] && probe "$venv/bin/python" "$1" >/dev/null; then
    exit 0
  fi
  base=$(base_python)
  echo "Installing fp8dist[$1] into $venv (once, some minutes)" >&2
  if [[ -e $unfinished ]]; then rm -rf "$venv"; fi
  mkdir -p "$venv"
  touch "$unfinished"
  if [[ ! -x $venv/bin/python ]]; then "$base" -m venv "$venv"; fi
  pin=()
  if ! gpu_visible; then pin=(-c "$repo_root/scripts/constraints-cpu.txt"); fi
  output=$("$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    ${pin[@]+"${pin[@]}"} -e "$repo_root[$1]" 2>&1) || die "$output"
  lacking=$(probe "$venv/bin/python" "$1") || die "$venv still lacks: $lacking. Remove it and retry."
  rm "$unfinished"
)

# use_python EXTRA: sets `python` and `gpus` to the active environment's, or else to .venv's.
use_python() {
  python=$(type -P "${PYTHON:-python3}") || python=
  if [[ -n $python && ! (-e $unfinished && $python == "$venv"/*) ]]; then
    if gpus=$(probe "$python" "$1"); then return; fi
  fi
  make_venv "$1"
  python=$venv/bin/python
  gpus=$(probe "$python" "$1")
}

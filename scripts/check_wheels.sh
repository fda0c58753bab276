#!/usr/bin/env bash
# Try what a release would upload: ./scripts/check_wheels.sh [PYTHON ...]
#
# Builds the sdist, from it the wheel, and for each Python (default: python3.X for every version that
# setup.cfg names) installs the wheel into a fresh environment, imports every module, and trains on
# 2 CPU ranks, outside the checkout. Some minutes for each; what it makes is deleted. OUT=FOLDER keeps
# the sdist and the wheel there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV

named=$(sed -n 's/^ *Programming Language :: Python :: \(3\..*\)$/\1/p' "$repo_root/setup.cfg")
required=$(sed -n 's/^python_requires = >=//p' "$repo_root/setup.cfg")
[[ $(head -n 1 <<<"$named") == "$required" ]] ||
  die "setup.cfg requires Python $required, and its classifiers begin with $(head -n 1 <<<"$named")."
# shellcheck disable=SC2046,SC2086  # versions are words
if (($# == 0)); then set -- $(printf 'python%s ' $named); fi
missing=()
for python in "$@"; do
  # A shim may be there of a Python that is not.
  "$python" -c "" 2>/dev/null || missing+=("$python")
done
((${#missing[@]} == 0)) || die "Not found, or they do not run: ${missing[*]}"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$repo_root/scripts/train_fsdp2.py" "$work"
pin=()
if ! gpu_visible; then pin=(-c "$repo_root/scripts/constraints-cpu.txt"); fi

# quietly COMMAND...: what it printed is of interest only if it failed.
quietly() {
  local output
  output=$("$@" 2>&1) || die "$*"$'\n'"$output"
}

echo "== build"
"$1" -m venv "$work/build"
quietly "$work/build/bin/python" -m pip install build
quietly "$work/build/bin/python" -m build --outdir "$work/dist" "$repo_root"
wheel=$(echo "$work"/dist/*.whl)
ls "$work/dist"

for python in "$@"; do
  echo "== $("$python" -V)"
  "$python" -m venv "$work/venv"
  venv_python=$work/venv/bin/python
  pip=("$venv_python" -m pip install --disable-pip-version-check ${pin[@]+"${pin[@]}"})
  launch=("$venv_python" -m torch.distributed.run --standalone --nproc-per-node 2)
  cd "$work"
  export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
  export PYTHONWARNINGS="ignore:Failed to initialize NumPy"  # torch without it warns, and works

  quietly "${pip[@]}" "$wheel"
  "${launch[@]}" train_fsdp2.py | sed -n '1p;$p'

  quietly "${pip[@]}" "$wheel[train]"
  quietly "$venv_python" -m pip check
  "$venv_python" - <<'IMPORT'
import importlib
import importlib.metadata
import pkgutil
import sys
import warnings

import fp8dist

assert fp8dist.__file__.startswith(sys.prefix), fp8dist.__file__
warnings.simplefilter("error", SyntaxWarning)
imported, lacking = 0, {}
for module in pkgutil.walk_packages(fp8dist.__path__, "fp8dist."):
    if module.name.endswith("__main__"):
        continue  # trained with below
    try:
        importlib.import_module(module.name)
        imported += 1
    except ModuleNotFoundError as error:
        # What else they work with: the CPU build of torch has no Triton.
        if error.name not in ("triton", "torchtitan"):
            raise
        lacking[module.name] = error.name
versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "torchao")]
print(f"{', '.join(versions)}; imported {imported} modules", *[
    f"not {name} (no {package})" for name, package in lacking.items()
], sep=", ")
IMPORT
  "${launch[@]}" -m fp8dist.train --model.flavor debugmodel --training.steps 3 \
    --training.local_batch_size 2 --training.seq_len 64 --metrics.log_freq 1 \
    --model.converters quantize.linear.float8 | grep "step"
  cd "$repo_root"
  rm -rf "$work/venv"
done

if [[ -n ${OUT:-} ]]; then
  mkdir -p "$OUT"
  cp "$work"/dist/* "$OUT"
fi

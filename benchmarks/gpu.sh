#!/usr/bin/env bash
# Checks and times everything on one card, in at most eight minutes: the tests that need CUDA,
# training, where a step's time goes, decoding, and whether a small model learns. Prints a table
# and one JSON object at the end, and writes both to $OUT where that is set.
#
#     bash benchmarks/gpu.sh                              # on a machine with a CUDA device
#     ARCHERCHAT_GPU_DRY_RUN=1 bash benchmarks/gpu.sh     # the same at toy sizes on a CPU
#
# A machine without a network gets what it lacks from benchmarks/gpu_bundle.sh.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=python3
[ -x .venv/bin/python ] && [ ! -d .gpu-bundle ] && python=.venv/bin/python
python=${PYTHON:-$python}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
bundled=$PWD/.gpu-bundle/python$version
export PYTHONPATH=$PWD/src:$PWD/endlex/src:$bundled${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1
exec "$python" benchmarks/gpu_check.py

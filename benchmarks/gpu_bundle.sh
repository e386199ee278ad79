#!/usr/bin/env bash
# Gathers in .gpu-bundle/ what a bare machine with a card lacks for benchmarks/gpu.sh: packages for
# its Python, unpacked, and those of the reference's goldens that the check needs. Prints the size
# of what would travel. PYTHON_VERSION is the other machine's, 3.12 by default.
#
#     bash benchmarks/gpu_bundle.sh [ORACLE]
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
oracle=${1:-../shared/oracle}
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
python=${PYTHON:-$python}
version=${PYTHON_VERSION:-3.12}
bundle=.gpu-bundle
limit_mib=64

[ -f "$oracle/train_curve.json" ] || { echo "no goldens in $oracle: give their folder" >&2; exit 2; }
rm -rf "$bundle"
mkdir -p "$bundle/shared/oracle/tokenizer"

# All that the check imports and that the card's image may lack; not pyarrow, which nothing here
# needs: the golden run's batches travel packed.
"$python" -m pip install -q --no-deps --no-compile --only-binary=:all: --upgrade \
    --python-version "$version" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --target "$bundle/python$version" \
    tyro docstring-parser typeguard rustbpe rich markdown-it-py mdurl pygments \
    hypothesis sortedcontainers pytest-timeout pytest-xdist execnet

for file in model_a.json model_a.safetensors model_a_io.safetensors \
    train_curve.json train_init.safetensors tokenizer/mergeable_ranks.tiktoken; do
    cp "$oracle/$file" "$bundle/shared/oracle/$file"
    chmod u+w "$bundle/shared/oracle/$file"
done
PYTHONPATH=$PWD/src:$PWD/endlex/src${PYTHONPATH:+:$PYTHONPATH} \
    "$python" benchmarks/gpu_learning.py --pack "$oracle" "$bundle/learning.npz"

carried=$(du -sk "$bundle" | cut -f1)
tracked=$(git archive HEAD | wc -c)
total=$(((carried * 1024 + tracked) / 1048576 + 1))
echo "$bundle: $((carried / 1024)) MiB; with the checkout $total MiB of $limit_mib"
echo "nothing is installed there: carry $bundle beside the checkout and run"
echo "    bash benchmarks/gpu.sh"
[ "$total" -lt "$limit_mib" ] || { echo "too large to travel" >&2; exit 1; }

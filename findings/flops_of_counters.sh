#!/usr/bin/env bash
# What counters of FLOPs say of a transposed convolution, a spectral layer and an attention, beside the arithmetic.
#
#   bash findings/flops_of_counters.sh > results/flops/counters.csv
#
# None of them counts a Fourier transform, and none but fvcore's and mmengine's (by a log message) says so. thop and torchinfo also count a transposed
# convolution of stride 2 four times, as if it were a convolution at its output positions, and no matrix product that is not a layer: of a dense non-local
# block's attention nothing. Exit code 1 if any of this is no longer so. Python 3.11 or newer; downloads 3 GB.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.15.0 numpy==2.4.6 setuptools==80.9.0 packaging==26.3 fvcore==0.1.5.post20221221 mmengine-lite==0.10.7 thop==0.1.1.post2209072238 ptflops==0.7.5 torchinfo==1.8.0 >&2
"$tmp/venv/bin/python" "$here/flops_of_counters.py"

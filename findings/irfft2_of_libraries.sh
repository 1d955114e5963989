#!/usr/bin/env bash
# What the inverse 2-D real transforms of other libraries read of a half spectrum that is not Hermitian, on a CPU.
#
#   bash findings/irfft2_of_libraries.sh > results/inverse/libraries.csv
#
# NumPy, SciPy, ducc0, FFTW, mkl_fft and JAX read 'average' at every size. MKL's own transform of both dimensions reads what its size decides:
# 'average' if H and an even W are both at least 16, 'upper' otherwise. Exit code 1 if any of this is no longer so. Python 3.11 or newer.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q numpy==2.4.6 scipy==1.17.1 jax==0.10.2 jaxlib==0.10.2 pyfftw==0.15.1 ducc0==0.42.0 mkl==2026.2.0 mkl-fft==2.3.2 >&2
failed=0
export OMP_NUM_THREADS=1
run() { PYTHONPATH=$here "$tmp/venv/bin/python" -W ignore "$here/irfft2_of_libraries.py" "$@" || failed=1; }
echo 'library,version,function,path,sizes,reads,from_average,from_upper'
for name in numpy scipy ducc0 fftw mkl_fft jax; do run $name; done  # a process each: MKL brings functions with the names of FFTW
run mkl "as MKL chose on $(awk '/vendor_id/ {print $3; exit}' /proc/cpuinfo)" upper average
exit $failed

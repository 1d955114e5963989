#!/usr/bin/env bash
# What the inverse 2-D real transform of PyTorch 1 reads of a half spectrum that is not Hermitian, on a CPU.
#
#   bash findings/irfft_of_pytorch_1.sh > results/inverse/pytorch_1.csv
#
# torch.irfft (1.1, 1.4 and 1.7.1) hands both dimensions to MKL. What MKL reads depends on its code path, so on the processor, and on the size:
#   older path (MKL_DEBUG_CPU_TYPE=4; and whatever MKL 2020 chose on AMD): 'upper' at every size;
#   newer path (types 5 and 7, commonly said to be AVX2 and AVX-512, so what an Intel processor gets): 'average' if H and an even W are both at least 16
#   (H 17 in torch 1.1), 'upper' otherwise.
# MKL_DEBUG_CPU_TYPE is not documented by Intel. The gradient is that of 'average' everywhere; where the values are 'upper', torch's own gradcheck fails.
# torch.fft.irfftn (1.7.1, 1.8.0) reads 'average' everywhere. Exit code 1 if any of this is no longer so.
#
# Python 3.9 comes from Debian's packages, unpacked into a temporary folder. For torch 1.1 and 1.4 there must be a Python 3.7: PYTHON37=/path/to/python3.7.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT; cd "$tmp"
pool=http://deb.debian.org/debian/pool/main
for deb in p/python3.9/{python3.9,python3.9-minimal,libpython3.9-stdlib,libpython3.9-minimal}_3.9.2-1 libf/libffi/libffi7_3.3-6; do
    curl -sfO "$pool/${deb}_amd64.deb"; dpkg -x "${deb##*/}_amd64.deb" py39
done
export OMP_NUM_THREADS=1 PYTHONNOUSERSITE=1
PROCESSOR="as MKL chose on $(awk '/vendor_id/ {print $3; exit}' /proc/cpuinfo)"; export PROCESSOR

get() {  # folder, Python version, packages: pinned wheels, unpacked
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$2" --platform manylinux1_x86_64 --platform manylinux2014_x86_64 -d "$1.wheels" "${@:3}" >&2
    for wheel in "$1.wheels"/*.whl; do python3 -m zipfile -e "$wheel" "$1"; done
    rm -rf "$1.wheels"
}
python39() { LD_LIBRARY_PATH=$tmp/py39/usr/lib/x86_64-linux-gnu "$tmp/py39/usr/bin/python3.9" "$@"; }
failed=0
run() {  # folder, interpreter: all paths; type 7 needs AVX-512
    for type in '' 4 5 $(grep -qw avx512f /proc/cpuinfo && echo 7); do
        PYTHONPATH=$tmp/$1:$here MKL_DEBUG_CPU_TYPE=$type "$2" -W ignore "$here/irfft_of_pytorch_1.py" || failed=1
    done
}
echo 'library,version,function,path,sizes,reads,from_average,from_upper'
for version in 1.8.0 1.7.1; do
    get "torch-$version" 39 torch==$version numpy==1.19.5 typing_extensions==4.7.1
    run "torch-$version" python39; rm -rf "torch-$version"
done
if "${PYTHON37:=python3.7}" --version >/dev/null 2>&1; then
    for version in 1.4.0 1.1.0; do
        get "torch-$version" 37 torch==$version numpy==1.16.6
        run "torch-$version" "$PYTHON37"; rm -rf "torch-$version"
    done
else
    echo 'torch 1.4.0 and 1.1.0: not run, there is no Python 3.7 (PYTHON37=...)' >&2
fi
exit $failed

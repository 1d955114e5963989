#!/usr/bin/env bash
# All that has to be known about a GPU, in nine minutes: see nbs/8_benchmarks/09_gpu.ipynb.
#   scripts/gpu.sh [--wheels FOLDER] [--out FOLDER] [--data FOLDER] [--small] [options of python -m srl_pose.benchmarks.gpu]
# PYTHON names the interpreter (default: python3). Nothing is downloaded: what is missing is named, and installed from a folder of wheels if one is given.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out='' wheels='' rest=()
while [ $# -gt 0 ]; do
    case $1 in
        --wheels|--out) [ $# -ge 2 ] || { echo "error: $1 needs a folder" >&2; exit 2; }
            if [ "$1" = --wheels ]; then wheels=$2; else out=$2; fi; shift 2 ;;
        *) rest+=("$1"); shift ;;
    esac
done
case " ${rest[*]-} " in *' --small '*) usual=outputs/gpu-small ;; *) usual=results/gpu ;; esac  # a trial must not replace what a GPU said
out=${out:-$usual}

# distribution:module of all that the run imports; pytest is wanted, not needed
missing() {
    "$python" - "$@" <<'PY'
import importlib.util, sys
def there(module):
    try: return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError: return False  # of the package that it is in
print(*[name for name, module in (pair.split(':') for pair in sys.argv[1:]) if not there(module)])
PY
}
needed="torch:torch torchvision:torchvision numpy:numpy opencv-python:cv2 pycocotools:pycocotools matplotlib:matplotlib tqdm:tqdm psutil:psutil pydantic:pydantic \
ruamel.yaml:ruamel.yaml tabulate:tabulate scipy:scipy mistune:mistune"
packages=$PWD/outputs/gpu-packages
export PYTHONPATH=$PWD:$packages${PYTHONPATH:+:$PYTHONPATH}
lacking=$(missing $needed)
if [ -n "$lacking" ] && [ -n "$wheels" ]; then
    "$python" -m pip install --quiet --no-index --find-links "$wheels" --no-deps --target "$packages" $lacking || true
    "$python" -m pip install --quiet --no-index --find-links "$wheels" --target "$packages" pydantic pytest 2>/dev/null || true  # with what they need
    lacking=$(missing $needed)
fi
[ -z "$lacking" ] || { echo "error: missing for $python: $lacking. Put their wheels into a folder (pip download), and say --wheels FOLDER" >&2; exit 1; }
"$python" - <<'PY'
import sys, torch
version = tuple(int(part) for part in torch.__version__.split('+')[0].split('.')[:2])
if version < (2, 11) or sys.version_info < (3, 11): sys.exit(f'error: torch 2.11 and Python 3.11 are needed, here are {torch.__version__} and {sys.version.split()[0]}')
PY
exec "$python" -m srl_pose.benchmarks.gpu --out "$out" ${rest[@]+"${rest[@]}"}

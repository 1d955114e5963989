"""What an operator in C or C++ costs: seconds of a core to build it at first use, microseconds to call it.

    python scripts/native_cost.py    # needs cc, g++ and ninja; about a minute on a quiet machine

An operator that allocates its result and returns it, built in three ways: torch's `load_inline`, torch's stable C++ headers,
and a Python function registered with `torch.library`, as the C of the spectral block is. For the last, the build is that of the block.
"""
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from srl_pose.blocks.cpu.native import FLAGS
from srl_pose.blocks.cpu.spectral_native import SOURCE
from srl_pose.timing import take_turns

INLINE = '''
#include <torch/library.h>
#include <ATen/ATen.h>
at::Tensor f(const at::Tensor &x) { return at::empty_like(x); }
TORCH_LIBRARY(cost_inline, m) { m.def("f(Tensor x) -> Tensor"); }
TORCH_LIBRARY_IMPL(cost_inline, CPU, m) { m.impl("f", f); }
'''
STABLE = '''
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
using torch::stable::Tensor;
Tensor f(const Tensor &x) { return torch::stable::empty_like(x); }
STABLE_TORCH_LIBRARY(cost_stable, m) { m.def("f(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(cost_stable, CPU, m) { m.impl("f", TORCH_BOX(&f)); }
'''
LOAD_INLINE = '''
import sys
from torch.utils.cpp_extension import load_inline
load_inline('cost_inline', sys.stdin.read(), is_python_module=False, build_directory=sys.argv[1])
'''


def build(command: list[str], source: str = '') -> float:
    "Seconds of processor time that a command and its children take."
    before = os.times()
    subprocess.run(command, input=source.encode(), check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def call(f: Callable, x: torch.Tensor, n: int = 10_000) -> float:
    "Seconds of one call."
    start = time.perf_counter()
    for _ in range(n): f(x)
    return (time.perf_counter() - start) / n


def main() -> None:
    include = Path(torch.__file__).parent / 'include'
    with tempfile.TemporaryDirectory() as folder:
        bare = build([sys.executable, '-c', 'from torch.utils.cpp_extension import load_inline'])
        stable = f'{folder}/stable.so'
        seconds = {
            'load_inline': build([sys.executable, '-c', LOAD_INLINE, folder], INLINE) - bare,
            'stable': build(['g++', '-O3', '-march=native', '-std=c++20', '-fPIC', '-shared', f'-I{include}', f'-I{include}/torch/csrc/api/include',
                             '-x', 'c++', '-', '-o', stable, f'-L{include.parent}/lib', '-ltorch_cpu'], STABLE),
            'C': build(['cc', *FLAGS, '-x', 'c', '-', '-o', f'{folder}/block.so'], SOURCE),
        }
        for library in (f'{folder}/cost_inline.so', stable): torch.ops.load_library(library)
        library = torch.library.Library('cost_python', 'DEF')
        library.define('f(Tensor x) -> Tensor')
        library.impl('f', torch.empty_like, 'CPU')
        operators = {'load_inline': torch.ops.cost_inline.f, 'stable': torch.ops.cost_stable.f, 'C': torch.ops.cost_python.f}
        turns = take_turns({name: lambda f=f: call(f, torch.zeros(64)) for name, f in operators.items()}, 7)
    for name in seconds: print(f'{name:12} build {seconds[name]:5.1f} s   call {1e6 * min(turns[name]):4.1f} µs')


if __name__ == '__main__':
    main()

"""One pass of each block in this checkout and in another one, in turns: what a change costs or gains.

    git worktree add --detach ../before <commit>
    python scripts/compare_builds.py ../before --out results/benchmark/cpu-builds    # some minutes, on a quiet machine

Two processes hold the same blocks, one of each build, and are started several times. They run one after the other, never at once, in an order that changes. A block that the other
build does not have stands beside the block that it is an option of. What a process has allocated before matters, as glibc then gives memory back to the system
or keeps it; here it always keeps it, as it does in a process that trains a large network. Ratios are medians over the rounds: of the new to the old, and of the new to the new `fft`.
"""
import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from srl_pose.benchmarks.blocks import read_sizes, write_benchmark
from srl_pose.timing import median_ratio, take_turns

WORKER = """
import sys, time, torch
from srl_pose.blocks.spectral import SpectralBlock
from srl_pose.blocks.transforms import CosineBlock, OrthogonalBlock
from torch.nn.init import constant_

def make(name, h, w):
    torch.manual_seed(0)
    if name == 'lo': return OrthogonalBlock(256, size=(h, w), alpha=True)
    if name == 'dct': return CosineBlock(256)
    options = {'fft, upper': dict(edges='upper'), 'fft, ortho': dict(norm='ortho')}.get(name, {})
    try: return SpectralBlock(256, **options)
    except TypeError: return SpectralBlock(256)  # of before there were options

def trial(name, h, w, layout, direction):
    block = make(name, h, w)
    constant_(block.alpha, 0.3)
    x = torch.randn(2, 256, h, w).contiguous(memory_format=getattr(torch, layout))
    if direction == 'forward': block.eval()
    else: x.requires_grad_()
    def run():
        x.grad = None
        block.zero_grad()
        start = time.perf_counter()
        with torch.set_grad_enabled(x.requires_grad): y = block(x)
        if x.requires_grad: y.backward(torch.ones_like(y))
        return time.perf_counter() - start
    return run

made = {}
for line in sys.stdin:
    if line not in made: made[line] = trial(*eval(line))
    time.sleep(0.05)  # threads of the other process have gone to sleep
    print(made[line](), flush=True)
"""
KEEP = dict(MALLOC_MMAP_THRESHOLD_=str(2 ** 30), MALLOC_TRIM_THRESHOLD_=str(2 ** 34))  # of glibc
NAMES = 'fft', 'fft, upper', 'fft, ortho', 'lo', 'dct'


def start(checkout: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, '-c', WORKER], cwd=checkout, env={**os.environ, **KEEP, 'PYTHONPATH': str(checkout)},
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process: subprocess.Popen, key: tuple) -> float:
    "Seconds of one pass."
    process.stdin.write(f'{key}\n')
    process.stdin.flush()
    return float(process.stdout.readline() or sys.exit('a process ended: see its message above'))


def summary(name: str, seconds: dict, setting: dict) -> dict:
    "A row of builds.csv."
    old, new = seconds['old', name], seconds['new', name]
    return dict(block=name, **setting, old_ms=1e3 * statistics.median(old), new_ms=1e3 * statistics.median(new), new_to_old=median_ratio(new, old),
                old_to_fft=median_ratio(old, seconds['old', 'fft']), new_to_fft=median_ratio(new, seconds['new', 'fft']))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('other', type=Path, help='folder of the other checkout')
    parser.add_argument('--out', type=Path, required=True, help='folder for builds.csv and machine.json')
    parser.add_argument('--sizes', type=read_sizes, default=[(64, 48), (96, 72)], metavar='HxW,...')
    parser.add_argument('--blocks', default=';'.join(NAMES), help=f'some of {"; ".join(NAMES)}, with semicolons between')
    parser.add_argument('--directions', default='forward,forward+backward')
    parser.add_argument('--starts', type=int, default=5, help='of both processes: memory lies better in some than in others')
    parser.add_argument('--rounds', type=int, default=7, help='of each start')
    options = parser.parse_args()
    names, checkouts = [name.strip() for name in options.blocks.split(';')], dict(old=options.other.resolve(), new=Path(__file__).resolve().parents[1])
    commits = {name: subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=path, capture_output=True, text=True, check=True).stdout.strip()
               for name, path in checkouts.items()}
    rows = []
    for direction in options.directions.split(','):
        for h, w in options.sizes:
            for layout in ('contiguous_format', 'channels_last'):
                seconds = {(build, name): [] for name in names for build in checkouts}
                for number in range(options.starts):
                    processes = {name: start(path) for name, path in checkouts.items()}
                    trials = {(build, name): lambda build=build, name=name: ask(processes[build], (name, h, w, layout, direction))
                              for name in names for build in sorted(checkouts, reverse=number % 2 == 1)}  # the second of two may find a thread of the first awake
                    for key, values in take_turns(trials, options.rounds).items(): seconds[key] += values
                    for process in processes.values(): process.communicate()
                rows += [summary(name, seconds, dict(height=h, width=w, layout=layout.removesuffix('_format'), direction=direction, **commits)) for name in names]
    write_benchmark(options.out, dict(builds=rows), program='python scripts/compare_builds.py')


if __name__ == '__main__':
    main()

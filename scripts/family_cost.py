"""How near the spectral family is to what its arithmetic allows on this processor: multiply-adds, measured products, floor, time.

    python scripts/family_cost.py                    # 64x48 and 96x72, 256 channels, one and two threads; half a minute on a quiet machine
    python scripts/family_cost.py --sizes 16x12 --channels 128 --rounds 3

Per position and channel, forward and backward together, m channels in a group of the convolution: the convolution has 3m multiply-adds.
`lo` transforms four times, H + W each, and sums the gradients of its two matrices, 2 (H + W). `dct` transforms four times, by FFTs that count nothing here
or, along sides with large prime factors, with folded matrices.
The floor is their number over the rate at which a core runs the small product from the fastest cache, times the threads.
The Fourier block has no floor here.
"""
import argparse
import time
from collections.abc import Callable

import torch
from srl_pose.blocks.cpu.native import native_library
from srl_pose.blocks.cpu.native_fft import run_native
from srl_pose.blocks.cpu.native_products import FOURIER, ONE_SIDE, cheapest, folded
from srl_pose.blocks.spectral import SpectralBlock
from srl_pose.blocks.transforms import CosineBlock, OrthogonalBlock
from srl_pose.pose.heatmap import read_size
from srl_pose.timing import median_ratio, take_turns


def multiply_adds(name: str, h: int, w: int, m: int) -> float:
    "Of `lo` or `dct`, per position and channel."
    if name == 'lo': return 3 * m + 6 * (h + w)
    return 3 * m + 4 * sum(len(folded(torch.empty(n, n), cheapest(n))) / n for n in (h, w) if cheapest(n) != FOURIER)

RATE = '''
void rate(const problem *p) { for (long i = 0; i < 2000; i++) columns(96, 1, 0, 128, p->left, 128, 1, p->right, 16, p->out, 16, p->bias); }
'''

def product_rate() -> float:
    "Multiply-adds per second of one core."
    library, x = native_library(ONE_SIDE + RATE), torch.empty(1, 16, 1, 1)
    if library is None: raise SystemExit('no C compiler: there is no native form to measure')
    fields = dict(left=torch.rand(96, 128), right=torch.rand(128, 16), bias=torch.zeros(16), out=torch.empty(96, 16))
    return 2000 * 96 * 128 * 16 / min(seconds(lambda: run_native(library.rate, x, 1, **fields)) for _ in range(10))

def seconds(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start

def step(block: torch.nn.Module, x: torch.Tensor) -> None:
    x.grad = None
    block.zero_grad()
    y = block(x)
    y.backward(torch.ones_like(y))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sizes', nargs='+', default=['64x48', '96x72'], metavar='HxW')
    parser.add_argument('--channels', type=int, default=256)
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=15)
    options = parser.parse_args()
    before, rate = torch.get_num_threads(), product_rate()
    print(f'a core runs the small product at {2e-9 * rate:.0f} GFLOP/s')
    print(f'{"threads":7} {"size":7} {"layout":14} {"block":5} {"multiply-adds":>13} {"floor ms":>9} {"ms":>7} {"of floor":>8} {"of fft":>7} {"floor of fft":>12}')
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for h, w in (read_size(size)[::-1] for size in options.sizes):
            for layout in (torch.contiguous_format, torch.channels_last):
                blocks = {'fft': SpectralBlock(options.channels), 'lo': OrthogonalBlock(options.channels, size=(h, w)), 'dct': CosineBlock(options.channels)}
                x = torch.randn(options.batch, options.channels, h, w).contiguous(memory_format=layout).requires_grad_()
                trials = {name: lambda b=block: seconds(lambda: step(b, x)) for name, block in blocks.items()}
                times = take_turns(trials, options.rounds)
                fft = sorted(times['fft'])[len(times['fft']) // 2]
                print(f'{threads:7} {f"{h}x{w}":7} {str(layout)[6:].removesuffix("_format"):14} {"fft":5} {"":13} {"":9} {1e3 * fft:7.1f}')
                for name in ('lo', 'dct'):
                    n = multiply_adds(name, h, w, options.channels // 2)
                    floor = n * x.numel() / (rate * threads)
                    took = sorted(times[name])[len(times[name]) // 2]
                    print(f'{"":30} {name:5} {n:13.0f} {1e3 * floor:9.1f} {1e3 * took:7.1f} {took / floor:8.2f} '
                          f'{median_ratio(times[name], times["fft"]):7.2f} {floor / fft:12.2f}', flush=True)
    torch.set_num_threads(before)


if __name__ == '__main__':
    main()

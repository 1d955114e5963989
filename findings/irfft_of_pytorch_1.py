"""One version of PyTorch on one of MKL's code paths: values and gradient of its inverse real transform in two dimensions."""
import os
import sys

import numpy as np
import torch
from inverses import LARGE, SMALL, average, failed, report

torch.set_num_threads(1)
version = torch.__version__
chosen = os.environ.get('MKL_DEBUG_CPU_TYPE')
path = 'type ' + chosen if chosen else os.environ.get('PROCESSOR', '')
generic = path in ('type 4', 'as MKL chose on AuthenticAMD')


def pair(z): return torch.from_numpy(np.stack([z.real, z.imag], -1))


if hasattr(torch, 'irfft'):
    inverse = lambda z, size: torch.irfft(pair(z), 2, onesided=True, signal_sizes=size).numpy()
    known = generic or path in ('type 5', 'type 7')
    report('torch', version, 'torch.irfft', path, inverse, SMALL, 'upper' if known else None)
    report('torch', version, 'torch.irfft', path, inverse, LARGE, ('upper' if generic else 'average') if known else None)
    for H, W in ((8, 6), (32, 24)):  # the gradient beside the derivatives, entry by entry
        rs = np.random.RandomState(H)
        z = torch.from_numpy(rs.standard_normal((H, W // 2 + 1, 2))).requires_grad_()
        g = torch.from_numpy(rs.standard_normal((H, W)))
        (torch.irfft(z, 2, onesided=True, signal_sizes=(H, W)) * g).sum().backward()
        units = torch.eye(z.numel(), dtype=z.dtype).view((-1,) + z.shape)
        own = (torch.irfft(units, 2, onesided=True, signal_sizes=(H, W)) * g).sum((1, 2)).view_as(z)
        units = units.numpy()
        of_average = (average(units[..., 0] + 1j * units[..., 1], (H, W)) * g.numpy()).sum((1, 2)).reshape(z.shape)
        largest = abs(of_average).max()
        wrong, right = abs(z.grad - own).max().item() / largest, abs(z.grad.numpy() - of_average).max() / largest
        try:
            belongs = torch.autograd.gradcheck(lambda z: torch.irfft(z, 2, onesided=True, signal_sizes=(H, W)), (z,))
        except RuntimeError:
            belongs = False
        print('torch,%s,gradient of torch.irfft,%s,%dx%d,average: gradcheck %s,%.2g,%.2g' % (
            version, path, H, W, 'passes' if belongs else 'fails: the values are another function', right, wrong), flush=True)
        want = None if not known else not generic and (H, W) == (32, 24)
        if right > 1e-12 or want not in (None, belongs): failed.append('gradient of torch %s, %s, %dx%d' % (version, path, H, W))
if not version.startswith(('1.1.', '1.4.')):
    import torch.fft
    report('torch', version, 'torch.fft.irfftn', path, lambda z, size: torch.fft.irfftn(torch.from_numpy(z), s=size, dim=(-2, -1)).numpy(), SMALL + LARGE, 'average')
print(*(line + '\n' for line in failed), sep='', end='', file=sys.stderr, flush=True)
os._exit(bool(failed))  # torch 1.8.0 may crash on the way out

"""What counters of FLOPs say of the three parts of a pose network that they disagree on, beside the arithmetic. As CSV; status 1 where it is not what was expected."""
import contextlib
import io
import logging
import math
import sys
import warnings
from importlib.metadata import version

import torch
from torch import nn

C, H, W = 16, 24, 16


class Spectral(nn.Module):
    "A 1x1 convolution of a half spectrum: C*H*W*log2(H*W) multiply-adds for each of the two transforms, by the usual count of an FFT."
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2 * C, 2 * C, 1, bias=False)

    def forward(self, x):
        z = torch.view_as_real(torch.fft.rfft2(x)).permute(0, 1, 4, 2, 3).flatten(1, 2)
        z = torch.view_as_complex(self.conv(z).unflatten(1, (C, 2)).permute(0, 1, 3, 4, 2).contiguous())
        return torch.fft.irfft2(z, s=x.shape[-2:])


class Attention(nn.Module):
    "Every position compared with every other: two matrix products of (H*W)**2 * C multiply-adds."
    def forward(self, x):
        x = x.flatten(2)
        return torch.matmul(torch.matmul(x.mT, x).softmax(-1), x.mT)


def of_torch(model, x):
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter: model(x)
    return counter.get_total_flops() / 2


def of_fvcore(model, x):
    from fvcore.nn import FlopCountAnalysis
    return FlopCountAnalysis(model, x).total()


def of_mmengine(model, x):
    from mmengine.analysis import FlopAnalyzer
    return FlopAnalyzer(model, x).total()


def of_thop(model, x):
    from thop import profile
    return profile(model, (x,), verbose=False)[0]


def of_ptflops(backend):
    def count(model, x):
        from ptflops import get_model_complexity_info
        return get_model_complexity_info(model, tuple(x.shape[1:]), as_strings=False, print_per_layer_stat=False, backend=backend)[0]
    return count


def of_torchinfo(model, x):
    from torchinfo import summary
    return summary(model, input_data=x, verbose=0).total_mult_adds


torch.manual_seed(0)
positions, half = H * W, H * (W // 2 + 1)
transform = C * positions * math.log2(positions)
PARTS = {  # model, and what happens by hand
    'transposed convolution': (nn.ConvTranspose2d(C, C, 4, 2, 1, bias=False), 16 * C * C * positions),
    'convolution of a half spectrum': (Spectral(), (2 * C) ** 2 * half + 2 * transform),
    'attention': (Attention(), 2 * positions ** 2 * C)}
COUNTERS = {  # what each is expected to say of the three, as part of what happens
    ('torch', 'FlopCounterMode'): (of_torch, ('all', 'no transforms', 'all')),
    ('fvcore', 'FlopCountAnalysis'): (of_fvcore, ('all', 'no transforms', 'all')),
    ('mmengine-lite', 'FlopAnalyzer'): (of_mmengine, ('all', 'no transforms', 'all')),
    ('thop', 'profile'): (of_thop, ('4 times', 'no transforms', 'nothing')),
    ('ptflops', 'pytorch'): (of_ptflops('pytorch'), ('all', 'no transforms', 'all')),
    ('ptflops', 'aten'): (of_ptflops('aten'), ('all', 'no transforms', 'all')),
    ('torchinfo', 'summary'): (of_torchinfo, ('4 times', 'no transforms', 'nothing'))}

failed = False
print('counter,version,function,part,multiply_adds,counted,says')
logging.disable(logging.WARNING)
warnings.simplefilter('ignore')
for (name, function), (count, expected) in COUNTERS.items():
    for (part, (model, truth)), wanted in zip(PARTS.items(), expected):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = count(model, torch.randn(1, C, H, W))
        close = lambda value: abs(found - value) <= .02 * truth
        says = ('all' if close(truth) else 'nothing' if close(0) else '4 times' if close(4 * truth) else
                'no transforms' if part.endswith('spectrum') and close(truth - 2 * transform) else 'other')
        print(f'{name},{version(name)},{function},{part},{round(truth)},{round(found)},{says}')
        if says != wanted:
            failed = True
            print(f'{name} {function}, {part}: {says}, not {wanted}', file=sys.stderr)
sys.exit(failed)

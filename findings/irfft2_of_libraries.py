"""One library's inverse real transform in two dimensions; the library is named by the argument."""
import ctypes
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from inverses import LARGE, SMALL, failed, report


def mkl(z, size):
    "MKL's own transform of both dimensions, called as torch.irfft of PyTorch 1 calls it."
    H, W = size
    single, z = z.dtype == np.complex64, np.ascontiguousarray(z.reshape(-1, H, W // 2 + 1))
    out, long, plan = np.empty((len(z), H, W), z.real.dtype), ctypes.c_long, ctypes.c_void_p()
    checked = lambda status: status and sys.exit('MKL: status %d' % status)
    checked((library.DftiCreateDescriptor_s_md if single else library.DftiCreateDescriptor_d_md)(ctypes.byref(plan), 33, long(2), (long * 2)(H, W)))  # DFTI_REAL
    for key, value in ((11, 44), (10, 39), (12, (long * 3)(0, W // 2 + 1, 1)), (13, (long * 3)(0, W, 1))):  # not in place, complex storage, strides
        checked(library.DftiSetValue(plan, key, value))
    checked(library.DftiCommitDescriptor(plan))
    for spectrum, real in zip(z, out): checked(library.DftiComputeBackward(plan, spectrum.ctypes.data_as(ctypes.c_void_p), real.ctypes.data_as(ctypes.c_void_p)))
    library.DftiFreeDescriptor(ctypes.byref(plan))
    return out.reshape(2, 3, H, W) / (H * W)


def fftw(z, size):
    "FFTW's plan for both dimensions."
    import pyfftw
    into = pyfftw.empty_aligned((2, 3, *size), z.real.dtype)
    out_of = pyfftw.empty_aligned(z.shape, z.dtype)
    plan = pyfftw.FFTW(out_of, into, axes=(-2, -1), direction='FFTW_BACKWARD', flags=('FFTW_ESTIMATE', 'FFTW_DESTROY_INPUT'))
    out_of[:] = z
    plan.execute()
    return into / (size[0] * size[1])


name = sys.argv[1]
both = SMALL + LARGE
if name == 'mkl':
    library = ctypes.CDLL(str(next(Path(sys.prefix, 'lib').glob('libmkl_rt.so*'))))
    for sizes in (SMALL, LARGE): report('mkl', version('mkl'), 'DftiComputeBackward', sys.argv[2], mkl, sizes, sys.argv[3 + (sizes is LARGE)] if len(sys.argv) > 3 else None)
elif name == 'numpy': report('numpy', np.__version__, 'numpy.fft.irfft2', '', lambda z, size: np.fft.irfft2(z, s=size), both, 'average')
elif name == 'scipy':
    import scipy.fft
    report('scipy', version('scipy'), 'scipy.fft.irfft2', '', lambda z, size: scipy.fft.irfft2(z, s=size), both, 'average')
elif name == 'ducc0':
    import ducc0
    report('ducc0', version('ducc0'), 'ducc0.fft.c2r', '', lambda z, size: ducc0.fft.c2r(z, axes=(-2, -1), lastsize=size[1], forward=False, inorm=2), both, 'average')
elif name == 'fftw': report('FFTW', '3.3.5 (pyfftw %s)' % version('pyfftw'), 'plan of both dimensions', '', fftw, both, 'average')
elif name == 'mkl_fft':
    import mkl_fft
    report('mkl_fft', version('mkl-fft'), 'mkl_fft.irfftn', '', lambda z, size: mkl_fft.irfftn(z, s=size, axes=(-2, -1)), both, 'average')
elif name == 'jax':
    import jax
    jax.config.update('jax_enable_x64', True)
    report('jax', version('jax'), 'jax.numpy.fft.irfft2', '', lambda z, size: jax.numpy.fft.irfft2(z, s=size), both, 'average')
print(*(line + '\n' for line in failed), sep='', end='', file=sys.stderr, flush=True)
sys.exit(bool(failed))

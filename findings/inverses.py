"""What an inverse real transform may make of a half spectrum that is not Hermitian, in NumPy alone; and which of them a function computes."""
import numpy as np


def average(z, size):
    "An entry of a self-mirrored column and the conjugate of its mirror image count half each."
    return np.fft.irfft(np.fft.ifft(z, axis=-2), n=size[1], axis=-1)


def upper(z, size):
    "Rows 0 ... H/2 of these columns count; the others are overwritten by the conjugates of their mirror images."
    H, W = size
    z = z.copy()
    for column in [0] + [W // 2] * (W % 2 == 0):
        z[..., H // 2 + 1:, column] = z[..., (H - 1) // 2:0:-1, column].conj()
    return average(z, size)


def spectrum(size, dtype=np.complex128):
    "Random half spectra (2, 3, H, W//2+1)."
    draw = np.random.RandomState(1000 * size[0] + size[1]).standard_normal
    shape = (2, 3, size[0], size[1] // 2 + 1)
    return (draw(shape) + 1j * draw(shape)).astype(dtype)


def differences(function, size, dtype=np.complex128):
    "Largest difference of function(z, size) from `average` and from `upper`, relative to the largest value."
    z = spectrum(size, dtype)
    y, largest = np.asarray(function(z.copy(), size)), abs(average(z, size)).max()
    return [float(abs(y - inverse(z, size)).max() / largest) for inverse in (average, upper)]


failed = []


def report(library, version, function_name, path, function, sizes, expected=None, dtypes=(np.complex64, np.complex128)):
    "Print a line of CSV; remember where it is not what was expected."
    from_average, from_upper = (max(d) for d in zip(*(differences(function, size, dtype) for size in sizes for dtype in dtypes)))
    found = 'average' if from_average < 1e-5 else 'upper' if from_upper < 1e-5 else 'other'
    print('%s,%s,%s,%s,%s,%s,%.2g,%.2g' % (library, version, function_name, path, ' '.join('%dx%d' % s for s in sizes), found, from_average, from_upper), flush=True)
    if expected not in (None, found): failed.append('%s %s %s, %s: %s, not %s' % (library, version, function_name, path, found, expected))


HEADER = 'library,version,function,path,sizes,reads,from_average,from_upper'
SMALL, LARGE = [(8, 6), (9, 10), (7, 5), (16, 12), (12, 48), (48, 9)], [(24, 18), (32, 24), (64, 48), (96, 72)]  # on the border: a side below 16, or an odd width

"""The block in C: how it is built, kept and refused, and that it reads and writes nothing but its own memory."""
import copy
import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from srl_pose.blocks.base import TransformBlock
from srl_pose.blocks.cpu import native, spectral_native
from srl_pose.blocks.cpu.matrix_native import MATRIX_SOURCE, matrix_runs_native
from srl_pose.blocks.cpu.native import FLAGS, CompileError, NoCompiler, compiler_command, native_library
from srl_pose.blocks.cpu.spectral_native import SOURCE, runs_native
from srl_pose.blocks.spectral import SpectralBlock
from srl_pose.blocks.transforms import CosineBlock, OrthogonalBlock
from srl_pose.testing import naive_fft_block, randomize

ROOT = Path(__file__).resolve().parents[1]
CC = shutil.which('cc')
needs_cc = pytest.mark.skipif(CC is None, reason='no C compiler')  # a compiler that refuses the source is no reason
build_anew = native_library.__wrapped__  # without the memory of this process


@needs_cc
@pytest.mark.parametrize('more', [(), ('-U__AVX512F__',)], ids=['long registers', 'short registers'])
@pytest.mark.parametrize('source', [SOURCE, MATRIX_SOURCE], ids=['spectral', 'matrix'])
def test_the_source_compiles_without_warnings(source, more, tmp_path):
    assert build_anew(source, cache=tmp_path, flags=(*FLAGS, '-Wall', '-Wextra', '-Werror', *more)) is not None
    assert runs_native(torch.zeros(2, 128, 8, 6), 8) and matrix_runs_native(torch.zeros(2, 32, 8, 6), 2)


@needs_cc
def test_a_refused_source_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(CompileError, match='(?s)refuses the C source .*SRL_POSE_NATIVE=0.*error: '):
        build_anew(SOURCE + '\nvoid half(', cache=tmp_path)
    with pytest.raises(CompileError, match='unused'):
        build_anew(SOURCE + '\nstatic int half(void) { return 1; }', cache=tmp_path, flags=(*FLAGS, '-Wall', '-Werror'))
    monkeypatch.setattr(spectral_native, 'SOURCE', SOURCE + 'no C')
    with pytest.raises(CompileError):  # not a slow block without a word
        SpectralBlock(128)(torch.zeros(2, 128, 8, 6))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('compiler', ['no-such-compiler', 'false', 'true', "unbalanced '"])
def test_no_compiler_is_no_error(compiler, tmp_path, caplog):
    assert build_anew(SOURCE, compiler, tmp_path) is None
    assert [r.message for r in caplog.records if 'torch operations are used instead' in r.message] == [r.message for r in caplog.records] != []


SANITIZED = """
import ctypes, sys, torch
from pathlib import Path
from srl_pose.blocks.cpu import native_fft, spectral_native
from srl_pose.blocks.cpu.native import native_library
flags = '-O0 -g -march=native -std=gnu11 -fPIC -shared -Wall -Wextra -Werror -fsanitize=address,undefined -fno-sanitize-recover=all'
library = native_library(spectral_native.SOURCE, cache=Path(sys.argv[1]), flags=tuple(flags.split()))
spectral_native.block_library = lambda: library
torch.set_num_threads(2)
for B, C, H, W in [(3, 16, 9, 6), (2, 32, 7, 13), (2, 64, 1, 10), (1, 16, 11, 1), (2, 16, 14, 31)]:
    groups = C // 16
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(B, C, H, W).contiguous(memory_format=layout)
        weight, vector, alpha = torch.randn(2 * C, 32, 1, 1), torch.randn(2 * C), torch.ones(1)
        for edges in ('upper', 'average'):
            out, *kept = spectral_native.native_forward(x, weight, vector, vector, vector, alpha, 1e-5, groups, edges)
            for needs_x in (True, False): spectral_native.native_backward(x, weight, alpha, *kept, 1e-5, needs_x, edges)
            inferred = spectral_native.native_inference(x, weight, vector, *kept[-2:], alpha, groups, edges)
            torch.testing.assert_close(inferred, out, rtol=1e-4, atol=1e-4)
from srl_pose.blocks.cpu import matrix_native
from srl_pose.blocks.cpu.native_products import FOURIER, folded, folds_of
of_matrices = native_library(matrix_native.MATRIX_SOURCE, cache=Path(sys.argv[1]), flags=tuple(flags.split()))
matrix_native.matrix_library = lambda: of_matrices
for B, C, H, W in [(3, 32, 9, 6), (2, 64, 1, 10), (1, 32, 37, 1), (1, 32, 25, 16), (2, 32, 28, 31), (2, 32, 27, 31)]:
    for layout in (torch.contiguous_format, torch.channels_last):
        m = torch.randn(B, C, H, W).contiguous(memory_format=layout)
        weight, vector, one = torch.randn(C, C // 2, 1, 1), torch.randn(C), torch.ones(1)
        for folds in ([0, 0], [folds_of(H), folds_of(W)], [FOURIER, 0], [0, FOURIER], [FOURIER] * 2):
            matrices = [folded(torch.randn(n, n), f) / n for n, f in zip((H, W), folds)]
            out, *rest = matrix_native.matrix_forward(m, weight, vector, vector, vector, one, *matrices, folds, 1e-5, 2)
            for needs in ((True, True), (True, False), (False, True), (False, False)):
                matrix_native.matrix_backward(m, weight, one, *matrices, folds, *rest, 1e-5, *needs)
            inferred = matrix_native.matrix_inference(m, weight, vector, *rest[-2:], one, *matrices, folds, 2)
            torch.testing.assert_close(inferred, out, rtol=1e-4, atol=1e-4)
if sys.argv[2:] == ['matrix']:  # does it find anything? y is one number too short, and an odd height has no padding
    y = torch.empty(rest[1].numel() - 1)
    matrix_native.run_native(of_matrices.srl_matrix_forward, m, 2, bias=vector, gamma=vector, beta=vector, alpha=one, eps=1e-5,
                             partial=torch.empty(2 * 31, 2, 32), out=torch.empty_like(m), z=rest[0], y=y, mean=rest[2], var=rest[3], slope=rest[4],
                             shift=rest[5], **matrix_native._fields(m, 2, weight.reshape(2, 16, 16), *matrices, folds))
elif sys.argv[2:]:  # z is one number too short
    short, y = kept[0].flatten()[:-1].clone(), kept[1]
    native_fft.run_native(library.srl_rows, x, groups, z=short)
print('nothing found')
"""


@pytest.fixture
def sanitizer() -> dict[str, str]:
    "Environment of a process that loads C built with an address sanitizer, or skip."
    # with the runtime of C++, which torch's errors need
    files = [subprocess.run([CC, f'-print-file-name={name}'], capture_output=True, text=True).stdout.strip() for name in ('libasan.so', 'libstdc++.so.6')]
    if not all(Path(file).is_absolute() for file in files):
        pytest.skip('the compiler has no address sanitizer')
    return {**os.environ, 'LD_PRELOAD': ' '.join(files), 'ASAN_OPTIONS': 'detect_leaks=0', 'UBSAN_OPTIONS': 'print_stacktrace=1', 'OMP_NUM_THREADS': '2'}


@needs_cc
def test_sanitizers_find_nothing(tmp_path, sanitizer):
    for more in ([], ['spectral'], ['matrix']):
        done = subprocess.run([sys.executable, '-c', SANITIZED, tmp_path, *more], capture_output=True, text=True, env=sanitizer, timeout=300)
        text = done.stdout + done.stderr
        assert (done.returncode == 0, 'nothing found' in text, 'ERROR: AddressSanitizer' in text) == (not more, not more, bool(more)), text[-3000:]
        assert 'runtime error' not in text


@needs_cc
@pytest.mark.parametrize('name', ['03_native_fft', '04_spectral_native', '05_native_products', '06_matrix_native'])
def test_sanitizers_find_nothing_in_the_tests_of_a_notebook(name, tmp_path, sanitizer):
    """They hand C memory of their own."""
    cells = json.loads((ROOT / f'nbs/9_cpu/{name}.ipynb').read_text())['cells']
    script = tmp_path / 'notebook.py'
    script.write_text('\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code'))
    environment = {**sanitizer, 'CC': f'{CC} -g -fsanitize=address', 'XDG_CACHE_HOME': str(tmp_path), 'MPLBACKEND': 'agg'}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=300, cwd=ROOT / 'nbs/9_cpu')
    assert done.returncode == 0, done.stderr[-3000:]
    libraries = [file.read_bytes() for file in tmp_path.rglob('*.so')]
    assert libraries and all(b'__asan_' in library for library in libraries)


ONE_STEP = """
import sys, torch
from srl_pose.blocks.spectral import SpectralBlock
from srl_pose.blocks.cpu.spectral_native import runs_native
torch.manual_seed(0)
block, x = SpectralBlock(128), torch.randn(2, 128, 12, 9, requires_grad=True)
torch.nn.init.ones_(block.alpha)
for _ in range(2): y = block(x)
y.square().sum().backward()
torch.save([y.detach(), x.grad, block.conv_layer.weight.grad, block.bn.running_var], sys.argv[1])
print(runs_native(x, 8))
"""


def one_step(out, cache, **environment):
    """Start a fresh process that saves outputs and gradients and says whether they are native; warnings are errors."""
    return subprocess.Popen([sys.executable, '-W', 'error', '-c', ONE_STEP, out], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, 'XDG_CACHE_HOME': str(cache), **environment})


@needs_cc
def test_processes_compile_at_once_and_others_do_without(tmp_path):
    (tmp_path / 'file').touch()
    environments = {'first': {}, 'second': {}, 'switched off': {'SRL_POSE_NATIVE': '0'}, 'broken': {'CC': 'false'},
                    'missing': {'PATH': str(tmp_path)}, 'nowhere': {'XDG_CACHE_HOME': str(tmp_path / 'file')},
                    'no TMPDIR': {'TMPDIR': str(tmp_path / 'file')}}
    started = {name: one_step(tmp_path / name, tmp_path / 'cache', **more) for name, more in environments.items()}
    said = {name: process.communicate(timeout=300) for name, process in started.items()}
    without = {'switched off', 'broken', 'missing'}
    assert {name: out.strip() for name, (out, _) in said.items()} == {name: str(name not in without) for name in environments}
    for name, (_, log) in said.items():  # which form runs is said once, if it is not the fast one by accident
        assert log.count('torch operations are used instead') == (name in ('broken', 'missing')), (name, log)
    kept = list((tmp_path / 'cache' / 'srl_pose' / 'native').iterdir())
    assert [path.suffix for path in kept] == ['.so']
    results = {name: torch.load(tmp_path / name) for name in environments}
    for name, result in results.items():
        for ours, first in zip(result, results['first'], strict=True):
            torch.testing.assert_close(ours, first, rtol=0, atol=1e-5 * first.abs().max().item() if name in without else 0)

    kept[0].write_bytes(kept[0].read_bytes()[:20_000])  # cut short: mapped into memory, it would kill the process
    process = one_step(tmp_path / 'again', tmp_path / 'cache')
    assert process.communicate(timeout=300)[0].strip() == 'True' and process.returncode == 0
    assert kept[0].stat().st_size > 20_000


@needs_cc
def test_a_folder_in_which_nothing_may_be_executed(tmp_path, monkeypatch, caplog):
    """Everything is built in the cache; where it cannot be loaded from there, in TMPDIR; without either, torch operations."""
    number, load, places = 'int number(void) { return 7; }', ctypes.CDLL, []

    def forbidden(path, *more):
        places.append(Path(path).parent.parent)
        if any(str(path).startswith(str(folder)) for folder in noexec): raise OSError('failed to map segment from shared object')
        return load(path, *more)

    monkeypatch.setattr(native.ctypes, 'CDLL', forbidden)
    cache, temporary = tmp_path / 'cache', tmp_path / 'tmp'
    temporary.mkdir()
    monkeypatch.setattr(native.tempfile, 'tempdir', str(temporary))
    noexec = [temporary]
    assert build_anew(number, cache=cache).number() == 7 and places == [cache]
    shutil.rmtree(cache)
    noexec, places[:] = [cache], []
    assert build_anew(number, cache=cache).number() == 7 and places == [cache, temporary]
    noexec = [cache, temporary]
    assert build_anew(number, cache=cache) is None and 'cannot be built and loaded' in caplog.text
    assert not list(cache.iterdir()) and not list(temporary.iterdir())


@needs_cc
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    """On a disk that is read-only or full the library is built in TMPDIR, or used without being kept: either way native code runs."""
    number, cache, folder = 'int number(void) { return 8; }', tmp_path / 'cache', native.tempfile.TemporaryDirectory

    def read_only(dir=None):
        if dir == cache: raise OSError(30, 'Read-only file system')
        return folder(dir=dir)

    with monkeypatch.context() as patch:
        patch.setattr(native.tempfile, 'TemporaryDirectory', read_only)
        assert build_anew(number, cache=cache).number() == 8
    def full(number): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as patch:
        patch.setattr(native.os, 'fsync', full)
        assert build_anew(number, cache=cache).number() == 8
    assert not list(cache.iterdir()) and 'is not kept in' in caplog.text and 'No space left' in caplog.text
    assert build_anew(number, cache=cache).number() == 8 and len(list(cache.iterdir())) == 1


@needs_cc
def test_which_form_runs_is_said_once(tmp_path, caplog):
    """To the log: a note where native code runs, a warning where it does not."""
    caplog.set_level('INFO')
    for compiler, words in (None, 'native code: '), ('no-such-compiler', 'torch operations are used instead'):
        caplog.clear()
        for _ in range(3): native.native_library('int number(void) { return 9; }', compiler, tmp_path)
        assert [words in record.message for record in caplog.records] == [True]


def test_a_compiler_without_a_version_is_none():
    with pytest.raises(NoCompiler, match='no C compiler'):
        compiler_command('false')


OPTIONS = [{}, dict(edges='upper', norm='ortho')]
IDS = ['released', 'upper, ortho']


@needs_cc
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('options', OPTIONS, ids=IDS)
def test_native_training_step_of_the_usual_size(layout, options):
    block, x = randomize(SpectralBlock(256, **options), std=0.1), torch.randn(2, 256, 64, 48, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=layout)
    assert runs_native(x, 8)
    results = []
    for b, t, forward in ((copy.deepcopy(block), x.clone(), SpectralBlock.forward), (copy.deepcopy(block).double(), x.double(), naive_fft_block)):
        y = forward(b, t.requires_grad_())
        y.square().sum().backward()
        results.append([y, t.grad, *(p.grad for name, p in b.named_parameters() if name != 'conv_layer.bias'), *b.buffers()])
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).abs().max() <= 3e-6 * exact.abs().max()


@needs_cc
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('options', OPTIONS, ids=IDS)
def test_a_compiled_block_is_the_operator(training, options):
    """`torch.compile` takes the operators as they are: the same numbers, also for another batch."""
    block = randomize(SpectralBlock(128, **options)).train(training)
    compiled = torch.compile(block, backend='aot_eager', fullgraph=True)
    for batch in (2, 3):
        x = torch.randn(batch, 128, 9, 6, generator=torch.Generator().manual_seed(batch), requires_grad=training)
        state, results = copy.deepcopy(block.state_dict()), []
        for forward in (compiled, block):
            block.load_state_dict(state)
            with torch.set_grad_enabled(training):
                y = forward(x)
            gradients = torch.autograd.grad(y.square().sum(), [x, *block.parameters()]) if training else []
            results.append([y, *gradients, *(t.clone() for t in block.buffers())])
        for ours, eager in zip(*results, strict=True):
            assert torch.equal(ours, eager)


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('options', OPTIONS, ids=IDS)
def test_an_exported_block_needs_no_operator_of_ours(strict, options):
    block, x = randomize(SpectralBlock(128, **options)).eval(), torch.randn(2, 128, 9, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        program = torch.export.export(block, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), block(x), rtol=1e-4, atol=1e-4)
    assert 'spectral_inference' not in str(program.graph_module.print_readable(print_output=False))


FAMILY = {'lo': (OrthogonalBlock, {}), 'lo, alpha': (OrthogonalBlock, {'alpha': True}), 'dct': (CosineBlock, {})}


def member(name, channels, size, std):
    """A block that is no identity, with matrices that are orthogonal."""
    torch.manual_seed(0)
    kind, more = FAMILY[name]
    block = kind(channels, size=size, **more)
    for n, p in block.named_parameters():
        if 'source' not in n: torch.nn.init.normal_(p, std=std)
    return block


@needs_cc
@pytest.mark.parametrize('name', FAMILY)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_native_training_step_of_the_family(name, layout):
    """The usual size and number of channels; two steps, so that matrices have moved."""
    block, x = member(name, 256, (64, 48), 0.1), torch.randn(2, 256, 64, 48, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=layout)
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-4)
    block(x).square().mean().backward()
    optimizer.step()
    block.zero_grad()
    results = []
    for b, t, forward in ((copy.deepcopy(block), x.clone(), type(block).forward), (copy.deepcopy(block), x.clone(), TransformBlock.forward),
                          (copy.deepcopy(block).double(), x.double(), TransformBlock.forward)):
        y = forward(b, t.requires_grad_())
        assert ('MatrixTraining' in type(y.grad_fn).__name__) == (not results)
        y.square().sum().backward()
        results.append({'y': y, 'x': t.grad, **{n: p.grad for n, p in b.named_parameters() if n != 'conv_layer.bias'}, **dict(b.named_buffers())})
    native, plain, exact = results
    for key, wanted in exact.items():  # one ReLU that rounding switches is a jump of the gradient, in both; of a matrix's gradient a small part is left
        errors = [(result[key] - wanted).abs().max().item() for result in (native, plain)]
        assert errors[0] <= max(1.1 * errors[1], (1.5e-5 if 'source' in key else 3e-6) * wanted.abs().max().item()), (key, errors)
    block.eval()
    with torch.no_grad():  # two images, one after the other
        wanted = TransformBlock.forward(copy.deepcopy(block).double(), x.double())
        assert (block(x) - wanted).abs().max() <= 3e-6 * wanted.abs().max()


@needs_cc
@pytest.mark.parametrize('name', FAMILY)
def test_the_number_of_threads_changes_no_bit(name):
    """With more than eight of them the groups go through together."""
    block, x = member(name, 64, (12, 9), 0.3), torch.randn(5, 64, 12, 9, generator=torch.Generator().manual_seed(0))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 9):
        torch.set_num_threads(threads)
        twin, t = copy.deepcopy(block), x.clone().requires_grad_()
        y = twin(t)
        y.square().sum().backward()
        with torch.no_grad(): inferred = twin.eval()(x)
        results.append([y, t.grad, inferred, *(p.grad for p in twin.parameters()), *twin.buffers()])
    torch.set_num_threads(before)
    for one, two, nine in zip(*results, strict=True):
        assert torch.equal(one, two) and torch.equal(one, nine)


@needs_cc
@pytest.mark.parametrize('name', FAMILY)
@pytest.mark.parametrize('training', [True, False])
def test_a_compiled_member_is_the_operator(name, training):
    block = member(name, 32, (9, 6), 0.3).train(training)
    compiled = torch.compile(block, backend='aot_eager', fullgraph=True)
    for batch in (2, 3):
        x = torch.randn(batch, 32, 9, 6, generator=torch.Generator().manual_seed(batch), requires_grad=training)
        state, results = copy.deepcopy(block.state_dict()), []
        for forward in (compiled, block):
            block.load_state_dict(state)
            with torch.set_grad_enabled(training): y = forward(x)
            gradients = torch.autograd.grad(y.square().sum(), [x, *block.parameters()]) if training else []
            results.append([y, *gradients, *(t.clone() for t in block.buffers())])
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', FAMILY)
def test_an_exported_member_needs_no_operator_of_ours(name):
    block, x = member(name, 32, (9, 6), 0.3).eval(), torch.randn(2, 32, 9, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        program = torch.export.export(block, (x,), strict=False)
        torch.testing.assert_close(program.module()(x), block(x), rtol=1e-4, atol=1e-4)
    assert 'matrix_inference' not in str(program.graph_module.print_readable(print_output=False))

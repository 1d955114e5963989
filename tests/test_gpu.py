"""The block in Triton: on a GPU where there is one, else in Triton's interpreter on a CPU, in a process of its own."""
import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from srl_pose.blocks.gpu import fast, spectral_gpu
from srl_pose.blocks.spectral import EDGES, NORMS, SpectralBlock
from srl_pose.testing import randomize

ON_GPU, INTERPRETED = torch.cuda.is_available(), os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cuda' if ON_GPU and not INTERPRETED else 'cpu'
ALONE = {name: value for name, value in os.environ.items() if name not in ('TRITON_INTERPRET', 'SRL_POSE_GPU')}
runs_kernels = pytest.mark.skipif(not ON_GPU and not INTERPRETED, reason='runs in the process of test_in_the_interpreter')
has_triton = pytest.mark.skipif(not fast.has_triton(), reason='no Triton')
by_itself = pytest.mark.skipif(INTERPRETED, reason='starts a process of its own')
BOUNDS = {torch.float32: (1e-5, 1e-5), torch.float16: (5e-3, 2e-2), torch.bfloat16: (4e-2, 0.15)}  # of the error's norm: residual, gradients (which jump where a ReLU falls to the other side)


@has_triton
@by_itself
def test_in_the_interpreter():
    """All tests below that run kernels. Triton asks once, when it is imported, whether to interpret."""
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', __file__], capture_output=True, text=True,
                          env=ALONE | dict(TRITON_INTERPRET='1'))
    assert done.returncode == 0 and 'passed' in done.stdout, done.stdout[-5000:]


@pytest.fixture
def plugged(monkeypatch):
    monkeypatch.setenv('SRL_POSE_GPU', '1')
    monkeypatch.setitem(SpectralBlock.fast_forms, DEVICE, fast.gpu_forward)


def random_block(channels=8, groups=2, **options):
    block = randomize(SpectralBlock(channels, groups=groups, **options)).to(DEVICE)
    block.bn.reset_running_stats()
    if block.norm == 'backward': block.alpha.data *= 7  # a residual that is no smaller than the rounding of x
    return block


def random_map(*shape, dtype=torch.float32, layout=torch.contiguous_format, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return x.contiguous(memory_format=layout)


def outcome(block, x, grad):
    """Residual, gradients, running statistics, and which function made them."""
    block, x = copy.deepcopy(block), x.detach().requires_grad_()
    y = block(x)
    named = dict(block.named_parameters())
    gradients = dict(zip(['x', *named], torch.autograd.grad(y, [x, *named.values()], grad), strict=True))
    return dict(residual=y.double() - x.double(), **gradients, **dict(block.named_buffers())), type(y.grad_fn).__name__, y


def exactly(block):
    block = copy.deepcopy(block).double()
    block.fast = False
    return block


def compare(ours, exact, bound):
    for name, value in exact.items():
        error = (ours[name].double() - value.double()).norm()
        assert error <= bound[name != 'residual'] * value.double().norm() + 1e-12, (name, error / value.double().norm())


CASES = [((2, 8, 9, 6), 2), ((2, 8, 6, 9), 8), ((3, 8, 1, 7), 2), ((3, 8, 5, 1), 2), ((2, 4, 17, 34), 2), ((1, 33, 2, 3), 1), ((3, 6, 8, 8), 1)]


@runs_kernels
@pytest.mark.parametrize('shape,groups', CASES)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_a_step_is_that_of_the_definition(shape, groups, layout, plugged):
    """Odd sizes, single rows and columns, several blocks of columns, groups wider than a block."""
    options = dict(edges='upper', norm='ortho') if layout == torch.channels_last else {}
    block = random_block(shape[1], groups, **options)
    x, grad = random_map(*shape, layout=layout), random_map(*shape, seed=1)
    ours, name, y = outcome(block, x, grad)
    assert 'SpectralTrainingGPU' in name and y.is_contiguous(memory_format=layout)
    compare(ours, outcome(exactly(block), x.double(), grad.double())[0], BOUNDS[torch.float32])


@runs_kernels
@pytest.mark.parametrize('dtype', BOUNDS)
@pytest.mark.parametrize('edges,norm', list(zip(EDGES, [*NORMS, NORMS[0]], strict=True)))
def test_every_type_and_every_inverse(dtype, edges, norm, plugged):
    block = random_block(edges=edges, norm=norm)
    x, grad = random_map(1, 8, 9, 6, dtype=dtype), random_map(1, 8, 9, 6, dtype=dtype, seed=1)
    with torch.autocast(DEVICE, dtype=torch.float16 if dtype == torch.float16 else torch.bfloat16):
        ours, name, y = outcome(block, x, grad)
    assert 'SpectralTrainingGPU' in name and y.dtype == dtype
    compare(ours, outcome(exactly(block), x.double(), grad.double())[0], BOUNDS[dtype])


@runs_kernels
def test_a_bright_map_does_not_overflow_float16(plugged):
    """HW times its mean is 221,184; float16 ends at 65,504."""
    block, x = random_block(2, 1), 100 + random_map(1, 2, 48, 48, dtype=torch.float16)
    y = block(x)
    assert y.isfinite().all() and torch.isfinite(block.bn.running_var).all()


@runs_kernels
@pytest.mark.parametrize('dtype', BOUNDS)
@pytest.mark.parametrize('norm', NORMS)
@torch.no_grad()
def test_evaluation(dtype, norm, plugged):
    block = randomize(SpectralBlock(8, groups=2, edges='upper', norm=norm)).eval().to(DEVICE)
    x = random_map(2, 8, 9, 6, dtype=dtype)
    y = block(x)
    assert (y.double() - exactly(block)(x.double())).norm() <= BOUNDS[dtype][0] * y.double().norm()


@runs_kernels
def test_operators_keep_the_rules():
    """Schema, fake tensors and ahead-of-time dispatch, both layouts."""
    block = random_block(2, 1)
    c, bn = block.conv_layer, block.bn
    parameters = [t.detach() for t in (c.weight, c.bias, bn.weight, bn.bias, block.alpha)]
    for layout in (torch.contiguous_format, torch.channels_last):
        x = random_map(2, 2, 5, 4, dtype=torch.bfloat16, layout=layout)
        forward = x, *parameters, 1e-5, 1, 'average', 'backward'
        _, *kept = spectral_gpu.operators.spectral_gpu_forward(*forward)
        backward = x, parameters[0], parameters[2], parameters[4], *kept, 1e-5, 1, True, 'average', 'backward'
        inference = x, *parameters[:2], *kept[-2:], parameters[4], 1, 'upper', 'ortho'
        for name, arguments in dict(forward=forward, backward=backward, inference=inference).items():
            torch.library.opcheck(getattr(spectral_gpu.operators, f'spectral_gpu_{name}').default, arguments,
                                  test_utils=('test_schema', 'test_faketensor'))


@runs_kernels
@pytest.mark.parametrize('training', [True, False])
def test_a_compiled_block_is_the_operator(training, plugged):
    block = random_block(4).train(training)
    compiled = torch.compile(block, backend='aot_eager', fullgraph=True)
    for batch in (2, 3):
        x = random_map(batch, 4, 5, 4, seed=batch).requires_grad_(training)
        state, results = copy.deepcopy(block.state_dict()), []
        for forward in (compiled, block):
            block.load_state_dict(state)
            with torch.set_grad_enabled(training): y = forward(x)
            gradients = torch.autograd.grad(y.square().sum(), [x, *block.parameters()]) if training else []
            results.append([y, *gradients, *(t.clone() for t in block.buffers())])
        for ours, eager in zip(*results, strict=True): assert torch.equal(ours, eager)


@runs_kernels
def test_checkpointed_and_run_again_it_is_bit_for_bit_the_same(plugged):
    block, x = random_block(4), random_map(2, 4, 5, 4).requires_grad_()
    once, again, stored = (torch.autograd.grad(f(x).square().sum(), [x, *block.parameters()])
                           for f in (block, block, lambda x: checkpoint(block, x, use_reentrant=False)))
    for a, b, c in zip(once, again, stored, strict=True): assert torch.equal(a, b) and torch.equal(a, c)


@runs_kernels
def test_what_goes_through_the_definition(plugged, monkeypatch):
    """Hooks, other types, counters, exporters, a layer of another kind; and everything unless it is asked for."""
    block, x = random_block(), random_map(2, 8, 5, 4)
    layers = block.alpha, block.conv_layer, block.bn, block.relu
    assert fast.gpu_forward(x, *layers) is not None
    with FlopCounterMode(display=False): assert fast.gpu_forward(x, *layers) is None
    assert fast.gpu_forward(x.double(), *layers) is None
    assert fast.gpu_forward(x, *layers[:2], torch.nn.SyncBatchNorm(16), block.relu) is None
    with torch.no_grad(): program = torch.export.export(copy.deepcopy(block).eval(), (x,))
    assert 'spectral_gpu' not in str(program.graph_module.print_readable(print_output=False))
    handle = block.bn.register_forward_hook(lambda *_: None)
    assert fast.gpu_forward(x, *layers) is None
    handle.remove()
    monkeypatch.delenv('SRL_POSE_GPU')
    assert fast.gpu_forward(x, *layers) is None


@by_itself
def test_nothing_of_triton_is_imported_before_a_kernel_runs():
    code = ("import sys, torch, srl_pose; from srl_pose.blocks.gpu import traffic\n"
            "srl_pose.SpectralBlock(8)(torch.zeros(2, 8, 5, 4)); print('triton' in sys.modules, 'cuda' in srl_pose.SpectralBlock.fast_forms)")
    for switch in ('0', '1'):
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=ALONE | dict(SRL_POSE_GPU=switch))
        assert done.stdout == 'False True\n'


COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from srl_pose.blocks.gpu import kernels, spectral_gpu
TYPES = {torch.float32: '*fp32', torch.bfloat16: '*bf16', int: 'i32', float: 'fp32'}
class CompileOnly:
    def __getattr__(self, name):
        kernel = getattr(kernels, name)
        def launch(*args, num_warps=4, **constants):
            values = dict(zip(kernel.arg_names, args)) | constants
            constant = {n: v for n, v in values.items() if n in constants or type(v) is int and v == 1}
            signature = {n: 'constexpr' if n in constant else TYPES[values[n].dtype if torch.is_tensor(values[n]) else type(values[n])] for n in kernel.arg_names}
            done = triton.compile(ASTSource(kernel, signature, constant), target=GPUTarget('cuda', 90, 32), options=dict(num_warps=num_warps))
            assert done.metadata.shared <= 227 * 1024, (name, done.metadata.shared)
            print(name)
        return type('Grid', (), {'__getitem__': lambda self, grid: launch})()
spectral_gpu.kernels = CompileOnly
torch.backends.cuda.matmul.allow_tf32 = True
for shape, dtype, groups in [((2, 256, 64, 48), torch.bfloat16, 8), ((1, 132, 128, 127), torch.float32, 2)]:
    x, C = torch.zeros(shape, dtype=dtype), shape[1]
    weight, vector, alpha = torch.zeros(2 * C, 2 * C // groups, 1, 1), torch.zeros(2 * C), torch.ones(1)
    _, *kept = spectral_gpu.gpu_forward(x, weight, vector, vector, vector, alpha, 1e-5, groups, 'upper', 'ortho')
    spectral_gpu.gpu_backward(x, weight, vector, alpha, *kept, 1e-5, groups, True, 'pytorch1', 'ortho')
"""


@has_triton
@by_itself
def test_every_kernel_compiles_for_a_gpu(tmp_path):
    """Down to machine code of compute capability 9.0, within its shared memory; that needs no GPU."""
    done = subprocess.run([sys.executable, '-c', COMPILE], capture_output=True, text=True, env=ALONE | dict(TRITON_CACHE_DIR=str(tmp_path)))
    assert done.returncode == 0, done.stderr[-3000:]
    source = Path(sys.modules['srl_pose.blocks.gpu'].__path__[0], 'kernels.py').read_text()
    assert set(done.stdout.split()) == {line.split('(')[0].removeprefix('def ') for line in source.splitlines() if line.startswith('def ') and '_kernel(' in line}

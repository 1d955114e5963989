"""The block in Triton: on a GPU where there is one, else in Triton's interpreter on a CPU, in a process of its own."""
import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from srl_pose.blocks.base import TransformBlock
from srl_pose.blocks.forms import form_of
from srl_pose.blocks.gpu import fast, spectral_gpu
from srl_pose.blocks.half_spectrum import EDGES, NORMS
from srl_pose.blocks.spectral import SpectralBlock
from srl_pose.testing import naive_fft_block, randomize

ON_GPU, INTERPRETED = torch.cuda.is_available(), os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cuda' if ON_GPU and not INTERPRETED else 'cpu'
ALONE = {name: value for name, value in os.environ.items() if name not in ('TRITON_INTERPRET', 'SRL_POSE_GPU')}
runs_kernels = pytest.mark.skipif(not ON_GPU and not INTERPRETED, reason='runs in the process of test_in_the_interpreter')
has_triton = pytest.mark.skipif(not fast.has_triton(), reason='no Triton')
by_itself = pytest.mark.skipif(INTERPRETED, reason='starts a process of its own')
BOUNDS = {torch.float32: (1e-5, 1e-5), torch.float16: (5e-3, 2e-2), torch.bfloat16: (4e-2, 0.15)}  # of the error's norm: residual, gradients (which jump where a ReLU falls to the other side)


def in_the_interpreter(file):
    """All tests of a file that run kernels. Triton asks once, when it is imported, whether to interpret."""
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', file], capture_output=True, text=True,
                          env=ALONE | dict(TRITON_INTERPRET='1'))
    assert done.returncode == 0 and 'passed' in done.stdout, done.stdout[-5000:]


@has_triton
@by_itself
@pytest.mark.skipif(ON_GPU, reason='they run on the GPU')
def test_in_the_interpreter():
    in_the_interpreter(__file__)


@pytest.fixture
def plugged(monkeypatch):
    """Blocks run as kernels."""
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
    return dict(residual=y.double() - x.double(), **gradients, **dict(block.named_buffers())), form_of(y), y


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
    ours, form, y = outcome(block, x, grad)
    assert form == 'Triton' and y.is_contiguous(memory_format=layout)
    compare(ours, outcome(exactly(block), x.double(), grad.double())[0], BOUNDS[torch.float32])


@runs_kernels
@pytest.mark.parametrize('dtype', BOUNDS)
@pytest.mark.parametrize('edges,norm', list(zip(EDGES, [*NORMS, NORMS[0]], strict=True)))
def test_every_type_and_every_inverse(dtype, edges, norm, plugged):
    block = random_block(edges=edges, norm=norm)
    x, grad = random_map(1, 8, 9, 6, dtype=dtype), random_map(1, 8, 9, 6, dtype=dtype, seed=1)
    with torch.autocast(DEVICE, dtype=torch.float16 if dtype == torch.float16 else torch.bfloat16):
        ours, form, y = outcome(block, x, grad)
    assert form == 'Triton' and y.dtype == dtype
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


LARGE = [((1, 2, 64, 48), 'float32'), ((1, 2, 96, 72), 'bfloat16'), ((1, 1, 128, 127), 'bfloat16'), ((1, 2, 128, 128), 'float16'), ((1, 2, 1, 128), 'float32'),
         ((1, 2, 128, 1), 'bfloat16')]


@runs_kernels
@pytest.mark.parametrize('shape,dtype', LARGE)
def test_sizes_of_pose_maps(shape, dtype, plugged):
    """Up to 128×128, with few channels."""
    dtype = getattr(torch, dtype)
    if max(shape) > 64: assert spectral_gpu.takes(torch.empty(shape, dtype=dtype)) == (dtype != torch.float32)
    if not spectral_gpu.takes(torch.empty(shape, dtype=dtype)): dtype = torch.bfloat16
    block = random_block(shape[1], 1, norm='ortho')
    x, grad = random_map(*shape, dtype=dtype), random_map(*shape, dtype=dtype, seed=1)
    ours, form, _ = outcome(block, x, grad)
    assert form == 'Triton'
    compare(ours, outcome(exactly(block), x.double(), grad.double())[0], BOUNDS[dtype])


def spread(t): return torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0]


STRANGE = {'turned': lambda t: t.mT.contiguous().mT, 'every second row': lambda t: t.repeat_interleave(2, 2)[:, :, ::2], 'channels first': lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
           'inside': lambda t: torch.nn.functional.pad(t, (1, 1, 1, 1), value=torch.nan)[:, :, 1:-1, 1:-1], 'between': spread}


@runs_kernels
@pytest.mark.parametrize('name', STRANGE)
def test_strides_and_neighbours_do_not_matter(name, plugged):
    """Maps and gradients of any strides give the same bits; around them is nothing but NaN, which would show."""
    block, strange = random_block(4), STRANGE[name]
    x, grad = random_map(2, 4, 7, 6), random_map(2, 4, 7, 6, seed=1)
    (plain, _, _), (other, form, _) = outcome(block, x, grad), outcome(block, strange(x), strange(grad))
    assert form == 'Triton' and not strange(x).is_contiguous()
    for key, value in plain.items(): assert torch.equal(value, other[key]), key
    with torch.no_grad(): assert torch.equal(block.eval()(strange(x)), block(x))


@runs_kernels
def test_one_map_and_one_number_many_times(plugged):
    """Expanded: a batch of one map, and the gradient that `sum` makes of a single number."""
    block, one = random_block(4), random_map(1, 4, 7, 6)
    x, ones = one.expand(3, -1, -1, -1), torch.ones((), device=DEVICE).expand(3, 4, 7, 6)
    ours, other = outcome(block, x, ones)[0], outcome(block, x.contiguous(), ones.contiguous())[0]
    for key, value in ours.items(): assert torch.equal(value, other[key]), key
    with torch.no_grad(): assert torch.equal(block.eval()(x), block(x.contiguous()))


@runs_kernels
def test_parameters_in_other_places(plugged):
    """An ensemble's members are strided slices of one tensor; `load_state_dict(assign=True)` takes whatever strides it is given."""
    block, twin, x = random_block(4), SpectralBlock(4, groups=2).to(DEVICE), random_map(2, 4, 7, 6)
    member = {name: torch.stack((t, torch.full_like(t, 9)), -1)[..., 0] for name, t in block.state_dict().items()}
    twin.load_state_dict(member, assign=True)
    assert not any(t.is_contiguous() for t in (member['bn.bias'], twin.bn.bias, twin.conv_layer.bias))
    for training in (False, True):
        block.train(training), twin.train(training)
        with torch.no_grad():
            want, given = block(x), copy.deepcopy(twin)(x)
            assert torch.equal(want, given) and torch.equal(torch.func.functional_call(block, member, (x,)), want)
    block.load_state_dict(twin.state_dict())
    ours, others = outcome(block, x, x)[0], outcome(twin, x, x)[0]
    for key, value in ours.items(): assert torch.equal(value, others[key]), key
    ones = torch.ones(1, device=DEVICE).expand(8)
    arguments = [t.detach() for t in (block.conv_layer.weight, block.conv_layer.bias)]
    one_number, copies = (spectral_gpu.gpu_forward(x, *arguments, v, v, block.alpha.detach(), 1e-5, 2, 'average', 'backward') for v in (ones, ones.contiguous()))
    for a, b in zip(one_number, copies, strict=True): assert torch.equal(a, b)


@runs_kernels
def test_only_some_gradients_are_wanted(plugged):
    """An input without one, frozen parameters, and gradients that add up."""
    block, x = random_block(4), random_map(2, 4, 7, 6)
    want = outcome(block, x, x)[0]
    twin = copy.deepcopy(block)
    twin(x).backward(x)
    for name, p in twin.named_parameters(): assert torch.equal(p.grad, want[name]), name
    twin(x).backward(x)
    for name, p in twin.named_parameters(): assert torch.equal(p.grad, 2 * want[name]), name
    frozen, t = copy.deepcopy(block).requires_grad_(False), x.clone().requires_grad_()
    frozen(t).backward(x)
    assert torch.equal(t.grad, want['x']) and frozen.alpha.grad is None


@runs_kernels
def test_what_is_not_a_number_is_not_swallowed(plugged):
    block, x = random_block(4), random_map(2, 4, 7, 6)
    x[1, 2, 3, 4] = torch.nan
    ours, exact = (outcome(b, x.to(dtype), torch.ones_like(x, dtype=dtype))[0] for b, dtype in ((block, torch.float32), (exactly(block), torch.float64)))
    for name, value in exact.items():
        if name != 'conv_layer.bias': assert torch.equal(ours[name].isnan(), value.isnan()), name
    with torch.no_grad(): assert torch.equal(block.eval()(x).isnan(), exactly(block)(x.double()).isnan())


@runs_kernels
def test_at_birth_the_block_does_nothing_and_alpha_learns_first(plugged):
    block, x = SpectralBlock(4, groups=2).to(DEVICE), random_map(3, 4, 7, 6)
    assert torch.equal(block(x), x) and form_of(block(x)) == 'Triton'
    optimizer = torch.optim.Adam(block.parameters(), 1e-2)
    for learned in ({'alpha'}, {name for name, _ in block.named_parameters()} - {'conv_layer.bias'}):
        optimizer.zero_grad()
        (block(x) - x.roll(1, -1)).square().mean().backward()
        assert {name for name, p in block.named_parameters() if p.grad.abs().max() > 0} == learned
        optimizer.step()


@runs_kernels
@pytest.mark.parametrize('dtype', BOUNDS)
def test_what_is_kept_for_backward(dtype, plugged):
    """Two spectra in the type of the map, and vectors."""
    block, kept = random_block(8), {}
    x = random_map(2, 8, 24, 6, dtype=dtype).requires_grad_()
    own = {t.untyped_storage().data_ptr() for t in (x, *block.parameters(), *block.buffers())}
    def pack(t): return kept.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): y = block(x)
    spectra = 2 * 2 * 16 * 24 * 4 * x.element_size()
    assert spectra <= sum(n for pointer, n in kept.items() if pointer not in own) < 1.1 * spectra and y.dtype == dtype


@runs_kernels
@pytest.mark.parametrize('inside', [True, False])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast_leaves_maps_as_they_are(dtype, inside, plugged):
    """Parameters stay float32; backward may run inside of autocast, or after it."""
    block = random_block(4)
    for x in (random_map(2, 4, 7, 6), random_map(2, 4, 7, 6, dtype=dtype)):
        want = outcome(block, x, x)[0]
        twin, t = copy.deepcopy(block), x.clone().requires_grad_()
        with torch.autocast(DEVICE, dtype=dtype):
            y = twin(t)
            if inside: y.backward(x)
        if not inside: y.backward(x)
        assert y.dtype == x.dtype and torch.equal(t.grad, want['x']) and torch.equal(twin.conv_layer.weight.grad, want['conv_layer.weight'])


@runs_kernels
def test_without_gradients(plugged):
    """In training the running statistics move all the same; an empty batch is evaluated."""
    block, x = random_block(4), random_map(2, 4, 7, 6)
    want = outcome(block, x, x)
    for context in (torch.no_grad, torch.inference_mode):
        twin = copy.deepcopy(block)
        with context(): assert torch.equal(twin(x), want[2])
        assert torch.equal(twin.bn.running_var, want[0]['bn.running_var']) and twin.bn.num_batches_tracked == 1
    with torch.no_grad(): assert block.eval()(x[:0]).shape == (0, 4, 7, 6)


@runs_kernels
@pytest.mark.parametrize('together', [1, 2, 4, 3, 8])
def test_groups_that_go_together_change_no_bit(together, plugged):
    """3 and 8 are taken for what they have in common with 4 groups: 1 and 4."""
    block, x = random_block(4, 4), random_map(2, 4, 7, 6)
    want = outcome(block, x, x)[0]
    with spectral_gpu.groups_together(together): ours = outcome(block, x, x)[0]
    for name, value in want.items(): assert torch.equal(value, ours[name]), name


@runs_kernels
def test_hooks_counters_and_single_numbers_get_the_definition(plugged):
    """Of each kind of hook it is known that it was called."""
    kinds = [lambda b, f: b.bn.register_forward_hook(f), lambda b, f: b.conv_layer.register_forward_pre_hook(f), lambda b, f: b.relu.register_full_backward_hook(f),
             lambda b, f: b.conv_layer.register_full_backward_pre_hook(f), lambda b, f: torch.nn.modules.module.register_module_forward_hook(f),
             lambda b, f: torch.nn.modules.module.register_module_full_backward_hook(f)]
    x = random_map(2, 4, 7, 6)
    for register in kinds:
        block, seen = random_block(4), []
        handle = register(block, lambda *_: seen.append(1) and None)
        y = block(x.requires_grad_())
        y.sum().backward()
        handle.remove()
        assert seen and form_of(y) == 'definition' and form_of(block(x)) == 'Triton'
    with FlopCounterMode(display=False) as ours: block(x).sum().backward()
    with FlopCounterMode(display=False) as plain: naive_fft_block(block, x).sum().backward()
    assert ours.get_total_flops() == plain.get_total_flops() > 0
    with pytest.raises(ValueError, match='more than 1 value per channel'): block(random_map(1, 4, 1, 1))


@runs_kernels
def test_other_layers_get_the_definition(plugged):
    x = random_map(2, 4, 7, 6)
    for change in (dict(momentum=None), dict(affine=False), dict(track_running_stats=False)):
        block = random_block(4)
        block.bn = torch.nn.BatchNorm2d(8, **change).to(DEVICE)
        ours, form, y = outcome(block, x, x)
        assert form == 'definition' and torch.equal(y, TransformBlock.forward(copy.deepcopy(block), x))
    for options in (dict(spectral_relu=True), dict(bottleneck=True), dict(bottleneck=True, spectral_relu=True)):
        block = randomize(SpectralBlock(8, groups=2, size=(7, 6), **options)).to(DEVICE)
        assert form_of(block(random_map(2, 8, 7, 6))) == 'definition'
    frozen = random_block(4)
    frozen.bn.eval()
    before, y = copy.deepcopy(frozen.bn.state_dict()), frozen(x)
    assert form_of(y) == 'definition' and all(torch.equal(t, before[name]) for name, t in frozen.bn.state_dict().items())
    frozen.eval()
    assert form_of(frozen(x)) == 'definition'  # evaluation with gradients
    synced = random_block(4)
    synced.bn = torch.nn.SyncBatchNorm(8).to(DEVICE).eval()  # in training it wants processes
    with torch.no_grad(): torch.testing.assert_close(synced.eval()(x), TransformBlock.forward(synced, x))


@runs_kernels
def test_derivatives_of_other_kinds_are_those_of_the_definition(plugged):
    """Forward mode, an ensemble by vmap, torch.func.grad; a second derivative is refused, or taken of the definition."""
    block, x = random_block(4).eval().requires_grad_(False), random_map(2, 4, 7, 6)
    direction = random_map(2, 4, 7, 6, seed=1)
    wanted = torch.func.jvp(lambda x: naive_fft_block(block, x), (x,), (direction,))[1]
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        y = block(torch.autograd.forward_ad.make_dual(x, direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(block)(torch.stack([x, direction])), torch.stack([block(x), block(direction)]), rtol=1e-4, atol=1e-4)
        members = {name: torch.stack([t, 2 * t]) for name, t in block.state_dict().items()}
        several = torch.func.vmap(lambda state: torch.func.functional_call(block, state, (x,)))(members)
        torch.testing.assert_close(several[0], block(x), rtol=1e-4, atol=1e-4)
    t = x.clone().requires_grad_()
    block(t).sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: block(x).sum())(x), t.grad, rtol=1e-4, atol=1e-4)
    block = random_block(4)
    with pytest.raises(RuntimeError, match='create_graph=True.*SpectralBlock.fast = False'): torch.autograd.grad(block(t).sum(), t, create_graph=True)
    block.fast = False
    assert torch.autograd.grad(block(t).sum(), t, create_graph=True)[0].requires_grad


@runs_kernels
def test_several_gradients_at_once(plugged):
    block, x = random_block(4), random_map(2, 4, 7, 6).requires_grad_()
    several, inputs = torch.stack([random_map(2, 4, 7, 6, seed=i) for i in range(3)]), [x, *block.parameters()]
    y = block(x)
    singles = zip(*(torch.autograd.grad(y, inputs, g, retain_graph=True) for g in several))
    for at_once, single in zip(torch.autograd.grad(y, inputs, several, is_grads_batched=True), singles, strict=True):
        torch.testing.assert_close(at_once, torch.stack(single), rtol=0, atol=0)


@runs_kernels
def test_what_goes_through_the_definition(plugged, monkeypatch):
    """Other types and sizes; and everything unless it is asked for."""
    block, x = random_block(), random_map(2, 8, 5, 4)
    layers = block.alpha, block.conv_layer, block.bn, block.relu
    assert fast.gpu_forward(x, *layers) is not None
    for other in (x.double(), random_map(1, 8, 2, 129), x[:0]): assert fast.gpu_forward(other, *layers) is None
    monkeypatch.delenv('SRL_POSE_GPU')
    assert fast.gpu_forward(x, *layers) is None
    monkeypatch.setenv('SRL_POSE_GPU', 'on')
    with pytest.raises(ValueError, match="SRL_POSE_GPU='on' is unknown: choose from 0, 1, products"): block(x)


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
            if constants.get('ACTIVE'): assert 'max.NaN.f32' in done.asm['ptx']  # a ReLU that swallows what is not a number would not show in the interpreter
            print(name)
        return type('Grid', (), {'__getitem__': lambda self, grid: launch})()
spectral_gpu.kernels = CompileOnly
torch.backends.cuda.matmul.allow_tf32 = True
for shape, dtype, groups in [((2, 256, 64, 48), torch.bfloat16, 8), ((1, 132, 128, 127), torch.float32, 2)]:
    x, C = torch.zeros(shape, dtype=dtype), shape[1]
    weight, vector, alpha = torch.zeros(2 * C, 2 * C // groups, 1, 1), torch.zeros(2 * C), torch.ones(1)
    _, *kept = spectral_gpu.gpu_forward(x, weight, vector, vector, vector, alpha, 1e-5, groups, 'upper', 'ortho')
    spectral_gpu.gpu_backward(x, weight, vector, alpha, *kept, 1e-5, groups, True, True, 'pytorch1', 'ortho')
"""


@has_triton
@by_itself
def test_every_kernel_compiles_for_a_gpu(tmp_path):
    """Down to machine code of compute capability 9.0, within its shared memory; that needs no GPU."""
    done = subprocess.run([sys.executable, '-c', COMPILE], capture_output=True, text=True, env=ALONE | dict(TRITON_CACHE_DIR=str(tmp_path)))
    assert done.returncode == 0, done.stderr[-3000:]
    source = Path(sys.modules['srl_pose.blocks.gpu'].__path__[0], 'kernels.py').read_text()
    assert set(done.stdout.split()) == {line.split('(')[0].removeprefix('def ') for line in source.splitlines() if line.startswith('def ') and '_kernel(' in line}

"""What torch does with modules works with the kernels in them: compile, export, checkpointing, DDP, FSDP2, copies. On a GPU, else in Triton's interpreter."""
import copy
import io
import pickle
import subprocess
import sys
import types

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_gpu import ALONE, DEVICE, ON_GPU, by_itself, has_triton, in_the_interpreter, outcome, plugged, random_block, random_map, runs_kernels  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from srl_pose.blocks.forms import form_of
from srl_pose.blocks.gpu import fast, products, spectral_gpu
from srl_pose.blocks.spectral import SpectralBlock
from srl_pose.pose.pose_net import PoseResNet


@has_triton
@by_itself
@pytest.mark.skipif(ON_GPU, reason='they run on the GPU')
def test_in_the_interpreter():
    in_the_interpreter(__file__)


def gradients_of(forward, block, x):
    y = forward(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]


@runs_kernels
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_operators_keep_the_rules(layout):
    """Schema, no writing into inputs, fake results like the true ones, ahead-of-time dispatch with another batch."""
    block = random_block(2, 1)
    c, bn = block.conv_layer, block.bn
    parameters = [t.detach() for t in (c.weight, c.bias, bn.weight, bn.bias, block.alpha)]
    x = random_map(2, 2, 5, 4, dtype=torch.bfloat16, layout=layout)
    forward = x, *parameters, 1e-5, 1, 'average', 'backward'
    _, *kept = spectral_gpu.operators.spectral_gpu_forward(*forward)
    backward = x.mT.contiguous().mT, parameters[0], parameters[2], parameters[4], *kept, 1e-5, 1
    cases = [('forward', forward), ('inference', (x, *parameters[:2], *kept[-2:], parameters[4], 1, 'upper', 'ortho'))]
    cases += [('backward', (*backward, needs_x, layout == torch.channels_last, 'average', 'backward')) for needs_x in (True, False)]
    for name, arguments in cases:
        torch.library.opcheck(getattr(spectral_gpu.operators, f'spectral_gpu_{name}').default, arguments,
                              test_utils=('test_schema', 'test_faketensor', 'test_aot_dispatch_dynamic'))


def run_in_turns(block, forwards, training):
    """Results of each, from the same state, for two batches."""
    for batch in (2, 3):
        x = random_map(batch, 4, 5, 4, seed=batch).requires_grad_(training)
        state, results = copy.deepcopy(block.state_dict()), []
        for forward in forwards:
            block.load_state_dict(state)
            with torch.set_grad_enabled(training): results.append(gradients_of(forward, block, x) if training else [forward(x)])
            results[-1] += [t.clone() for t in block.buffers()]
        yield results


@runs_kernels
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('backend', ['aot_eager', 'inductor'])
def test_a_compiled_block_is_the_operator(training, backend, plugged):
    """In one graph, the same numbers; another batch, too."""
    torch._dynamo.reset()
    block = random_block(4, **(dict(edges='upper', norm='ortho') if backend == 'aot_eager' else {})).train(training)
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    for ours, eager in run_in_turns(block, (compiled, block), training):
        for a, b in zip(ours, eager, strict=True): torch.testing.assert_close(a, b, rtol=0 if backend == 'aot_eager' else 1e-6, atol=0 if backend == 'aot_eager' else 1e-6)


@runs_kernels
def test_products_compiled_are_products(monkeypatch):
    """The form for machines without Triton, in one graph."""
    torch._dynamo.reset()
    monkeypatch.setitem(SpectralBlock.fast_forms, DEVICE, fast.gpu_forward)
    monkeypatch.setenv('SRL_POSE_GPU', 'products')
    for edges, norm, backend in (('upper', 'ortho', 'inductor'), ('average', 'backward', 'aot_eager'), ('pytorch1', 'backward', 'aot_eager')):
        block = random_block(4, edges=edges, norm=norm)
        assert form_of(block(random_map(2, 4, 5, 4))) == 'matrices'
        compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=False)
        ours, eager = next(run_in_turns(block, (compiled, block), True))
        for a, b in zip(ours, eager, strict=True): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@runs_kernels
@pytest.mark.parametrize('strict', [True, False])
def test_an_exported_block_needs_no_operator_of_ours(strict, plugged):
    block, x = random_block(4).eval(), random_map(2, 4, 5, 4)
    with torch.no_grad():
        program = torch.export.export(block, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), block(x), rtol=1e-4, atol=1e-4)
    assert 'spectral_gpu' not in str(program.graph_module.print_readable(print_output=False))


@runs_kernels
@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointed_and_run_again_it_is_bit_for_bit_the_same(reentrant, plugged):
    """The running statistics move twice when a pass is run again, as those of any BatchNorm do."""
    block, x = random_block(4), random_map(2, 4, 5, 4).requires_grad_()
    once, again = (gradients_of(block, block, x) for _ in range(2))
    block.bn.reset_running_stats()
    y = checkpoint(block, x, use_reentrant=reentrant)
    y.square().sum().backward()
    stored = [y, x.grad, *(p.grad for p in block.parameters())]
    for a, b, c in zip(once, again, stored, strict=True): assert torch.equal(a, b) and torch.equal(a, c)
    assert block.bn.num_batches_tracked == 2


@runs_kernels
def test_what_is_kept_may_lie_elsewhere(plugged):
    """Saved tensors on the CPU, or copied, give the same gradients."""
    block, x = random_block(4), random_map(2, 4, 5, 4).requires_grad_()
    want = gradients_of(block, block, x)
    with torch.autograd.graph.save_on_cpu(): y = block(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t): z = block(x)
    for out in (y, z):
        for a, b in zip([out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])], want, strict=True): assert torch.equal(a, b)


@runs_kernels
def test_copies_files_and_forms_share_a_state(plugged):
    """A copy, a pickle, a state that was saved, and the state of a block that runs as its definition."""
    block, x = random_block(4), random_map(2, 4, 5, 4)
    block(x)
    plain, file = SpectralBlock(4, groups=2).to(DEVICE), io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert list(plain.state_dict()) == list(block.state_dict()) and not any(t.is_complex() for t in block.state_dict().values())
    with torch.no_grad(): want = block.eval()(x)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), plain):
        with torch.no_grad(): assert torch.equal(twin.eval()(x), want)
    plain.fast = False
    with torch.no_grad(): torch.testing.assert_close(plain(x), want, rtol=1e-4, atol=1e-4)
    state = dict(block.state_dict())
    with torch.no_grad(): assert torch.equal(torch.func.functional_call(plain.train(False), state, (x,)), plain(x))


class Network(torch.nn.Module):
    "A block and what stands around it."

    def __init__(self):
        super().__init__()
        self.first, self.blocks, self.last = torch.nn.Conv2d(3, 4, 1), torch.nn.Sequential(random_block(4)), torch.nn.Conv2d(4, 2, 1)

    def forward(self, x): return self.last(self.blocks(self.first(x)))


def steps_of(model, x, count=2):
    "Parameters after some steps of stochastic gradient descent."
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(count):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


def network():
    torch.manual_seed(0)
    return Network().to(DEVICE)


def full(t): return t.full_tensor() if hasattr(t, 'full_tensor') else t


def distributed_worker(rank, world, folder):
    """DDP and FSDP2 on one map that all processes share equal training in one process; then each process has its own map."""
    SpectralBlock.fast_forms[DEVICE] = fast.gpu_forward
    forms = []
    dist.init_process_group('nccl' if ON_GPU else 'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=world)
    try:
        x = random_map(2, 3, 5, 4)
        alone = steps_of(network(), x).state_dict()
        for kind in ('DDP', 'FSDP2'):
            model = network()
            model.blocks[0].register_forward_hook(lambda _, __, y: forms.append(form_of(y)))
            if kind == 'DDP':
                wrapped = torch.nn.parallel.DistributedDataParallel(model)
            else:
                mesh = init_device_mesh(DEVICE, (world,))
                for block in model.blocks: fully_shard(block, mesh=mesh)
                wrapped = fully_shard(model, mesh=mesh)
            steps_of(wrapped, x)
            for name, value in model.state_dict().items():
                torch.testing.assert_close(full(value), alone[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f'{kind} {n}: {m}')
            if kind == 'DDP':  # gradients of other maps are averaged
                wrapped.zero_grad()
                wrapped(random_map(2, 3, 5, 4, seed=rank)).square().mean().backward()
                mine = model.blocks[0].conv_layer.weight.grad.clone()
                others = [torch.empty_like(mine) for _ in range(world)]
                dist.all_gather(others, mine)
                assert all(torch.equal(mine, other) for other in others)
        assert set(forms) == {'Triton'}, forms
    finally: dist.destroy_process_group()


@runs_kernels
def test_ddp_and_fsdp2(plugged, tmp_path):
    world = 1 if ON_GPU else 2
    mp.spawn(distributed_worker, (world, str(tmp_path)), nprocs=world)


class Launch:
    def __getitem__(self, grid): return lambda *_, **__: None


class NoKernels:
    """Launches that do nothing: for what depends on shapes only, without a GPU and without Triton."""

    def __getattr__(self, name): return Launch()


@pytest.fixture
def shapes_only(monkeypatch):
    monkeypatch.setenv('SRL_POSE_GPU', '1')
    monkeypatch.setitem(SpectralBlock.fast_forms, 'cpu', fast.gpu_forward)
    monkeypatch.setattr(spectral_gpu, 'kernels', NoKernels)
    monkeypatch.setattr(fast, 'has_triton', lambda: True)
    yield
    torch._dynamo.reset()


@by_itself
@pytest.mark.parametrize('form', ['1', 'products'])
def test_a_network_compiles_into_one_graph(form, shapes_only, monkeypatch):
    """No break at any of the three blocks, in training."""
    monkeypatch.setenv('SRL_POSE_GPU', form)
    torch._dynamo.reset()
    model, x = PoseResNet('resnet18', block='fft').train(), torch.randn(2, 3, 64, 32)
    explained = torch._dynamo.explain(model)(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons
    targets = [str(node.target) for node in explained.graphs[0].graph.nodes]
    assert not any('fft' in target for target in targets)
    called = sum('autograd_function_apply' in target or 'spectral_gpu' in target for target in targets)
    assert called >= 3 if form == '1' else not called


FAKE = """
import os, sys, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from srl_pose.blocks.forms import form_of
from srl_pose.blocks.gpu.fast import SpectralTrainingGPU
from srl_pose.blocks.spectral import SpectralBlock
with FakeTensorMode(allow_non_fake_inputs=True), torch.device('cuda'):
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            block, x = SpectralBlock(16), torch.empty(2, 16, 9, 6, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
            y = block(x)
            with torch.no_grad(): d_x, d_weight, *_ = SpectralTrainingGPU.backward(y.grad_fn, torch.empty(x.shape, dtype=dtype))  # autograd's engine wants a real GPU
            assert form_of(y) == 'Triton' and y.device.type == d_x.device.type == 'cuda'
            assert y.stride() == x.stride() == d_x.stride() and y.dtype == d_x.dtype == dtype and d_weight.dtype == torch.float32
            with torch.no_grad(): assert block.eval()(x).stride() == x.stride()
print('srl_pose.blocks.gpu.kernels' in sys.modules, flush=True)
os._exit(0)  # torch does not expect this of a machine without CUDA and may crash at the end
"""


@has_triton
@by_itself
def test_a_step_on_a_gpu_that_is_not_there():
    """Fake tensors that say they are on a GPU: the block is the operator, layouts and types are kept, and no kernel is asked for."""
    done = subprocess.run([sys.executable, '-c', FAKE], capture_output=True, text=True, env=ALONE | dict(SRL_POSE_GPU='1'))
    assert done.stdout == 'False\n', done.stdout + done.stderr[-3000:]


NO_TRITON = """
import importlib.util, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'triton': raise ModuleNotFoundError("No module named 'triton'", name='triton')
sys.meta_path.insert(0, Absent())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == 'triton' else find(name, *more)
import torch
import srl_pose.blocks.gpu.traffic
from srl_pose.blocks.forms import form_of
from srl_pose.blocks.gpu import fast
from srl_pose.blocks.spectral import SpectralBlock
SpectralBlock.fast_forms['cpu'] = fast.gpu_forward
block, x = SpectralBlock(8), torch.randn(2, 8, 5, 4, dtype=torch.bfloat16, requires_grad=True)
y = block(x)
y.sum().backward()
print(form_of(y), y.dtype, x.grad is not None, any(name.partition('.')[0] == 'triton' for name in sys.modules))
"""


@by_itself
def test_where_triton_is_missing_the_products_run():
    done = subprocess.run([sys.executable, '-c', NO_TRITON], capture_output=True, text=True, env=ALONE | dict(SRL_POSE_GPU='1'))
    assert done.stdout == 'matrices torch.bfloat16 True False\n', done.stdout + done.stderr[-3000:]


def test_the_products_are_compiled_where_they_can_be(monkeypatch):
    """On a GPU with Triton; elsewhere they run as they are."""
    seen = []
    monkeypatch.setattr(products, 'compiled_products', lambda: lambda x, *_: seen.append('compiled') or x)
    monkeypatch.setattr(products, 'spectral_by_products', lambda x, *_: seen.append('as they are') or x)
    monkeypatch.setattr(products, 'unitary_matrices', lambda *_: ())
    for device, there in (('cuda', True), ('cuda', False), ('cpu', True)):
        monkeypatch.setattr(products, 'has_triton', lambda there=there: there)
        products.run_products(types.SimpleNamespace(device=types.SimpleNamespace(type=device), shape=(1, 2, 3, 4), dtype=torch.float32))
    assert seen == ['compiled', 'as they are', 'as they are']

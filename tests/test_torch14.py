"""Outputs and gradients of the released code under PyTorch 1.4, on a CPU."""
from zlib import crc32

import numpy as np
import pytest
import torch

from srl_pose.blocks.spectral import SpectralBlock


@pytest.fixture(scope='module')
def golden(external):
    return np.load(external / 'golden' / 'torch14_blocks.npz')


CASES = [(size, relu) for size in ('16x12', '9x7') for relu in ('relu', 'srelu')]


def value(name, shape):
    "A parameter of the golden blocks."
    v = np.random.RandomState(crc32(name.encode()) & 0x7fffffff).standard_normal(shape).astype(np.float32)
    if name == 'alpha': return np.full(shape, 0.3, np.float32)
    if name == 'bn.running_var': return 0.5 + abs(v)
    if name in ('bn.weight', 'relu.weight'): return 1 + 0.2 * v
    if name == 'conv_layer.weight': return v * np.sqrt(1.6 / np.prod(shape[1:])).astype(np.float32)
    return 0.1 * v


def case(size, relu, **options):
    "A block, its input and the gradient of its output."
    H, W = map(int, size.split('x'))
    block = SpectralBlock(16, size=(H, W), spectral_relu=relu == 'srelu', **options)
    state = {name: torch.from_numpy(value(name, tuple(t.shape))) for name, t in block.state_dict().items() if t.ndim}
    block.load_state_dict(state, strict=False)
    rng = np.random.RandomState(1000 * H + W)
    x, grad = (torch.from_numpy(rng.standard_normal((2, 16, H, W)).astype(np.float32)) for _ in range(2))
    return block, x, grad


def close(ours, theirs):
    theirs = torch.from_numpy(theirs)
    return (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())


FORMS = ['as it runs', 'plain', 'real']


def in_form(block, form):
    block.fast, block.complex = form != 'plain', form != 'real'
    return block


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('edges', ['upper', 'pytorch1'])
@pytest.mark.parametrize('size, relu', CASES)
def test_evaluation(golden, size, relu, edges, form):
    block, x, _ = case(size, relu, edges=edges)
    with torch.no_grad():
        assert close(in_form(block.eval(), form)(x), golden[f'{size}|{relu}|eval|y'])


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('size, relu', CASES)
def test_training(golden, size, relu, form):
    block, x, grad = case(size, relu, edges='pytorch1')
    y = in_form(block.train(), form)(x.requires_grad_())
    (y * grad).sum().backward()
    wanted = {key.rpartition('|')[2]: golden[key] for key in golden.files if key.startswith(f'{size}|{relu}|train|')}
    ours = {'y': y.detach(), 'dx': x.grad, 'running_mean': block.bn.running_mean, 'running_var': block.bn.running_var,
            **{f'd.{name}': p.grad for name, p in block.named_parameters()}}
    assert ours.keys() == wanted.keys()
    wrong = {name for name in ours if not close(ours[name], wanted[name])}
    assert not wrong - {'d.conv_layer.bias'}  # only rounding: BatchNorm removes the bias


@pytest.mark.parametrize('size, relu', CASES)
def test_the_average_is_another_function(golden, size, relu):
    block, x, grad = case(size, relu)
    with torch.no_grad():
        y, theirs = block.eval()(x), torch.from_numpy(golden[f'{size}|{relu}|eval|y'])
    assert (y - theirs).abs().max() > 0.03 * (theirs - x).abs().max()


@pytest.mark.parametrize('size, relu', CASES)
def test_the_true_derivative_is_another_gradient(golden, size, relu):
    block, x, grad = case(size, relu, edges='upper')
    (block(x.requires_grad_()) * grad).sum().backward()
    theirs = torch.from_numpy(golden[f'{size}|{relu}|train|dx'])
    assert (x.grad - theirs).abs().max() > 0.01 * (theirs - grad).abs().max()

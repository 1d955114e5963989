"""PoseResNet against the original's outputs, and every block at every place."""
import json
import os
from itertools import combinations
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch

from srl_pose.pose_net import BLOCKS, PLACES, PoseResNet, count_flops

SUBSETS = [places for n in range(len(PLACES) + 1) for places in combinations(PLACES, n)]


def golden_value(name: str, shape: list[int], kind: str) -> torch.Tensor:
    "The value of one entry of an original checkpoint: seeded by its name, scaled by its kind."
    v = np.random.RandomState(crc32(name.encode()) & 0x7fffffff).standard_normal(shape).astype(np.float32)
    if kind == 'orth':
        return torch.linalg.qr(torch.from_numpy(v)).Q
    values = {'weight': lambda: v * np.sqrt(1.6 / np.prod(shape[1:])), 'bias': lambda: 0.1 * v,
              'running_mean': lambda: 0.1 * v, 'bn_weight': lambda: 1 + 0.2 * v, 'running_var': lambda: 0.5 + np.abs(v),
              'scalar': lambda: np.full(shape, 0.3)}
    return torch.from_numpy(np.asarray(values[kind](), dtype=np.float32))


def golden_model(key: str) -> PoseResNet:
    "The network that a key such as 18_fft_110 means, or skip; the digits say after which transposed convolutions."
    depth, block, places, *rest = [*key.split('_'), ''][:3] + key.split('_')[3:]
    decoder = len(places) == len(PLACES) and set(places) <= {'0', '1'}
    known = not places if block == 'none' else block in BLOCKS and decoder
    if rest or not known:
        pytest.skip(f'{key}: there is no such block or placement yet')
    after = [place for place, digit in zip(PLACES, places) if digit == '1']
    return PoseResNet(f'resnet{depth}', block=None if block == 'none' else block, block_after=after)


def pytest_generate_tests(metafunc):
    "One test per golden case when the folder is at hand, else one that skips."
    if 'golden_key' in metafunc.fixturenames:
        file = Path(os.environ.get('SRL_POSE_EXTERNAL', ''), 'golden', 'pose_resnet_params.json')
        metafunc.parametrize('golden_key', list(json.loads(file.read_text())) if file.is_file() else ['all'])


def test_golden(external, golden_key):
    entries = json.loads((external / 'golden' / 'pose_resnet_params.json').read_text())[golden_key]
    expected = torch.from_numpy(np.load(external / 'golden' / 'pose_resnet.npz')[golden_key])
    model = golden_model(golden_key).eval()
    assert [name for name in model.state_dict() if not name.endswith('num_batches_tracked')] == list(entries)
    missing, _ = model.load_state_dict({name: golden_value(name, *e) for name, e in entries.items()}, strict=False)
    assert all(name.endswith('num_batches_tracked') for name in missing)
    h, w = 4 * expected.shape[2], 4 * expected.shape[3]
    x = torch.from_numpy(np.random.RandomState(7).standard_normal((2, 3, h, w)).astype(np.float32))
    with torch.no_grad():
        single = model(x)
        exact = model.double()(x.double())
    # The softmax of these random non-local blocks (logits of size 10 and more) amplifies rounding: one ulp of noise in
    # the input moves the output by 1e-4. What float32 loses against float64 here is allowed to the original too.
    scale = expected.abs().max()
    rounding = ((single - exact).abs().max() / scale).item()
    error = ((exact - expected).abs().max() / scale).item()
    assert error < max(1e-5, 4 * rounding), f'{golden_key}: relative error {error:.1e}, float32 alone {rounding:.1e}'
    assert rounding < (1e-3 if '_nl_' in golden_key else 1e-5)


@pytest.fixture(scope='module')
def plain() -> PoseResNet:
    torch.manual_seed(0)
    return PoseResNet('resnet18').eval()


@pytest.mark.parametrize('after', SUBSETS, ids='+'.join)
@pytest.mark.parametrize('block', BLOCKS)
def test_blocks_are_identities_that_learn(plain, block, after):
    model = PoseResNet('resnet18', block=block, block_after=after)
    blocks = [i for i, m in enumerate(model.deconv_layers) if isinstance(m, BLOCKS[block])]
    names = [name for place in PLACES for name in ('deconv', 'bn', 'relu', *['block'] * (place in after))]
    assert blocks == [i for i, name in enumerate(names) if name == 'block']
    for name, part in plain.named_children():
        if name != 'deconv_layers':
            getattr(model, name).load_state_dict(part.state_dict())
    rest = [m for i, m in enumerate(model.deconv_layers) if i not in blocks]
    for part, source in zip(rest, plain.deconv_layers, strict=True):
        part.load_state_dict(source.state_dict())
    x = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain(x))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    (model.train()(x) - 1).square().mean().backward()
    optimizer.step()
    for i in blocks:
        moved = {name for name, p in model.named_parameters()
                 if name.startswith(f'deconv_layers.{i}.') and not torch.equal(p, before[name])}
        assert moved  # alpha, or the last BatchNorm
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize('arguments, message', [
    (dict(backbone='vgg16'), 'choose from resnet18, resnet34, resnet50, resnet101, resnet152'),
    (dict(block='FFT'), 'choose from fft, nl'),
    (dict(block='fft', block_after='deconv'), "block_after='deconv' is unknown"),
    (dict(block='fft', block_after=['deconv1', 'deconv0']), "block_after='deconv0' is unknown"),
    (dict(backbone='resnet18', weights='/no/such/file.pth'), "weights='/no/such/file.pth' is neither")])
def test_impossible_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        PoseResNet(**arguments)


@pytest.mark.parametrize('size', [(0, 0), (64, 90), (90, 64), (16, 64)])
def test_impossible_sizes(plain, size):
    with pytest.raises(ValueError, match='multiples of 32'):
        count_flops(plain, size)
    with pytest.raises(ValueError, match='multiples of 32'):
        plain(torch.zeros(1, 3, size[1], size[0]))

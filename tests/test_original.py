"""Checkpoints of the original against the original's outputs, and files that are none."""
import json
import os
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch

from srl_pose.pose.original import load_original
from srl_pose.pose.pose_net import BLOCKS, DECONVS, PoseResNet


def golden_value(name: str, shape: list[int], kind: str) -> torch.Tensor:
    "The value of one entry of an original checkpoint: seeded by its name, scaled by its kind."
    v = np.random.RandomState(crc32(name.encode()) & 0x7fffffff).standard_normal(shape).astype(np.float32)
    if kind == 'orth':
        return torch.linalg.qr(torch.from_numpy(v)).Q
    values = {'weight': lambda: v * np.sqrt(1.6 / np.prod(shape[1:])), 'bias': lambda: 0.1 * v,
              'running_mean': lambda: 0.1 * v, 'bn_weight': lambda: 1 + 0.2 * v, 'running_var': lambda: 0.5 + np.abs(v),
              'scalar': lambda: np.full(shape, 0.3)}
    return torch.from_numpy(np.asarray(values[kind](), dtype=np.float32))


def pytest_generate_tests(metafunc):
    "One test per golden case when the folder is at hand, else one that skips."
    if 'golden_key' in metafunc.fixturenames:
        file = Path(os.environ.get('SRL_POSE_EXTERNAL', ''), 'golden', 'pose_resnet_params.json')
        metafunc.parametrize('golden_key', list(json.loads(file.read_text())) if file.is_file() else ['all'])


def test_golden(external, golden_key):
    "A key such as 18_fft_110: depth, block, and after which transposed convolutions; the checkpoint says it, too."
    entries = json.loads((external / 'golden' / 'pose_resnet_params.json').read_text())[golden_key]
    expected = torch.from_numpy(np.load(external / 'golden' / 'pose_resnet.npz')[golden_key])
    h, w = 4 * expected.shape[2], 4 * expected.shape[3]
    state = {f'module.{name}': golden_value(name, *entry) for name, entry in entries.items()}
    loaded = load_original({'state_dict': state}, input_size=(w, h))
    assert (loaded.missing, loaded.unexpected, loaded.mismatched, loaded.color_order) == ((), (), (), 'BGR')
    model = loaded.model.train('train' in golden_key)
    depth, block, *places = golden_key.split('_')
    if block in BLOCKS and places and set(places[0]) <= {'0', '1'}:
        after = [place for place, digit in zip(DECONVS, places[0]) if digit == '1']
        like = PoseResNet(f'resnet{depth}', block=block, block_after=after, input_size=(w, h))
        assert like.state_dict().keys() <= model.state_dict().keys()
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
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return PoseResNet('resnet18', block='fft').state_dict()


def test_every_block_comes_back(tmp_path):
    for block in (block for block in BLOCKS if block != 'dct'):  # the original has no dct
        torch.manual_seed(0)
        source = PoseResNet('resnet18', block=block, block_after=['layer3', 'deconv2'], input_size=(64, 96)).eval()
        content = {f'module.{name}': t for name, t in source.state_dict().items()}
        torch.save({'state_dict': content}, tmp_path / 'file.tar')
        loaded = load_original(tmp_path / 'file.tar')
        assert (loaded.missing, loaded.unexpected, loaded.mismatched) == ((), (), ())
        x = torch.randn(1, 3, 96, 64)
        with torch.no_grad():
            assert torch.equal(loaded.model(x), source(x)), block


@pytest.mark.parametrize('make, message', [
    (lambda state: {}, 'holds no state dict'),
    (lambda state: {'conv1.weight': 1.0}, 'holds no state dict'),
    (lambda state: {name: t for name, t in state.items() if 'final' not in name}, 'no final_layer.weight'),
    (lambda state: {name: t for name, t in state.items() if 'layer3.1.bn1.weight' != name},
     r'layer3.1.bn1.weight is nothing in the checkpoint, \(256,\) in the network \(1 missing, 0 unexpected, 0 mism'),
    (lambda state: state | {'layer3.1.extra': torch.ones(3)}, r'layer3.1.extra is \(3,\) in the checkpoint, noth'),
    (lambda state: state | {'bn1.weight': torch.ones(3), 'layer2.0.bn1.bias': torch.ones(1)},
     r'bn1.weight is \(3,\) in the checkpoint, \(64,\) in the network \(0 missing, 0 unexpected, 2 mismatched'),
    (lambda state: state | {'layer4.2.conv1.weight': torch.ones(1)}, r'no ResNet has \(2, 2, 2, 3\) residual blocks'),
    (lambda state: state | {'layer3.nl0.bn.weight': torch.ones(1)}, 'are not blocks of one known kind')])
def test_bad_checkpoints(state, make, message):
    with pytest.raises(ValueError, match=message):
        load_original(make(state))


def test_nothing_is_half_loaded(state):
    model = PoseResNet('resnet18', block='fft')
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match='mismatched'):
        load_original(state | {'final_layer.bias': torch.ones(5)}, model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    partly = load_original(state | {'final_layer.bias': torch.ones(5)}, model, strict=False)
    assert partly.model is model and partly.mismatched == ('final_layer.bias',)
    assert torch.equal(model.conv1.weight, state['conv1.weight'])


def test_code_in_a_file_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / 'ran'),))
    torch.save({'state_dict': Evil()}, tmp_path / 'evil.pth')
    with pytest.raises(ValueError, match='not a readable checkpoint'):
        load_original(tmp_path / 'evil.pth')
    assert not (tmp_path / 'ran').exists()

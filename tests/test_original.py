"""Checkpoints of the original against the original's outputs, and files that are none."""
import json
import os
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from srl_pose.experiment.params import load_set
from srl_pose.pose.original import load_original
from srl_pose.pose.pose_net import BLOCKS, DECONVS, PLACES, PoseResNet
from srl_pose.testing import randomize_pose_net, read_upper
from srl_pose.training.checkpoint import CheckpointError, save_checkpoint
from srl_pose.training.start import load_start

PORTS = {'18_fft_111'}  # in pose_resnet.npz of a port with today's inverse; torch14_models.npz is of the released code


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
    if 'golden_case' in metafunc.fixturenames:
        folder = Path(os.environ.get('SRL_POSE_EXTERNAL', ''), 'golden')
        files = [file for file in ('pose_resnet', 'torch14_models') if (folder / f'{file}.npz').is_file()]
        cases = [(file, key) for file in files for key in np.load(folder / f'{file}.npz').files]
        metafunc.parametrize('golden_case', cases or ['all'], ids=str)


def test_golden(external, golden_case):
    "A key such as 18_fft_110: depth, block, and after which transposed convolutions; the checkpoint says it, too."
    (file, key), folder = golden_case, external / 'golden'
    entries = {k: v for name in ('pose_resnet', 'torch14') for k, v in json.loads((folder / f'{name}_params.json').read_text()).items()}[key]
    expected = torch.from_numpy(np.load(folder / f'{file}.npz')[key])
    h, w = 4 * expected.shape[2], 4 * expected.shape[3]
    state = {f'module.{name}': golden_value(name, *entry) for name, entry in entries.items()}
    port = file == 'pose_resnet' and key in PORTS
    loaded = load_original({'state_dict': state}, input_size=(w, h), **(dict(edges='average') if port else {}))
    assert (loaded.missing, loaded.unexpected, loaded.mismatched, loaded.color_order) == ((), (), (), 'BGR')
    model = loaded.model.train('train' in key)
    depth, block, *places = key.split('_')
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
    assert error < max(1e-5, 4 * rounding), f'{golden_case}: relative error {error:.1e}, float32 alone {rounding:.1e}'
    assert rounding < (1e-3 if '_nl_' in key else 1e-5)
    if '_nl_' not in key: assert (single - expected).abs().max() < 1e-5 * scale


def test_the_inverse_matters(external):
    "A network that takes the average has other heatmaps than the released code under PyTorch 1.4."
    state = {name: golden_value(name, *entry) for name, entry in
             json.loads((external / 'golden' / 'pose_resnet_params.json').read_text())['18_fft_111'].items()}
    expected = torch.from_numpy(np.load(external / 'golden' / 'torch14_models.npz')['18_fft_111'])
    x = torch.from_numpy(np.random.RandomState(7).standard_normal((2, 3, 96, 64)).astype(np.float32))
    with torch.no_grad(): y = load_original(state, edges='average').model(x)
    assert (y - expected).abs().max() > 0.05 * expected.abs().max()


def released(state: dict, x: torch.Tensor, strides: tuple[int, int], caffe: bool, train: bool) -> torch.Tensor:
    "The released network as one function of its state dict; its blocks are `fft` with PyTorch 1's inverse."
    def bn(x, name):
        mean, var, *affine = (state[f'{name}.{part}'] for part in ('running_mean', 'running_var', 'weight', 'bias'))
        return F.batch_norm(x, mean.clone(), var.clone(), *affine, training=train)

    def conv(x, name, stride=1): return F.conv2d(x, state[f'{name}.weight'], stride=stride, padding=state[f'{name}.weight'].shape[-1] // 2)

    def fft(x, name):
        weight, (h, w) = state[f'{name}.conv_layer.weight'], x.shape[-2:]
        z = torch.view_as_real(torch.fft.rfft2(x)).permute(0, 1, 4, 2, 3).flatten(1, 2)
        z = bn(F.conv2d(z, weight, state[f'{name}.conv_layer.bias'], groups=len(weight) // weight.shape[1]), f'{name}.bn')
        if f'{name}.relu.weight' in state: z = z * state[f'{name}.relu.weight'] + state[f'{name}.relu.bias']
        z = torch.view_as_complex(z.relu().unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2).contiguous())
        return x + state[f'{name}.alpha'] * torch.fft.irfft2(read_upper(z, w), s=(h, w))

    def residual(x, name, s):
        if f'{name}.conv3.weight' in state: steps = ('1', s if caffe else 1), ('2', 1 if caffe else s), ('3', 1)
        else: steps = ('1', s), ('2', 1)
        y = x
        for i, stride in steps: y = bn(conv(y if i == '1' else y.relu(), f'{name}.conv{i}', stride), f'{name}.bn{i}')
        if f'{name}.downsample.0.weight' in state: x = bn(conv(x, f'{name}.downsample.0', s), f'{name}.downsample.1')
        return (x + y).relu()

    x = F.max_pool2d(bn(conv(x, 'conv1', 2), 'bn1').relu(), 3, 2, 1)
    for layer, stride in zip((1, 2, 3, 4), (1, 2, *strides)):
        for j in range(sum(f'layer{layer}.{j}.conv1.weight' in state for j in range(40))):
            x = residual(x, f'layer{layer}.{j}', 1 if j else stride)
            if f'layer{layer}.nl{j}.alpha' in state: x = fft(x, f'layer{layer}.nl{j}')
    n = 0
    while f'deconv_layers.{n}.weight' in state:
        x = bn(F.conv_transpose2d(x, state[f'deconv_layers.{n}.weight'], stride=2, padding=1), f'deconv_layers.{n + 1}').relu()
        if f'deconv_layers.{(n := n + 3)}.alpha' in state:
            x, n = fft(x, f'deconv_layers.{n}'), n + 1
    return F.conv2d(x, state['final_layer.weight'], state['final_layer.bias'])


KINDS = {'alpha': 'scalar', 'running_mean': 'running_mean', 'running_var': 'running_var', 'bias': 'bias'}
ENCODER = ('layer2/2', 'layer3/2', 'layer4/2')


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('backbone, places, spectral_relu, strides, deconvs, caffe, size', [
    ('resnet18', ENCODER, False, (2, 2), 3, False, (64, 96)), ('resnet18', (*ENCODER, 'deconv1'), True, (1, 1), 1, False, (96, 64)),
    ('resnet50', ('layer3/2', 'deconv2'), False, (2, 2), 3, True, (64, 64)), ('resnet18', ('layer3', 'deconv2'), True, (2, 1), 2, False, (96, 160)),
    ('resnet34', ('layer4', 'deconv1'), False, (1, 2), 2, False, (64, 32)), ('resnet18', DECONVS, True, (1, 1), 3, False, (32, 64)),
    ('resnet18', ('deconv1',), False, (2, 2), 1, False, (128, 96))], ids=str)
def test_every_geometry(backbone, places, spectral_relu, strides, deconvs, caffe, size, train):
    "What the original's options could be, from a state dict alone, against the same network written as a function."
    with torch.device('meta'):
        shapes = {name: list(t.shape) for name, t in PoseResNet(
            backbone, block='fft', block_after=places, block_options=dict(spectral_relu=spectral_relu), strides=strides, deconvs=deconvs,
            input_size=size).state_dict().items() if 'num_batches' not in name}
    def kind(name): return KINDS.get(name.rpartition('.')[2], 'bn_weight' if len(shapes[name]) in (1, 2) else 'weight')
    state = {name: golden_value(name, shape, kind(name)) for name, shape in shapes.items()}
    loaded = load_original(state, strides=strides, caffe=caffe, **(dict(input_size=size) if spectral_relu else {}))
    reasons = {line.name: line.reason.partition(':')[0] for line in loaded.report.unsaid}
    assert (reasons['strides'], reasons['edges'], reasons['norm']) == ('given', 'assumed', 'assumed')
    assert ('caffe' in reasons, reasons.get('caffe', 'given')) == (backbone == 'resnet50', 'given')
    x = torch.randn(2, 3, *size[::-1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = loaded.model.double().train(train)(x)
        expected = released({name: t.double() for name, t in state.items()}, x, strides, caffe, train)
    stride = 8 * strides[0] * strides[1] // 2 ** deconvs
    assert y.shape == (2, 17, size[1] // stride, size[0] // stride) and loaded.model.stride == stride
    assert (y - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize('said, message', [
    (dict(strides=(1, 1)), r'strides=\(1, 1\), input_size=None: the matrices of layer3.nl1 fit no multiple of 32, the'),
    (dict(input_size=(96, 96)), r'strides=\(2, 2\), input_size=96×96: the matrices of .* fit 96×64 \(height × width\)'),
    (dict(strides=(2, 4)), 'strides=.* must be those of layer3 and layer4'), (dict(edges='lower'), 'choose from average, upper, pytorch1'),
    (dict(norm='forward'), 'choose from backward, ortho'), (dict(caffe=True), 'caffe=True moves the stride of bottlenecks'),
    (dict(dilate=True), 'dilate=True makes up for strides')])
def test_what_is_said_must_fit(said, message):
    options = dict(block='fft', block_after=['layer3', 'deconv2'], block_options=dict(spectral_relu=True))
    state = PoseResNet('resnet18', input_size=(64, 96), **options).state_dict()
    assert load_original(state, color_order='BGR').report.recognised[-1].value == '96×64'
    with pytest.raises(ValueError, match=message):
        load_original(state, color_order='BGR', **said)


@pytest.fixture(scope='module')
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return PoseResNet('resnet18', block='fft').state_dict()


def test_every_block_comes_back(tmp_path):
    for block in (block for block in BLOCKS if block not in ('dct', 'local')):  # the original has no dct and no control
        torch.manual_seed(0)
        source = PoseResNet('resnet18', block=block, block_after=['layer3', 'deconv2'], input_size=(64, 96)).eval()
        content = {f'module.{name}': t for name, t in source.state_dict().items()}
        torch.save({'state_dict': content}, tmp_path / 'file.tar')
        loaded = load_original(tmp_path / 'file.tar', edges='average', color_order='RGB')
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
        load_original(make(state), color_order='BGR')


def test_nothing_is_half_loaded(state):
    model = PoseResNet('resnet18', block='fft')
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match='mismatched'):
        load_original(state | {'final_layer.bias': torch.ones(5)}, model, color_order='BGR')
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    partly = load_original(state | {'final_layer.bias': torch.ones(5)}, model, color_order='BGR', strict=False)
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


@pytest.fixture(scope='module')
def baselines(tmp_path_factory):
    "A trained network without blocks, as a checkpoint of ours and as somebody else's; an image, and what they make of it"
    folder, network = tmp_path_factory.mktemp('baselines'), randomize_pose_net(PoseResNet('resnet18'), (64, 96))
    experiment = load_set('sample')['none']
    save_checkpoint(folder / 'ours.pt', network, experiment, {})
    torch.save({'state_dict': {f'module.{name}': t for name, t in network.state_dict().items()}}, folder / 'theirs.pth')
    x = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): return x, {folder / 'ours.pt': network(x), folder / 'theirs.pth': network(x.flip(1))}  # theirs has learned BGR


@pytest.mark.parametrize('block', BLOCKS)
def test_a_baseline_starts_a_network_with_blocks(baselines, block):
    "Every block at every place, with the same outputs before any training."
    x, expected = baselines
    options = dict(alpha=True) if block == 'lo' else {}  # as released it is no identity at initialisation
    for place in (*PLACES, DECONVS, ('layer2/2', 'deconv2')):
        network, said = PoseResNet('resnet18', block=block, block_after=place, block_options=options, input_size=(64, 96)).eval(), []
        for file, heatmaps in expected.items():
            load_start(network, file, color_order=None if file.suffix == '.pt' else 'BGR', say=said.append)
            with torch.no_grad(): found = network(x)
            torch.testing.assert_close(found, heatmaps, rtol=0, atol=0 if file.suffix == '.pt' else 1e-5 * heatmaps.abs().max().item())
            assert 'tensors start new' in said[-1]


def test_blocks_are_found_at_other_numbers(baselines, tmp_path):
    "One block of a checkpoint, and two in the network; and a checkpoint's block that the network has not is refused."
    x, one = baselines[0], randomize_pose_net(PoseResNet('resnet18', block='fft', block_after='deconv2'), (64, 96))
    save_checkpoint(tmp_path / 'one.pt', one, load_set('sample')['fft'], {})
    several = PoseResNet('resnet18', block='fft', block_after=['layer3', 'deconv1', 'deconv2']).eval()
    load_start(several, tmp_path / 'one.pt', say=lambda text: None)
    with torch.no_grad(): assert torch.equal(several(x), one(x))
    with pytest.raises(CheckpointError, match=r'deconv_layers.6.alpha \(block of deconv2\) has no place in this network'):
        load_start(PoseResNet('resnet18', block='fft', block_after='deconv1'), tmp_path / 'one.pt', say=lambda text: None)

"""Every block at every place, every variant of the backbone, and what is refused."""
from itertools import combinations

import pytest
import torch
from torch import nn

from srl_pose.blocks.base import TransformBlock
from srl_pose.pose.backbone import LAYERS
from srl_pose.pose.pose_net import BLOCKS, DECONVS, PoseResNet, copy_all_but_blocks
from srl_pose.testing import randomize_pose_net

SIZE = (32, 64)  # (w, h)
OPTIONS = {'lo': {'alpha': True}}  # as released, lo is no identity at initialisation
DECONVOLUTIONS = [places for n in range(1, 4) for places in combinations(DECONVS, n)]
BACKBONE = [*((layer,) for layer in LAYERS), tuple(f'{layer}/2' for layer in LAYERS), ('layer3/1',),
            ('layer2/2', 'layer4', 'deconv2')]


def blocks_of(model: PoseResNet) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, tuple(BLOCKS.values()))}


def check_step(model: PoseResNet, x: torch.Tensor) -> None:
    "One step of training moves every block, and the loss stays a number."
    before = {name: [p.detach().clone() for p in block.parameters()] for name, block in blocks_of(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = (model.train()(x) - 1).square().mean()
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss) and torch.isfinite(model.conv1.weight).all()
    for name, block in blocks_of(model).items():
        assert not all(torch.equal(p, old) for p, old in zip(block.parameters(), before[name])), name


@pytest.fixture(scope='module')
def plain() -> PoseResNet:
    torch.manual_seed(0)
    return PoseResNet('resnet18').eval()


@pytest.mark.parametrize('after', [*DECONVOLUTIONS, *BACKBONE], ids='+'.join)
@pytest.mark.parametrize('block', BLOCKS)
def test_blocks_are_identities_that_learn(plain, block, after):
    model = PoseResNet('resnet18', block=block, block_after=after, block_options=OPTIONS.get(block), input_size=SIZE)
    copy_all_but_blocks(plain, model)
    x = torch.randn(2, 3, SIZE[1], SIZE[0])
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain(x))
    check_step(model, x)


@pytest.mark.parametrize('variant', [dict(downsample=False), dict(downsample=False, dilate=True)], ids=str)
@pytest.mark.parametrize('block', BLOCKS)
def test_backbones_that_keep_their_resolution(block, variant):
    torch.manual_seed(0)
    places = ['layer2', 'layer3', 'layer4', 'deconv1']
    model = PoseResNet('resnet18', block=block, block_after=places, block_options=OPTIONS.get(block), input_size=SIZE,
                       num_keypoints=3, **variant)
    assert list(blocks_of(model)) == ['layer2.nl1', 'layer3.nl1', 'layer4.nl1', 'deconv_layers.3']
    x = torch.randn(2, 3, 64, 32)
    without = PoseResNet('resnet18', num_keypoints=3, **variant).eval()
    copy_all_but_blocks(without, model)
    with torch.no_grad():
        y = model.eval()(x)
        assert y.shape == (2, 3, 16, 8)
        assert torch.equal(y, without(x))
    check_step(model, x)


@pytest.mark.parametrize('strides, deconvs', [((2, 1), None), ((1, 2), None), ((2, 2), 2), ((2, 1), 3), ((1, 1), 3)], ids=str)
@pytest.mark.parametrize('block', BLOCKS)
def test_strides_apart_from_deconvolutions(block, strides, deconvs):
    torch.manual_seed(0)
    variant = dict(strides=strides, deconvs=deconvs, num_keypoints=3)
    model = PoseResNet('resnet18', block=block, block_after=['layer3', 'layer4', 'deconv1', 'deconv2'], block_options=OPTIONS.get(block),
                       input_size=SIZE, **variant)
    without = PoseResNet('resnet18', **variant).eval()
    copy_all_but_blocks(without, model)
    x = torch.randn(2, 3, SIZE[1], SIZE[0])
    with torch.no_grad():
        y = model.eval()(x)
        assert y.shape == (2, 3, SIZE[1] // model.stride, SIZE[0] // model.stride)
        assert model.stride == (4 if deconvs is None else 8 * strides[0] * strides[1] // 2 ** deconvs)
        assert torch.equal(y, without(x))
    check_step(model, x)


def test_lo_as_released_is_no_identity(plain):
    model = PoseResNet('resnet18', block='lo', input_size=SIZE).eval()
    copy_all_but_blocks(plain, model)
    x = torch.randn(1, 3, SIZE[1], SIZE[0])
    with torch.no_grad():
        assert not torch.allclose(model(x), plain(x))


@pytest.mark.parametrize('backbone, layer, positions', [
    ('resnet34', 'layer3/2', [1, 3, 5]), ('resnet50', 'layer2/2', [1, 3]), ('resnet50', 'layer4/2', [1]),
    ('resnet101', 'layer3/2', list(range(1, 23, 2))), ('resnet101', 'layer3', [22]),
    ('resnet152', 'layer2/2', [1, 3, 5, 7]), ('resnet152', 'layer3/2', list(range(1, 36, 2))),
    ('resnet152', 'layer3/12', [11, 23, 35])])
def test_every_second_residual_block(backbone, layer, positions):
    with torch.device('meta'):
        model = PoseResNet(backbone, block='fft', block_after=layer)
    name = layer.partition('/')[0]
    assert list(blocks_of(model)) == [f'{name}.nl{i}' for i in positions]


def test_caffe_style_takes_the_stride_first():
    torch.manual_seed(0)
    usual, caffe = PoseResNet('resnet50').eval(), PoseResNet('resnet50', caffe=True).eval()
    caffe.load_state_dict(usual.state_dict())
    assert (caffe.layer2[0].conv1.stride, caffe.layer2[0].conv2.stride) == ((2, 2), (1, 1))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert caffe(x).shape == usual(x).shape == (1, 17, 16, 16)
        assert not torch.allclose(caffe(x), usual(x))


@pytest.mark.parametrize('arguments, message', [
    (dict(backbone='vgg16'), 'choose from resnet18, resnet34, resnet50, resnet101, resnet152'),
    (dict(block='FFT'), 'choose from fft, lo, dct, nl'),
    (dict(block='fft', block_after='deconv'), "block_after='deconv' is unknown"),
    (dict(block='fft', block_after=['deconv1', 'deconv0']), "block_after='deconv0' is unknown"),
    (dict(block='fft', block_after=['layer1']), "block_after='layer1' is unknown: choose from deconv1"),
    (dict(block='fft', block_after=['layer2', 'layer2']), 'there is a block after number 2 of layer2 already'),
    (dict(block='fft', block_after=['layer2', 'layer2/2']), 'there is a block after number 2 of layer2 already'),
    (dict(block='fft', block_after=['deconv2', 'deconv2']), 'there is a block after number 2 of deconv already'),
    (dict(block='fft', block_after=['layer4/3']), 'has only 2 residual blocks in layer4'),
    (dict(block='fft', block_after=['deconv3'], downsample=False), 'has only 1 transposed convolutions'),
    (dict(block='fft', block_after='layer2', block_options={'groups': 3}), 'in layer2, 128 channels.*groups=3'),
    (dict(block='fft', block_options={'group': 8}), "fft has no option 'group', only groups"),
    (dict(block='nl', block_options={'size': (3, 4)}), "nl has no option 'size'"),
    (dict(block_options={'groups': 8}), 'without a block'),
    (dict(block='lo'), 'input_size=None: .*needs'),
    (dict(block='dct', block_options={'spectral_relu': True}), 'input_size=None: .*needs'),
    (dict(block='lo', input_size=(64, 70)), 'two positive multiples of 32'),
    (dict(dilate=True), 'needs downsample=False'),
    (dict(dilate=True, strides=(2, 2)), 'or strides with a 1'),
    (dict(strides=(1, 2), downsample=False), 'say one of them'),
    (dict(strides=(2, 3)), 'each 1 or 2, such as'),
    (dict(deconvs=4), 'deconvs=4 must be 1, 2 or 3'),
    (dict(block='fft', block_after=['deconv2'], strides=(2, 2), deconvs=1), 'has only 1 transposed convolutions'),
    (dict(block='fft', block_options={'edges': 'lower'}), "edges='lower' is unknown: choose from average, upper, pytorch1"),
    (dict(block='fft', block_options={'norm': 1}), 'norm of fft is 1, must be a word'),
    (dict(block='fft', block_options={'groups': '8'}), "groups of fft is '8', must be a whole number"),
    (dict(caffe=True), 'only resnet50, resnet101 and resnet152'),
    (dict(weights='/no/such/file.pth'), "weights='/no/such/file.pth' is neither")])
def test_impossible_configurations(arguments, message):
    with torch.device('meta'), pytest.raises(ValueError, match=message):
        PoseResNet(**{'backbone': 'resnet18'} | arguments)


@pytest.mark.parametrize('size', [(0, 0), (64, 90), (90, 64), (16, 64)])
def test_impossible_sizes(plain, size):
    with pytest.raises(ValueError, match='multiples of 32'):
        plain(torch.zeros(1, 3, size[1], size[0]))


def test_sized_blocks_refuse_other_sizes():
    model = PoseResNet('resnet18', block='lo', input_size=(32, 64))
    with pytest.raises(ValueError, match='was built for'):
        model(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('block', [None, *BLOCKS])
def test_a_network_in_half_precision(block, dtype):
    "With any block it gives, learns and stays near the same network in float32; the spectral ones keep their numbers."
    model = randomize_pose_net(PoseResNet('resnet18', block=block, input_size=SIZE), SIZE).requires_grad_(True)
    x = torch.randn(2, 3, *SIZE[::-1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): exact = model(x)
    kept = {name: t.clone() for name, m in model.named_modules() if isinstance(m, TransformBlock) for name, t in m.named_parameters(name)}
    reduced = model.to(dtype)
    found = reduced(x.to(dtype))
    assert found.dtype == dtype and (found.float() - exact).abs().max() < .06 * exact.abs().max()
    assert all(torch.equal(t, dict(reduced.named_parameters())[name]) for name, t in kept.items())
    reduced.train()(x.to(dtype)).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in reduced.parameters())

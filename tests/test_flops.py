"""Tables 2 and 3 of the paper, parameters and GFLOPs, to the printed digit."""
import math

import pytest
import torch

from srl_pose.pose.flops import count_flops, count_params, published_gflops
from srl_pose.pose.pose_net import BLOCKS, PoseResNet
from srl_pose.results.published import PAPER

TABLE_2 = [p for p in PAPER if 2 in p.tables]
TABLE_3 = [  # ResNet-50, three blocks: extra GFLOPs at 256x192 and at 384x288, extra million parameters
    ('nl', 2.90, 13.26, 0.39), ('a2', 0.28, 0.62, 0.20), ('cgnl', 0.39, 0.88, 0.31), ('cc', 1.20, 2.76, 0.92),
    ('fft', 0.09, 0.20, 0.10)]
# printed figures that are our count rounded up to the next hundredth, not to the nearest
ROUNDED_UP = {('resnet50', 'none', 512), ('resnet101', 'none', 512), ('resnet50', 'nl', 256), ('resnet50', 'nl', 384)}


def build(backbone='resnet50', block=None, **options) -> PoseResNet:
    with torch.device('meta'):
        return PoseResNet(backbone, block=None if block == 'none' else block, **options)


def assert_printed(count: float, printed: float, up: bool) -> None:
    if up:
        assert round(count, 2) != printed and math.ceil(100 * count) / 100 == printed
    else:
        assert round(count, 2) == printed


def test_table_2_is_complete():
    assert len(TABLE_2) == 18


@pytest.mark.parametrize('row', TABLE_2, ids=lambda p: f'{p.network[0]}-{p.network[1][1]}-{p.network[3]}')
def test_table_2(row):
    backbone, size, _, block, _ = row.network
    model = build(backbone, block)
    assert_printed(published_gflops(model, size), row.gflops, (backbone, block, size[1]) in ROUNDED_UP)
    assert round(count_params(model) / 1e6, 2) == row.mparams


@pytest.mark.parametrize('block, small, large, mparams', TABLE_3, ids=[row[0] for row in TABLE_3])
def test_table_3(block, small, large, mparams):
    base, model = build(), build(block=block)
    for size, printed in (((192, 256), small), ((288, 384), large)):
        extra = published_gflops(model, size) - published_gflops(base, size)
        assert_printed(extra, printed, ('resnet50', block, size[1]) in ROUNDED_UP)
    # Table 3 counts the weights of convolutions alone, and two attentions for cc
    counted = build(block=block, block_options={'shared': False}) if block == 'cc' else model
    weights = [sum(p.numel() for p in m.parameters() if p.ndim > 1) for m in (counted, base)]
    assert round((weights[0] - weights[1]) / 1e6, 2) == mparams


@pytest.mark.parametrize('block', BLOCKS)
def test_counting_works_everywhere(block):
    size = (96, 64)
    plain = build('resnet18')
    for place in ('layer2/2', 'layer4', 'deconv3'):
        model = build('resnet18', block, block_after=place, input_size=size)
        assert count_flops(model, size) > count_flops(plain, size)
        assert published_gflops(model, size) > published_gflops(plain, size)


def test_the_model_is_left_alone():
    model = PoseResNet('resnet18', block='fft')
    before = {name: t.clone() for name, t in model.state_dict().items()}
    hooks = [len(m._forward_hooks) for m in model.modules()]
    published_gflops(model, (64, 64))
    with pytest.raises(ValueError, match='multiples of 32'):
        published_gflops(model, (64, 60))
    assert model.training and hooks == [len(m._forward_hooks) for m in model.modules()]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())

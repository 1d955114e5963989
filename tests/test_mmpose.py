"""Files as mmpose's trainers write them, against the same network put together from torchvision and torch."""
import argparse
import os
import re
import shlex
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import get_model

from srl_pose.data.coco import MEAN, STD
from srl_pose.evaluation.predict import pose_heatmaps
from srl_pose.pose.mmpose import IMAGENET
from srl_pose.pose.layout import Unsaid
from srl_pose.pose.original import load_original
from srl_pose.pose.weight_files import KEEP
from srl_pose.pose.pose_net import PoseResNet
from srl_pose.testing import log_buffers
from srl_pose.training.checkpoint import CheckpointError
from srl_pose.training.start import load_start
from srl_pose.use.predict import predict_crops
from srl_pose.use.predictor import Predictor

ONE = """codec = dict(
    heatmap_size=(
        16,
        24,
    ), input_size=(
        64,
        96,
    ), sigma=2, type='MSRAHeatmap')
default_hooks = dict(
    checkpoint=dict(interval=10, rule='greater', save_best='coco/AP', type='CheckpointHook'))
model = dict(
    backbone=dict(depth=18, init_cfg=dict(checkpoint='torchvision://resnet18', type='Pretrained'), type='ResNet'),
    data_preprocessor=dict(
        bgr_to_rgb=True, mean=[
            123.675,
            116.28,
            103.53,
        ], std=[
            58.395,
            57.12,
            57.375,
        ], type='PoseDataPreprocessor'),
    head=dict(
        decoder=dict(
            heatmap_size=(
                16,
                24,
            ), input_size=(
                64,
                96,
            ), sigma=2, type='MSRAHeatmap'),
        in_channels=512, loss=dict(type='KeypointMSELoss', use_target_weight=True), out_channels=17, type='HeatmapHead'),
    test_cfg=dict(flip_mode='heatmap', flip_test=True, shift_heatmap=True),
    type='TopdownPoseEstimator')
optim_wrapper = dict(optimizer=dict(lr=0.0005, type='Adam'))
work_dir = 'work'
"""
ZERO = """checkpoint_config = dict(interval=10)
channel_cfg = dict(num_output_channels=17, dataset_joints=17, dataset_channel=[[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]])
model = dict(
    type='TopDown',
    pretrained='torchvision://resnet18',
    backbone=dict(type='ResNet', depth=18),
    keypoint_head=dict(type='TopdownHeatmapSimpleHead', in_channels=512, out_channels=17, loss_keypoint=dict(type='JointsMSELoss', use_target_weight=True)),
    train_cfg=dict(),
    test_cfg=dict(flip_test=True, post_process='default', shift_heatmap=True, modulate_kernel=11))
data_cfg = dict(image_size=[64, 96], heatmap_size=[16, 24], num_output_channels=17, num_joints=17, soft_nms=False, nms_thr=1.0, oks_thr=0.9)
val_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TopDownAffine'),
    dict(type='ToTensor'),
    dict(type='NormalizeTensor', mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    dict(type='Collect', keys=['img'], meta_keys=['image_file', 'center', 'scale', 'rotation', 'bbox_score', 'flip_pairs'])
]
"""
SIZE = (64, 96)


class Head(nn.Module):
    def __init__(self, channels):
        super().__init__()
        steps = [(nn.ConvTranspose2d(c, 256, 4, 2, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU()) for c in (channels, 256, 256)]
        self.deconv_layers = nn.Sequential(*(part for step in steps for part in step))
        self.final_layer = nn.Conv2d(256, 17, 1)


class TopDown(nn.Module):
    "A heatmap ResNet with mmpose's names, of which version 0 and 1 have another for the head"

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.where = get_model(backbone, weights=None), head
        self.add_module(head, Head(self.backbone.fc.in_features))
        del self.backbone.fc
        rng = torch.Generator().manual_seed(0)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                for t, low, high in ((m.weight, .5, 1.5), (m.bias, -.2, .2), (m.running_mean, -.2, .2), (m.running_var, .5, 1.5)): nn.init.uniform_(t, low, high, generator=rng)
            elif isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)): nn.init.normal_(m.weight, std=(1.6 / m.weight[0].numel()) ** .5, generator=rng)
        nn.init.normal_(getattr(self, head).final_layer.bias, std=.1, generator=rng)
        self.eval().requires_grad_(False)

    def forward(self, x):
        b, head = self.backbone, getattr(self, self.where)
        x = b.layer4(b.layer3(b.layer2(b.layer1(b.maxpool(b.relu(b.bn1(b.conv1(x))))))))
        return head.final_layer(head.deconv_layers(x))


def save_1(path, state, config=ONE, ema=None, extra=None):
    "As mmengine's Runner saves in training; the log's objects are pickled to the byte as its own"
    meta = dict(epoch=210, iter=49140, cfg=config, seed=950579474, experiment_name='td-hm_res18_20261127_150918', time='20261127_150921', mmengine_version='0.10.7',
                dataset_meta=dict(dataset_name='coco', classes=('person',), sigmas=np.array([.026, .025]), keypoint_colors=np.zeros((17, 3), np.uint8)))
    with log_buffers() as HistoryBuffer:
        log = OrderedDict((name, HistoryBuffer(.5, .25)) for name in ('train/lr', 'train/loss_kpt', 'val/coco/AP'))
        runtime = OrderedDict(cfg=config, loop_stage='val', epoch=209, eta=np.float64(0.), best_score=np.float64(.718), best_ckpt='work/best_coco_AP_epoch_210.pth')
        hub = dict(log_scalars=log, runtime_info=runtime, resumed_keys=OrderedDict(cfg=True))
        content = dict(meta=meta, state_dict=state, message_hub=hub, optimizer=dict(state={0: dict(step=torch.tensor(2.))}, param_groups=[dict(lr=5e-4, betas=(.9, .999))]),
                       param_schedulers=[dict(milestones=Counter({170: 1, 200: 1}), gamma=.1, base_values=[5e-4])])
        if ema is not None: content['ema_state_dict'] = ema
        torch.save(content | (extra or {}), path)
    return path


def save_0(path, state, config=ZERO):
    "As mmcv's runner saves"
    meta = dict(env_info='sys.platform: linux', seed=0, mmpose_version='0.29.0', config=config, epoch=210, iter=49140, mmcv_version='1.6.0', time='Sat Nov 28',
                hook_msgs=dict(best_score=np.float64(.718), best_ckpt='best.pth'))
    torch.save(dict(meta=meta, state_dict=state, optimizer=dict(state={}, param_groups=[])), path)
    return path


@pytest.fixture(scope='module', params=['head', 'keypoint_head'])
def theirs(request): return TopDown('resnet18', request.param)


def save(path, theirs, change=lambda text: text):
    if theirs.where == 'head': return save_1(path, theirs.state_dict(), change(ONE))
    return save_0(path, theirs.state_dict(), change(ZERO))


def same(found, expected): torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def images(): return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 96, 64), dtype=np.uint8))


def test_a_training_state_gives_the_same_keypoints(theirs, tmp_path):
    "Heatmaps, and keypoints read as mmpose reads them, from pixels to pixels; all that is said comes from the file."
    said = []
    predictor = Predictor.load(save(tmp_path / 'epoch_210.pth', theirs), say=said.append, device='cpu')
    assert (predictor.input_size, predictor.color_order, predictor.heatmaps.decoder) == (SIZE, 'RGB', 'quarter')
    report = said[0]
    assert f'mmpose {"1.x" if theirs.where == "head" else "0.x"}' in report and report.count('its configuration') >= 5, report
    x = images()
    mean, std = (torch.tensor(v)[:, None, None] for v in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    expected = theirs((x - mean) / std)
    loaded = load_original(tmp_path / 'epoch_210.pth').model
    with torch.no_grad(): found = loaded((x - mean) / std)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    for maps, keypoints in zip(expected.numpy(), predict_crops(predictor, list(x.numpy()), flip_test=False)):
        for heatmap, (px, py, score) in zip(maps, keypoints):
            y, x0 = np.unravel_index(heatmap.argmax(), heatmap.shape)
            place = np.array([x0, y], float)
            if 1 < x0 < 15 and 1 < y < 23: place += .25 * np.sign([heatmap[y, x0 + 1] - heatmap[y, x0 - 1], heatmap[y + 1, x0] - heatmap[y - 1, x0]])
            np.testing.assert_allclose((px, py, score), (*4 * place, heatmap.max()), rtol=1e-4)


def test_averaged_weights_are_those_in_state_dict(tmp_path):
    "mmengine exchanges both at saving; version 0 saves the others as buffers named ema_…"
    averaged, one, zero = TopDown('resnet18', 'head'), TopDown('resnet18', 'head').state_dict(), TopDown('resnet18', 'keypoint_head').state_dict()
    other = {f'module.{name}': t + 1 for name, t in one.items()} | dict(steps=torch.tensor(9))
    buffers = {f'ema_{name.replace(".", "_")}': t + 1 for name, t in zero.items() if t.is_floating_point()}
    x = torch.randn(1, 3, 96, 64)
    for path in (save_1(tmp_path / 'a.pth', one, ema=other), save_0(tmp_path / 'b.pth', zero | buffers)):
        with torch.no_grad(): torch.testing.assert_close(load_original(path).model(x), averaged(x))
    torch.save(dict(ema_state_dict={f'module.{name}': t for name, t in one.items()} | dict(steps=torch.tensor(9))), tmp_path / 'c.pth')
    loaded = load_original(tmp_path / 'c.pth')
    with torch.no_grad(): torch.testing.assert_close(loaded.model(x), averaged(x))
    assert 'ema_state_dict, module., 1 tensors left out, the first is steps' in str(loaded.report)


def test_pixels_beside_the_network_are_no_weights(theirs, tmp_path):
    beside = {'data_preprocessor.mean': torch.tensor([123.675, 116.28, 103.53])[:, None, None], 'data_preprocessor.std': torch.tensor([58.395, 57.12, 57.375])[:, None, None]}
    loaded = load_original(dict(state_dict=theirs.state_dict() | beside))
    assert (loaded.color_order, loaded.unexpected, loaded.input_size) == ('RGB', (), None)
    with pytest.raises(ValueError, match=r'images were normalised by \(0.485, 0.456, 0.406\) and \(1.000, 1.000, 1.000\)'):
        load_original(dict(state_dict=theirs.state_dict() | beside | {'data_preprocessor.std': torch.full((3, 1, 1), 255.)}))


@pytest.mark.parametrize('one, zero, decoder', [
    ("type='MSRAHeatmap'", "post_process='default'", 'quarter'), ("type='MSRAHeatmap', unbiased=True", "post_process='unbiased'", 'dark'),
    ("type='UDPHeatmap'", "post_process='default', use_udp=True", 'udp'), ("type='MegviiHeatmap'", "post_process='megvii'", None),
    ("type='UDPHeatmap', heatmap_type='combined'", "use_udp=True, target_type='CombinedTarget'", None)])
def test_decoders(theirs, tmp_path, one, zero, decoder):
    path = save(tmp_path / 'a.pth', theirs, lambda text: text.replace("type='MSRAHeatmap'", one).replace("post_process='default'", zero))
    options = dict(say=lambda text: None, device='cpu')
    if decoder: assert Predictor.load(path, **options).heatmaps.decoder == decoder
    else:
        with pytest.raises(CheckpointError, match='a.pth: decoder: its configuration says .*, which nothing here reads: say the closest of quarter'): Predictor.load(path, **options)
    assert Predictor.load(path, decoder='none', **options).heatmaps.decoder == 'none'


@pytest.mark.parametrize('shift', [True, False])
def test_the_mirrored_image_is_averaged_as_the_configuration_says(theirs, tmp_path, shift):
    "With its maps shifted by a cell or not, as mmpose does: in prediction and in a measurement."
    path = save(tmp_path / 'a.pth', theirs, lambda text: text.replace('shift_heatmap=True', f'shift_heatmap={shift}'))
    predictor, x = Predictor.load(path, say=lambda text: None, device='cpu'), images()
    assert predictor.heatmaps.flip_shift == shift
    mean, std = (torch.tensor(v)[:, None, None] for v in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    x = (x - mean) / std
    order = [0, *(i for pair in range(1, 17, 2) for i in (pair + 1, pair))]
    mirrored = theirs(x.flip(-1)).flip(-1)[:, order]
    if shift: mirrored[..., 1:] = mirrored[..., :-1].clone()
    with torch.no_grad(): found = pose_heatmaps(predictor.model, x, predictor.heatmaps, predictor.keypoint_set)
    same(found, (theirs(x) + mirrored) / 2)


def test_what_no_configuration_says_is_assumed(theirs, tmp_path):
    "The name has the size; and where it has not, it must be said."
    text = 'res18_coco.py\n_base_ = []'  # old files hold the name of the configuration before it
    path = save(tmp_path / 'res18_coco_96x64-ec54d7f3_20200709.pth', theirs, lambda _: text)
    loaded = load_original(path)
    assert (loaded.input_size, loaded.color_order, loaded.decoder) == (SIZE, 'RGB', 'quarter')
    assert {line.name: line.reason.partition(':')[0] for line in loaded.report.unsaid} == dict.fromkeys(('strides', 'color_order', 'decoder', 'input_size'), 'assumed')
    with pytest.raises(CheckpointError, match='input_size: holds weights only'): Predictor.load(save(tmp_path / 'best.pth', theirs, lambda _: text), say=lambda text: None)


def test_colours_are_as_the_configuration_says(theirs, tmp_path):
    "Without bgr_to_rgb, or with channel_order, a network of mmpose sees BGR; fine-tuning turns its first convolution."
    path = save(tmp_path / 'bgr.pth', theirs, lambda text: text.replace('bgr_to_rgb=True', 'bgr_to_rgb=False').replace("'LoadImageFromFile'", "'LoadImageFromFile', channel_order='bgr'"))
    assert load_original(path).color_order == 'BGR'
    x, network = torch.randn(1, 3, 96, 64), PoseResNet('resnet18')
    load_start(network, path, say=lambda text: None)
    with torch.no_grad(): same(network.eval()(x), theirs(x.flip(1)))


@pytest.mark.parametrize('block', [None, 'fft', 'nl'])
def test_a_row_starts_from_it(theirs, tmp_path, block):
    "With the same outputs before training, and without turning colours."
    network, said, x = PoseResNet('resnet18', block=block), [], torch.randn(1, 3, 96, 64)
    load_start(network, save(tmp_path / 'epoch_210.pth', theirs), say=said.append)
    with torch.no_grad(): same(network.eval()(x), theirs(x))
    assert 'mmpose' in said[0] and 'trained on RGB' in said[0] and 'BGR' not in said[0] and 'decoder quarter there' in said[0]


@pytest.mark.parametrize('backbone', ['resnet50', 'resnet101'])
def test_deeper_backbones_and_their_style(tmp_path, backbone):
    "Bottlenecks, and the style that a configuration names."
    net = TopDown(backbone, 'head')
    for style in ('pytorch', 'caffe'):
        loaded = load_original(dict(meta=dict(cfg=ONE.replace('depth=18', f"depth=50, style='{style}'")), state_dict=net.state_dict()))
        assert [line.value for line in loaded.report.recognised if line.name in ('backbone', 'caffe')] == [str(style == 'caffe'), backbone]
        assert loaded.model.layer2[0].conv1.stride == ((2, 2) if style == 'caffe' else (1, 1))
    x = torch.randn(1, 3, 64, 32)
    with torch.no_grad(): torch.testing.assert_close(load_original(dict(state_dict=net.state_dict())).model(x), net(x))


def test_other_networks_of_mmpose_are_named(theirs):
    state = {name: t for name, t in theirs.state_dict().items() if '.layer2.' not in name and '.layer3.' not in name and '.layer4.' not in name}
    with pytest.raises(ValueError, match='but an HRNet has: it has no place here'):
        load_original(dict(state_dict=state | {'backbone.stage2.0.branches.0.0.conv1.weight': torch.ones(1)}))
    with pytest.raises(ValueError, match='does not fit: conv1.weight is nothing in the checkpoint'):
        load_original(dict(state_dict={name.replace('backbone.conv1', 'backbone.stem.0'): t for name, t in theirs.state_dict().items()}))


def test_plain_weights_are_not_silently_of_any_colour(tmp_path):
    "Everywhere they can be given; and each way to say it works."
    network = PoseResNet('resnet18')
    torch.save(network.state_dict(), tmp_path / 'plain.pth')
    torch.save({f'module.{name}': t for name, t in network.state_dict().items()}, tmp_path / 'parallel.pth')
    for name in ('plain.pth', 'parallel.pth'):
        with pytest.raises(Unsaid, match=f"{name}': color_order: nothing in it tells .* say BGR for files of Simple Baselines, .* else RGB"): load_original(tmp_path / name)
        with pytest.raises(CheckpointError, match=rf'{name}: color_order: nothing in it tells .* \(--color-order of the command\)'): Predictor.load(tmp_path / name, input_size=SIZE)
        with pytest.raises(CheckpointError, match=f'{name}: train.start_color_order: nothing in it tells'): load_start(PoseResNet('resnet18'), tmp_path / name)
        for order in ('RGB', 'BGR'):
            assert load_original(tmp_path / name, color_order=order).color_order == order
            assert Predictor.load(tmp_path / name, input_size=SIZE, color_order=order, say=lambda text: None, device='cpu').color_order == order
            started = PoseResNet('resnet18')
            load_start(started, tmp_path / name, color_order=order, say=lambda text: None)
            assert torch.equal(started.conv1.weight, network.conv1.weight if order == 'RGB' else network.conv1.weight.flip(1))


def test_nothing_in_a_training_state_runs(tmp_path):
    "The names of the log's methods are asked of nobody; an object of another class is an error that says how a bare file is made."
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path / 'ran'),)
    theirs = TopDown('resnet18', 'head')
    assert load_original(save_1(tmp_path / 'a.pth', theirs.state_dict())).input_size == SIZE
    with pytest.raises(ValueError, match=r"mkdir, which could run code: where you trust the file, keep only tensors and configuration: python -c .import torch; c = torch.load\('FILE'"):
        load_original(save_1(tmp_path / 'b.pth', theirs.state_dict(), extra=dict(evil=Evil())))
    assert not (tmp_path / 'ran').exists()


def test_the_numbers_of_imagenet_are_the_same_everywhere(): assert IMAGENET == (MEAN, STD)


def test_files_of_the_real_trainer(tmp_path):
    "mmengine's own Runner trains two steps, with averaged weights and a validation whose best is kept; each of its files is read."
    mmengine = pytest.importorskip('mmengine', reason='mmengine is not among the packages of this project')
    from mmengine.evaluator import BaseMetric
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Estimator(BaseModel):
        def __init__(self):
            super().__init__(data_preprocessor=None)
            net = TopDown('resnet18', 'head').requires_grad_(True)
            self.backbone, self.head = net.backbone, net.head
        forward_maps = TopDown.forward
        where = 'head'

        def forward(self, inputs, data_samples=None, mode='tensor'):
            maps = self.forward_maps(inputs)
            return dict(loss_kpt=maps.square().mean()) if mode == 'loss' else list(maps)

    class Score(BaseMetric):
        def process(self, data_batch, data_samples): self.results.append(1.)
        def compute_metrics(self, results): return dict(AP=np.mean(results))

    data = dict(batch_size=2, num_workers=0, collate_fn=dict(type='default_collate'), dataset=[dict(inputs=torch.randn(3, 96, 64)) for _ in range(4)], sampler=dict(type='DefaultSampler', shuffle=False))
    runner = Runner(
        Estimator(), str(tmp_path), train_dataloader=data, val_dataloader=data, val_evaluator=[Score()], val_cfg=dict(), experiment_name='td-hm_res18',
        train_cfg=dict(by_epoch=True, max_epochs=1), optim_wrapper=dict(optimizer=dict(type='Adam', lr=1e-3)),
        param_scheduler=[dict(type='LinearLR', begin=0, end=2, by_epoch=False), dict(type='MultiStepLR', milestones=[1], by_epoch=True)],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, save_best='AP', rule='greater')), custom_hooks=[dict(type='EMAHook', momentum=.5)],
        cfg=mmengine.Config.fromstring(ONE, '.py'), log_level='ERROR')
    runner.train()
    files = sorted(tmp_path.glob('*.pth'))
    assert {file.name for file in files} == {'best_AP_epoch_1.pth', 'epoch_1.pth'}
    for file in files:
        content = torch.load(file, weights_only=False)
        loaded = load_original(file)
        assert (loaded.color_order, loaded.input_size, loaded.decoder, loaded.flip_shift) == ('RGB', SIZE, 'quarter', True) and 'its configuration' in str(loaded.report)
        plain = Estimator()
        plain.load_state_dict(content['state_dict'])
        x = torch.randn(1, 3, 96, 64)
        with torch.no_grad(): same(loaded.model(x), plain.eval().forward_maps(x))


def test_the_command_of_the_page_makes_a_bare_file(tmp_path, monkeypatch):
    "A state that holds an object of another class is refused; what docs/weights.md says to type makes one that keeps its configuration."
    theirs = TopDown('resnet18', 'head')
    save_1(tmp_path / 'FILE', theirs.state_dict(), extra=dict(arguments=argparse.Namespace(a=1)))
    with pytest.raises(ValueError, match='argparse.Namespace'): load_original(tmp_path / 'FILE')
    command = re.search(r'^python (-c ".*")$', (Path(__file__).parent.parent / 'docs/weights.md').read_text(), re.M)[1]
    assert command == f'-c "{KEEP}"'  # as the error says
    with log_buffers():  # the command runs where mmengine is; here a stand-in has its class
        monkeypatch.chdir(tmp_path)
        exec(shlex.split(command)[1], {})
    loaded = load_original(tmp_path / 'bare.pth')
    assert (loaded.input_size, loaded.decoder) == (SIZE, 'quarter') and 'its configuration' in str(loaded.report)


def test_torch_hub_takes_it(tmp_path):
    "hubconf.py, from a local path: the report is printed, and what a file does not say can be said."
    theirs = TopDown('resnet18', 'head')
    root, path = str(Path(__file__).parent.parent), save_1(tmp_path / 'epoch_210.pth', theirs.state_dict())
    predictor = torch.hub.load(root, 'predictor', source='local', weights=path, device='cpu')
    assert (predictor.input_size, predictor.color_order, predictor.heatmaps.decoder) == (SIZE, 'RGB', 'quarter')
    torch.save(theirs.state_dict(), tmp_path / 'bare.pth')
    bare = torch.hub.load(root, 'predictor', source='local', weights=tmp_path / 'bare.pth', device='cpu', input_size=SIZE, decoder='dark')
    assert bare.heatmaps.decoder == 'dark'
    np.testing.assert_allclose(*(predict_crops(p, list(images().numpy()))[..., 2] for p in (predictor, bare)))

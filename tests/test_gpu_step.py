"""A training step as a GPU would see it, on machines without one."""
import json
import subprocess
import sys

import pytest
import torch

from srl_pose.pose.pose_net import PoseResNet

# Tensors without content say on which device they would be. A copy between devices that is not `non_blocking` makes the CPU wait; so does reading a
# number, which is an error here, as there is none. torch does not expect this of a machine without CUDA and may crash at the end: hence a process of its own.
STEP = '''
import json, os, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from srl_pose.experiment.params import load_set
from srl_pose.pose.heatmap import Heatmaps, heatmap_loss
from srl_pose.pose.pose_net import PoseResNet
from srl_pose.training import batches
from srl_pose.training.recipe import Updater

gpu, size, waits, normalize = torch.device('cuda', 0), (64, 64), [], batches.normalize
batches.to_device = lambda tensors, device: [t.to(device, non_blocking=True) for t in tensors]  # there are no streams here
PLANTED

class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before, after = ({t.device.type for t in tree_leaves(x) if isinstance(t, torch.Tensor)} for x in ((args, kwargs), out))
        if before and after and before != after and not (kwargs or {}).get('non_blocking') and func.namespace == 'aten': waits.append(str(func))
        return out

p = load_set('sample')['none'].train.model_copy(update=dict(fused_adam=True, gradient_clip=1.0, ema_decay=0.9))
with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # the backward pass wants a real GPU
    with gpu: model = PoseResNet('resnet18', input_size=size).train()
    update, losses = Updater(model, p, 5, gpu), torch.zeros(5, device=gpu)
    batch = dict(image=torch.zeros(2, 3, *size, dtype=torch.uint8), keypoints=torch.rand(2, 17, 2), visible=torch.ones(2, 17))
    for step in range(2):
        with Watch():
            images, targets, weights = batches.prepare(batch, Heatmaps(size), gpu)
            losses[step] += heatmap_loss(model(images), targets, weights)
            for q in model.parameters(): q.grad = torch.empty_like(q)
            update()
print(json.dumps(waits), flush=True)
os._exit(0)
'''
PLANTED = 'batches.normalize = lambda images: normalize(images) '


def step(planted=''):
    done = subprocess.run([sys.executable, '-c', STEP.replace('PLANTED', planted)], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr


def test_no_step_waits():
    """Neither for the batch and its targets nor for the loss, the clipping, the update and the moving average."""
    assert step() == []


@pytest.mark.parametrize(('planted', 'found'), [('/ torch.tensor(2.0).to(images.device)', 'aten._to_copy'), ('/ images.sum().item()', 'local_scalar')])
def test_waiting_is_found(planted, found):
    assert found in str(step(PLANTED + planted))


@pytest.mark.parametrize('block', [None, 'fft', 'lo', 'dct', 'nl', 'cgnl', 'a2', 'cc'])
def test_the_compiler_takes_the_network_in_one_piece(block):
    torch._dynamo.reset()
    model = PoseResNet('resnet18', block=block, block_after=['deconv1'], input_size=(64, 64)).train()
    found = torch._dynamo.explain(model)(torch.randn(2, 3, 64, 64))
    assert (found.graph_break_count, found.graph_count) == (0, 1), found.break_reasons

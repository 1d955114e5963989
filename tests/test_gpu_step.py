"""A training step as a GPU would see it, on machines without one."""
import json
import subprocess
import sys

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch.utils._python_dispatch import TorchDispatchMode

from srl_pose.benchmarks.gpu_parts import Steps
from srl_pose.experiment.experiment import Experiment
from srl_pose.pose.pose_net import PoseResNet
from srl_pose.training.train import learn

# Tensors without content say on which device they would be. A copy between devices that is not `non_blocking` makes the CPU wait; so does reading a
# number, which is an error here, as there is none. torch does not expect this of a machine without CUDA and may crash: hence a process of its own.
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

gpu, size, waits, kept, normalize = torch.device('cuda', 0), (64, 64), [], [], batches.normalize
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
    for block in BLOCKS:
        with gpu: model = PoseResNet('resnet18', input_size=size, block=block, block_after=['deconv1']).train()
        update, losses = Updater(model, p, 5, gpu), torch.zeros(5, device=gpu)
        kept.append([model, update, losses])  # torch crashes where such a tensor is deleted
        crops = dict(image=torch.zeros(2, 3, *size, dtype=torch.uint8))
        regions = dict(pixels=torch.zeros(7000, 3, dtype=torch.uint8), offset=torch.tensor([0, 3000]), size=torch.tensor([[60, 50], [50, 80]]),
                       inverse=torch.rand(2, 2, 3), hole=torch.zeros(2, 4, dtype=torch.int64))
        for step, pixels in enumerate((crops, crops, regions)):
            batch = dict(keypoints=torch.rand(2, 17, 2), visible=torch.ones(2, 17)) | pixels
            with Watch():
                images, targets, weights = batches.prepare(batch, Heatmaps(size), gpu)
                losses[step] += heatmap_loss(model(images), targets, weights)
                for q in model.parameters(): q.grad = torch.empty_like(q)
                update()
print(json.dumps(waits), flush=True)
os._exit(0)
'''
PLANTED = 'batches.normalize = lambda images: normalize(images) '


BLOCKS = [None, 'fft', 'lo', 'dct', 'nl', 'cgnl', 'a2', 'cc', 'local']


def step(planted='', blocks=(None,)):
    done = subprocess.run([sys.executable, '-c', STEP.replace('PLANTED', planted).replace('BLOCKS', repr(blocks))], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr


def test_no_step_waits():
    """Neither for the batch, its crops and targets, nor for the loss, the clipping, the update and the moving average. A matrix of `lo` cannot be without content."""
    assert step(blocks=[block for block in BLOCKS if block != 'lo']) == []


@pytest.mark.parametrize(('planted', 'found'), [('/ torch.tensor(2.0).to(images.device)', 'aten._to_copy'), ('/ images.sum().item()', 'local_scalar')])
def test_waiting_is_found(planted, found):
    assert found in str(step(PLANTED + planted))


class Reads(TorchDispatchMode):
    """Operators whose result, or its size, the CPU has to know."""
    waiting = 'aten::_local_scalar_dense', 'aten::nonzero', 'aten::masked_select', 'aten::unique', 'aten::_unique', 'aten::equal', 'aten::is_nonzero', 'aten::_linalg_check_errors'

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func.name().startswith('aten::index') and any(t is not None and t.dtype == torch.bool for x in args if isinstance(x, (list, tuple)) for t in x)
        if masked or func.name().startswith(self.waiting): self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def reads_of_two_steps(row, block=None, **recipe):
    """On a CPU, with the backward pass, which tensors without content do not have."""
    row['data'] |= dict(root='sample', train='val')
    row['model'] |= dict(input_size=(64, 64), block=block, block_after=('deconv1',))
    row['train'] |= dict(batch_size=2, fused_adam=True, gradient_clip=1.0, ema_decay=0.9) | recipe
    row['machine'] |= dict(device='cpu', workers=0)
    steps = Steps(Experiment.model_validate(row))
    found, batches = [], steps.data.parts(0, 0)
    for _ in range(2):
        step, parts = next(batches)
        parts = list(parts)  # loading may read numbers
        with Reads() as reads: learn(steps, step, iter(parts))
        found += reads.found
    return found


@pytest.mark.parametrize('crops', ['loader', 'device'])
@pytest.mark.parametrize('block', BLOCKS)
def test_no_step_reads_a_number(block, crops, sample_row):
    assert reads_of_two_steps(sample_row, block, crops=crops) == []


def test_with_fp16_the_fused_update_knows_of_an_overflow_without_being_told(sample_row):
    """torch's scaler reads for plain Adam whether there was one."""
    assert reads_of_two_steps(sample_row, precision='fp16') == []
    assert reads_of_two_steps(sample_row, precision='fp16', fused_adam=False)


def test_reading_is_found():
    x = torch.rand(3)
    with Reads() as reads: x.sum().item(), x[x > 0], x.nonzero(), bool(x[0] > 0), torch.linalg.solve(torch.eye(2), torch.eye(2))
    assert [name.partition('.')[0] for name in reads.found] == ['aten::_local_scalar_dense', 'aten::index', 'aten::nonzero', 'aten::_local_scalar_dense', 'aten::_linalg_check_errors']


@pytest.mark.parametrize('block', BLOCKS)
def test_the_compiler_takes_the_network_in_one_piece(block):
    torch._dynamo.reset()
    model = PoseResNet('resnet18', block=block, block_after=['deconv1'], input_size=(64, 64)).train()
    found = torch._dynamo.explain(model)(torch.randn(2, 3, 64, 64))
    assert (found.graph_break_count, found.graph_count) == (0, 1), found.break_reasons


@pytest.mark.parametrize('block', BLOCKS)
def test_a_cuda_graph_can_record_the_network(block):
    """Forward and backward hold no operator that torch's own list forbids, and no number that only the CPU knows."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    model = PoseResNet('resnet18', block=block, block_after=['deconv1'], input_size=(64, 64)).train()
    torch.compile(model, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)(torch.randn(2, 3, 64, 64)).sum().backward()
    assert len(graphs) == 2
    for graph in graphs:
        assert get_first_incompatible_cudagraph_node(graph) is None
        assert not [node for node in graph.graph.nodes if str(node.target).replace('.', '::', 1).startswith(Reads.waiting)]

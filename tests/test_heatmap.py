"""Heatmaps against outputs of the original implementation, and on tensors of other kinds."""
import numpy as np
import pytest
import torch

from srl_pose.data.coco import CocoPersons
from srl_pose.pose.crops import keypoints_to_image
from srl_pose.pose.decoders import DECODERS
from srl_pose.files import project_root
from srl_pose.pose.heatmap import Heatmaps, flip_heatmaps, heatmap_accuracy, heatmap_loss


@pytest.fixture(scope='module')
def golden(external):
    return np.load(external / 'golden' / 'coco.npz')


def sizes(golden):
    return sorted({tuple(map(int, k.split('|')[0].split('x'))) for k in golden.files if k.endswith('|gt|target')})


def test_encode_golden(golden):
    for h, w in sizes(golden):
        joints, target, weight = (golden[f'{h}x{w}|gt|{k}'] for k in ('joints', 'target', 'weight'))
        keypoints = torch.tensor(joints[..., :2])
        heatmaps, weights = Heatmaps((w, h)).encode(keypoints, (keypoints != 0).any(-1))
        assert np.array_equal(weights.numpy(), weight[..., 0])
        assert np.array_equal(heatmaps.half().numpy(), target)


def test_decode_golden(golden):
    heatmaps = torch.tensor(golden['decode|hm'].astype(np.float32))
    h, w = heatmaps.shape[-2:]
    codec = Heatmaps((4 * w, 4 * h))
    keypoints, scores = codec.decode(heatmaps)
    keypoints = keypoints_to_image(keypoints.numpy(), golden['decode|center'], golden['decode|scale'], codec.input_size)
    assert np.abs(keypoints - golden['decode|preds']).max() <= 1e-3
    assert np.array_equal(scores.numpy(), golden['decode|maxvals'][..., 0])


@pytest.mark.parametrize('decoder', DECODERS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_decode_keeps_the_peaks_of_other_types(dtype, decoder):
    codec = Heatmaps((96, 128), decoder=decoder)
    keypoints = torch.rand(4, 17, 2, generator=torch.Generator().manual_seed(0)) * 60 + 12
    heatmaps = codec.encode(keypoints, torch.ones(4, 17))[0]
    decoded, scores = codec.decode(heatmaps.to(dtype))
    assert decoded.dtype == torch.float32 and scores.dtype == dtype
    same = DECODERS[decoder].rounded or dtype == torch.float64  # else the peak's values are rounded, and its neighbour may win
    cells = 1e-6 if same else 0.05
    assert (decoded - codec.decode(heatmaps)[0]).abs().max() <= cells * codec.stride


@pytest.mark.parametrize('decoder', DECODERS)
def test_round_trip(decoder):
    """Keypoints, drawn and decoded: in any memory layout, together or one person at a time."""
    codec = Heatmaps((192, 256), decoder=decoder)
    keypoints = torch.rand(4, 17, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([130., 194]) + 30
    heatmaps, weights = codec.encode(keypoints, torch.ones(4, 17))
    decoded, scores = codec.decode(heatmaps)
    assert weights.all() and (decoded - keypoints).abs().max() <= (2 if DECODERS[decoder].rounded else 0.01)
    assert scores.min() >= (1 if DECODERS[decoder].rounded else np.exp(-2 * 0.51**2 / 8))  # half a cell off in x and in y
    assert torch.equal(codec.decode(heatmaps.to(memory_format=torch.channels_last))[0], decoded)
    for person, place in zip(heatmaps, decoded):
        assert torch.allclose(codec.decode(person[None])[0][0], place, atol=1e-4)


@pytest.mark.parametrize('decoder', DECODERS)
def test_one_bad_map_spoils_no_other(decoder):
    codec = Heatmaps((96, 64), decoder=decoder)
    heatmaps = codec.encode(torch.rand(1, 5, 2) * 60, torch.ones(1, 5))[0]
    broken = heatmaps.clone()
    broken[0, 2] = float('nan')
    (good, _), (found, scores) = codec.decode(heatmaps), codec.decode(broken)
    others = [0, 1, 3, 4]
    assert torch.allclose(found[0, others], good[0, others], atol=1e-4)
    assert found[0, 2].tolist() == [0, 0] and scores[0, 2].isnan()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('decoder', DECODERS)
def test_same_numbers_on_gpu(decoder):
    codec = Heatmaps((192, 256), decoder=decoder)
    keypoints, visible = torch.rand(8, 17, 2) * 300 - 40, torch.randint(0, 3, (8, 17))
    heatmaps, weights = codec.encode(keypoints, visible)
    on_gpu, gpu_weights = codec.encode(keypoints.cuda(), visible.cuda())
    assert torch.allclose(on_gpu.cpu(), heatmaps, atol=1e-6) and torch.equal(gpu_weights.cpu(), weights)
    noisy, atol = heatmaps + 0.01 * torch.randn(8, 17, 64, 48), 0 if DECODERS[decoder].rounded else 1e-2
    assert all(torch.allclose(a, b.cpu(), atol=atol, rtol=0) for a, b in zip(codec.decode(noisy), codec.decode(noisy.cuda())))


def test_empty_batch():
    codec = Heatmaps((96, 64))
    heatmaps, weights = codec.encode(torch.zeros(0, 17, 2), torch.zeros(0, 17))
    assert heatmaps.shape == (0, 17, 16, 24) and weights.shape == (0, 17)


@pytest.mark.parametrize('keypoint, expected', [
    ((-28., 20), 1), ((-30.1, 20), 1), ((-34., 20), 0), ((117., 20), 1), ((119., 20), 0), ((40., -34.), 0)])
def test_weight_at_the_border(keypoint, expected):
    """The window of sigma 2 reaches 6 cells; left of the map the original counts one more (empty, weight 1)."""
    _, weights = Heatmaps((96, 64)).encode(torch.tensor([[keypoint]]), torch.ones(1, 1))
    assert weights.item() == expected


def test_loss_ignores_weightless_keypoints_and_gradients_flow():
    pred, target = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5)
    weights = torch.tensor([[1., 0, 1], [0, 0, 0]])
    heatmap_loss(pred, target, weights).backward()
    assert torch.equal((pred.grad.abs().sum((-1, -2)) > 0).float(), weights)
    assert 0 <= heatmap_accuracy(pred, target, weights) <= 1


def test_flip_does_not_touch_its_input():
    heatmaps = torch.randn(1, 4, 3, 5)
    before = heatmaps.clone()
    flip_heatmaps(heatmaps, ((0, 1), (2, 3))).zero_()
    assert torch.equal(heatmaps, before)


@pytest.mark.parametrize('decoder', DECODERS)
def test_from_image_to_image(decoder):
    """Crops, targets, decoding and the way back share one convention: labelled keypoints of the sample return to their pixels."""
    codec = Heatmaps((192, 256), decoder=decoder)
    persons = CocoPersons(project_root() / 'sample', 'val', input_size=(192, 256), unbiased=codec.unbiased)
    items = [persons[i] for i in range(48)]
    maps, weights = codec.encode(*(torch.stack([item[name] for item in items]) for name in ('keypoints', 'visible')))
    decoded, _ = codec.decode(maps)
    found = keypoints_to_image(decoded.numpy(), persons.center[:48], persons.scale[:48], (192, 256), unbiased=codec.unbiased)
    pixel = persons.scale[:48, :1] * 200 / 192  # image pixels per crop pixel
    error = np.abs(found - persons.keypoints[:48]).max(-1)[weights.numpy() > 0] / np.broadcast_to(pixel, (48, 17))[weights.numpy() > 0]
    cell = (decoded / torch.tensor(codec.unit)).numpy()
    inside = ((cell > 3) & (cell < np.array(codec.size) - 4)).all(-1)[weights.numpy() > 0]  # maps cut by a border are less exact
    assert inside.sum() > 500
    assert error[inside].max() < (2.01 if DECODERS[decoder].rounded else 0.2)

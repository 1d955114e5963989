"""Evaluation against outputs of the original implementation, and its errors."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from srl_pose.coco import Augmentation, CocoPersons
from srl_pose.evaluate import METRICS, coco_results, evaluate, evaluate_results, oks, oks_nms, predict
from srl_pose.files import DataError, project_root


@pytest.fixture(scope='module')
def val():
    return CocoPersons(project_root(Path(__file__).parent) / 'sample', 'val', input_size=(96, 128))


class Model(nn.Module):
    """Heatmaps from one convolution."""

    def __init__(self, keypoints=17, stride=4):
        super().__init__()
        self.conv = nn.Conv2d(3, keypoints, stride, stride)

    def forward(self, images):
        return self.conv(images)


def test_golden_numbers(external):
    golden = np.load(external / 'golden' / 'coco.npz')
    cases = sorted({k.split('|')[1] for k in golden.files if k.startswith('eval|')})
    assert 'gt' in cases
    for case in cases:
        names = 'preds', 'boxes', 'image_id', 'stats', 'nres'
        preds, boxes, image_id, stats, count = (golden[f'eval|{case}|{name}'] for name in names)
        results = coco_results(image_id, preds[..., :2], preds[..., 2], boxes[:, 5], boxes[:, 4])
        assert len(results) == count
        file = external / 'data/coco-mini/annotations/person_keypoints_val2017.json'
        metrics = evaluate_results(file, results)
        assert tuple(metrics) == METRICS
        assert np.abs(np.array([*metrics.values()]) - stats).max() <= 1e-6


def test_golden_boxes_are_those_of_the_data_set(external):
    golden = np.load(external / 'golden' / 'coco.npz')
    persons = CocoPersons(external / 'data/coco-mini', 'val2017', input_size=(192, 256))
    boxes = golden['eval|gt|boxes']
    assert np.array_equal(persons.image_id, golden['eval|gt|image_id'])
    for ours, theirs in ((persons.center, boxes[:, :2]), (persons.scale, boxes[:, 2:4]), (persons.score, boxes[:, 5])):
        assert np.abs(ours - theirs).max() <= 1e-4
    assert np.abs(persons.area / boxes[:, 4] - 1).max() <= 1e-6


@pytest.mark.parametrize('data, split', [('coco-mini', 'train2017'), ('coco-mini', 'val2017'), ('lspet', 'val')])
def test_truth_scores_one(external, data, split):
    persons = CocoPersons(external / 'data' / data, split, input_size=(192, 256))
    keypoints = np.where(persons.visible[..., None] > 0, persons.keypoints, persons.center[:, None])
    results = coco_results(persons.image_id, keypoints, np.ones(keypoints.shape[:2]), persons.score, persons.area)
    metrics = evaluate_results(persons.annotation_file, results)
    assert metrics['AP'] == pytest.approx(1, abs=1e-9) and metrics['AR'] == pytest.approx(1, abs=1e-9)


def test_settings_are_stated(val):
    evaluation = evaluate(Model(), val, flip_test=False, confidence_threshold=0.3, nms_threshold=0.8, bgr=True)
    settings = evaluation.settings
    assert settings == dict(
        split='val', boxes='gt', box_file='annotations/person_keypoints_val.json', persons=len(val),
        images=len(set(val.image_id.tolist())), results=len(evaluation.results), input_size=[96, 128],
        flip_test=False, flip_shift=False, decoder='quarter offset', confidence_threshold=0.3, nms_threshold=0.8,
        color_order='BGR')
    json.dumps([settings, evaluation.metrics, evaluation.results], allow_nan=False)


def test_each_option_changes_something(val):
    torch.manual_seed(0)
    model = Model()
    plain, scores = predict(model, val, flip_test=False)
    assert not np.array_equal(predict(model, val, flip_test=True)[0], plain)
    assert not np.array_equal(predict(model, val, flip_test=False, bgr=True)[1], scores)
    for batch_size, workers in ((1, 0), (7, 2)):
        again = predict(model, val, flip_test=False, batch_size=batch_size, workers=workers)
        assert np.allclose(again[1], scores, atol=1e-5)


@pytest.mark.parametrize('model', [Model(stride=8), Model(keypoints=16)])
def test_wrong_models(val, model):
    with pytest.raises(ValueError, match='the data set needs'):
        evaluate(model, val)
    assert model.training  # as it was


def test_diverged_model(val):
    model = Model()
    nn.init.constant_(model.conv.weight, float('nan'))
    with pytest.raises(ValueError, match='not finite'):
        predict(model, val, persons=[0])


def test_wrong_data(val):
    with pytest.raises(ValueError, match='no persons'):
        predict(Model(), val, persons=[])
    augmented = CocoPersons(val.root, 'val', input_size=(96, 128), augmentation=Augmentation())
    with pytest.raises(ValueError, match='augmentation'):
        predict(Model(), augmented)
    with pytest.raises(ValueError, match='confidence_threshold'):
        evaluate(Model(), val, confidence_threshold=2)


def test_results_of_other_images_and_missing_files(val, tmp_path):
    with pytest.raises(ValueError, match='image_id -1 is no image of'):
        evaluate_results(val.annotation_file, [dict(image_id=-1, category_id=1, keypoints=[0] * 51, score=1)])
    with pytest.raises(DataError, match='none.json: no such file'):
        evaluate_results(tmp_path / 'none.json', [])


def test_evaluation_is_silent_and_leaves_results_alone(val, capsys):
    results = coco_results(val.image_id, val.keypoints, np.ones(val.visible.shape), val.score, val.area)
    before = json.dumps(results)
    evaluate_results(val.annotation_file, results)
    assert json.dumps(results) == before
    assert capsys.readouterr().out == ''


def test_ties_go_as_in_the_original():
    """The original sorts ascending and reverses: of equal scores the later comes first."""
    poses = np.zeros((3, 17, 2))
    assert oks_nms(poses, np.ones(3), np.array([.5, .5, .4])).tolist() == [1]
    assert oks_nms(poses + np.arange(3)[:, None, None] * 1e3, np.ones(3), np.array([.5, .5, .4])).tolist() == [1, 0, 2]
    assert oks(poses, poses[:0], np.ones(3), np.ones(0)).shape == (3, 0)

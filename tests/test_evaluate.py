"""Evaluation against outputs of the original implementation, and its errors."""
import contextlib
import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from srl_pose.evaluation.bootstrap import Matches, bootstrap, compare
from srl_pose.data.coco import CocoPersons
from srl_pose.pose.crops import Augmentation
from srl_pose.evaluation.cocoeval import METRICS, coco_results, evaluate_results, run_cocoeval
from srl_pose.evaluation.evaluate import evaluate, val2017_warnings
from srl_pose.evaluation.predict import predict
from srl_pose.files import DataError, project_root, write_json
from srl_pose.pose.heatmap import Heatmaps
from srl_pose.pose.keypoints import COCO_KEYPOINTS
from srl_pose.pose.oks import oks, oks_nms
from srl_pose.testing import nms_original


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
        assert np.abs(np.sort([r['score'] for r in results]) - np.sort(golden[f'eval|{case}|scores'])).max() <= 1e-6
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


def original_numbers(file, image_ids, preds, boxes):
    """Rescoring, suppression and COCOeval, person by person and keypoint by keypoint, as in the original."""
    results = []
    for image_id in dict.fromkeys(image_ids.tolist()):
        mine, scores = np.flatnonzero(image_ids == image_id), []
        for i in mine:
            total, n = 0., 0
            for value in preds[i, :, 2]:
                if value > 0.2:
                    total, n = total + float(value), n + 1
            scores.append(boxes[i, 5] * (total / n if n else 0))
        for k in nms_original(preds[mine, :, :2].astype(float), boxes[mine, 4], np.array(scores), COCO_KEYPOINTS.sigmas):
            results.append(dict(image_id=image_id, category_id=1, score=float(scores[k]),
                                keypoints=preds[mine[k]].astype(float).ravel().tolist()))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(file)
        evaluation = COCOeval(truth, truth.loadRes(results), 'keypoints')
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    return len(results), evaluation.stats


@pytest.mark.parametrize('seed', range(4))
def test_detector_boxes_with_duplicates_as_in_the_original(external, seed):
    """The golden predictions as a detector might have led to them: found twice, or not at all, with box scores."""
    golden, rng = np.load(external / 'golden/coco.npz'), np.random.default_rng(seed)
    which = rng.permutation(np.concatenate([rng.choice(68, 60, replace=False), rng.choice(68, 50)]))
    preds, boxes, image_id = (golden[f'eval|gt|{name}'][which].copy() for name in ('preds', 'boxes', 'image_id'))
    preds[..., :2] += rng.normal(0, 1.5, preds[..., :2].shape)
    preds[..., 2] *= rng.uniform(0.05, 1, preds.shape[:2])
    boxes[:, 5] = rng.uniform(0.01, 1, len(boxes))
    file = external / 'data/coco-mini/annotations/person_keypoints_val2017.json'
    count, stats = original_numbers(file, image_id, preds, boxes)
    results = coco_results(image_id, preds[..., :2], preds[..., 2], boxes[:, 5], boxes[:, 4])
    assert len(results) == count < len(which)
    assert np.abs(np.array([*evaluate_results(file, results).values()]) - stats).max() <= 1e-6


def scattered(rng, n, twice, spread=600):
    """n poses, the last `twice` of them near the first ones, with scores that tie."""
    poses = rng.uniform(0, spread, (n - twice, 1, 2)) + rng.normal(0, 40, (n - twice, 17, 2))
    poses = np.concatenate([poses, poses[:twice] + rng.normal(0, 1.5, (twice, 17, 2))])
    return poses, rng.uniform(3000, 30000, n), rng.uniform(0, 1, n).round(2)


@pytest.mark.parametrize('threshold', [0, 0.2, 0.5, 0.9, 0.95, 1])
def test_suppression_is_the_original_s(threshold):
    rng = np.random.default_rng(0)
    for n, twice, spread in ((1, 0, 1), (2, 1, 1), (7, 3, 600), (25, 5, 60), (60, 15, 600), (60, 30, 5)):
        poses, areas, scores = scattered(rng, n, twice, spread)
        assert oks_nms(poses, areas, scores, threshold=threshold).tolist() == nms_original(poses, areas, scores, COCO_KEYPOINTS.sigmas, threshold)
    same = np.repeat(poses[:1], 20, 0)
    assert len(oks_nms(same, areas[:20], scores[:20])) == 1
    assert oks_nms(poses[:0], areas[:0], scores[:0]).tolist() == []


def test_suppression_of_other_keypoints():
    rng = np.random.default_rng(0)
    poses = np.repeat(rng.uniform(0, 50, (6, 2, 2)), 4, 0) + rng.normal(0, 1, (24, 2, 2))
    areas, scores, sigmas = np.full(24, 2000.), rng.uniform(0, 1, 24), (0.05, 0.02)
    similar, kept = oks(poses, poses, areas, areas, sigmas), oks_nms(poses, areas, scores, sigmas=sigmas, threshold=0.6)
    left = np.argsort(scores)[::-1].tolist()
    for i in kept:
        assert left.pop(0) == i
        left = [j for j in left if similar[i, j] <= 0.6]
    assert not left and len(kept) < 24


@pytest.mark.parametrize('data, split', [('coco-mini', 'train2017'), ('coco-mini', 'val2017'), ('lspet', 'val')])
def test_truth_scores_one(external, data, split):
    persons = CocoPersons(external / 'data' / data, split, input_size=(192, 256))
    keypoints = np.where(persons.visible[..., None] > 0, persons.keypoints, persons.center[:, None])
    results = coco_results(persons.image_id, keypoints, np.ones(keypoints.shape[:2]), persons.score, persons.area)
    metrics = evaluate_results(persons.annotation_file, results)
    assert metrics['AP'] == pytest.approx(1, abs=1e-9) and metrics['AR'] == pytest.approx(1, abs=1e-9)


def test_settings_are_stated(val):
    evaluation = evaluate(Model(), val, flip_test=False, confidence_threshold=0.3, nms_threshold=0.8, color_order='BGR')
    settings = evaluation.settings
    file = 'annotations/person_keypoints_val.json'
    digest = hashlib.sha256((val.root / file).read_bytes()).hexdigest()
    assert settings == dict(
        split='val', annotation_file=file, images=len(set(val.image_id.tolist())), persons=len(val), area='stand-in', area_over_box=[.53] * 3,
        boxes='gt', box_file=file, box_sha256=digest, annotation_sha256=digest, num_boxes=len(val),
        results=len(evaluation.results), input_size=[96, 128],
        flip_test=False, flip_shift=False, decoder='quarter', confidence_threshold=0.3, nms_threshold=0.8,
        color_order='BGR', warnings=[])
    json.dumps([settings, evaluation.metrics, evaluation.results], allow_nan=False)


def test_each_option_changes_something(val):
    torch.manual_seed(0)
    model = Model()
    plain, scores = predict(model, val, flip_test=False)
    assert not np.array_equal(predict(model, val, flip_test=True)[0], plain)
    assert not np.array_equal(predict(model, val, flip_test=False, color_order='BGR')[1], scores)
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


@pytest.fixture
def split_of_sample(val, tmp_path):
    """Makes a data root of the sample's images with another annotation file."""
    def make(split, folder, name, change):
        shutil.copytree(val.root / 'images/val', tmp_path / 'images' / folder)
        shutil.copy(val.root / 'detections/val.json', tmp_path / 'boxes.json')
        data = json.loads(val.annotation_file.read_text())
        write_json(tmp_path / 'annotations' / f'{name}_{split}.json', change(data))
        return tmp_path
    return make


@pytest.mark.filterwarnings('error')
def test_images_without_annotations(split_of_sample, val):
    root = split_of_sample('test-dev2017', 'test2017', 'image_info', lambda d: {k: d[k] for k in ('images', 'categories')})
    with pytest.raises(DataError, match="image_info_test-dev2017.json: needs a list 'annotations'"):
        CocoPersons(root, 'test-dev2017', input_size=(96, 128))
    persons = CocoPersons(root, 'test-dev2017', input_size=(96, 128), boxes='boxes.json')
    evaluation = evaluate(Model(), persons)
    assert evaluation.metrics == evaluation.bootstrap == {}
    assert evaluation.settings['box_file'] == 'boxes.json' and evaluation.settings['num_boxes'] == 218
    path = evaluation.write_results(root / 'out')
    assert path == root / 'out/keypoints_test-dev2017_results.json'
    with contextlib.redirect_stdout(io.StringIO()):
        found = COCO(persons.annotation_file).loadRes(str(path))
    assert len(found.anns) == len(evaluation.results) > 0
    json.dumps(evaluation.settings, allow_nan=False)
    with pytest.raises(DataError, match="needs a list 'annotations'"):
        evaluate_results(persons.annotation_file, evaluation.results)


def test_a_part_of_val2017_is_no_val2017(external):
    persons = CocoPersons(external / 'data/coco-mini', 'val2017', input_size=(96, 128))
    with pytest.warns(UserWarning, match="has 45 of COCO val2017's 5,000 images"):
        evaluation = evaluate(Model(), persons, flip_test=False)
    assert len(evaluation.settings['warnings']) == 1


@pytest.mark.parametrize('boxes', ['gt', 'boxes.json'])
def test_val2017_with_other_counts(split_of_sample, boxes):
    def enlarge(data):
        free = set(range(1, 6000)) - {i['id'] for i in data['images']}
        more = [data['images'][0] | dict(id=i, file_name=f'{i}.jpg') for i in sorted(free)[:5000 - len(data['images'])]]
        return data | dict(images=data['images'] + more)

    root = split_of_sample('val2017', 'val2017', 'person_keypoints', enlarge)
    persons = CocoPersons(root, 'val2017', input_size=(96, 128), boxes=boxes)
    with pytest.warns(UserWarning) as caught:
        evaluation = evaluate(Model(), persons, flip_test=False, resamples=3)
    assert [str(w.message) for w in caught if w.category is UserWarning] == evaluation.settings['warnings']
    count = '183, but 6,352' if boxes == 'gt' else '218, but 104,125'
    expected = ['persons is 183, but 6,352', f'num_boxes is {count}']
    assert all(text in warning for text, warning in zip(expected, evaluation.settings['warnings'], strict=True))


def test_nothing_to_warn_of():
    settings = dict(split='val2017', images=5000, persons=6352, annotation_file='a', box_file='b')
    assert val2017_warnings(settings | dict(boxes='detector', num_boxes=104_125)) == []
    assert val2017_warnings(settings | dict(boxes='gt', num_boxes=6352)) == []


def test_heatmaps_that_do_not_fit_the_crops_before_work(val):
    with pytest.raises(ValueError, match='decoder udp needs a data set with unbiased=True'):
        evaluate(None, val, heatmaps=Heatmaps(val.input_size, decoder='udp'))
    with pytest.raises(ValueError, match='heatmaps: are for input_size'):
        predict(Model(), val, heatmaps=Heatmaps((64, 96)))


@pytest.mark.parametrize('data, split', [('coco-mini', 'val2017'), ('lspet', 'val')])
def test_the_bootstrap_adds_up_as_cocoeval(external, data, split):
    persons = CocoPersons(external / 'data' / data, split, input_size=(192, 256), check_images=False)
    rng = np.random.default_rng(0)
    keypoints = np.where(persons.visible[..., None] > 0, persons.keypoints, persons.center[:, None])
    scale = persons.scale[:, None, :1] * 200
    draws = []
    for noise in (0.02, 0.025):
        noisy = keypoints + rng.normal(0, 1, keypoints.shape) * scale * noise
        results = coco_results(persons.image_id, noisy, rng.uniform(0.3, 1, keypoints.shape[:2]), persons.score, persons.area)
        evaluation = run_cocoeval(persons.annotation_file, results)
        matches = Matches.of(evaluation)
        assert np.abs(matches.numbers() - evaluation.stats).max() <= 1e-9
        draws.append(bootstrap(matches, resamples=100)[0])
        low, high = draws[-1].interval()
        assert low < evaluation.stats[0] < high
    assert compare(*draws).probability > 0.5


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

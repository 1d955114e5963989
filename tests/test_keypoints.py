"""A data set with keypoints of its own, from its file to average precision."""
import json

import numpy as np
import pytest
import torch

from srl_pose.data.check import check
from srl_pose.data.coco import CocoPersons
from srl_pose.training.checkpoint import load_checkpoint
from srl_pose.evaluation.evaluate import evaluate
from srl_pose.experiment.experiment import Experiment
from srl_pose.files import DataError
from srl_pose.pose.crops import Augmentation
from srl_pose.pose.keypoints import COCO_KEYPOINTS
from srl_pose.sample.scenes import make_sample
from srl_pose.testing import changed, keep_keypoints
from srl_pose.training.train import train
from srl_pose.use.predict import predict_images
from srl_pose.use.predictor import Predictor

FIVE = 'nose left_wrist right_wrist left_ankle right_ankle'.split()


@pytest.fixture
def experiment(tmp_path, sample_row):
    """Drawn people with five keypoints each; their category names them, their limbs and tolerances."""
    root = make_sample(tmp_path / 'data', train=6, val=4)
    sigmas = [COCO_KEYPOINTS.sigmas[COCO_KEYPOINTS.names.index(name)] for name in FIVE]
    for split in ('train', 'val'):
        file = root / f'annotations/person_keypoints_{split}.json'
        file.write_text(json.dumps(keep_keypoints(json.loads(file.read_text()), FIVE, skeleton=[[1, 2], [1, 3]], sigmas=sigmas)))
    sample_row['data'] = dict(root=str(root), train='train', val='val', detections=None)
    sample_row['model'] |= dict(input_size=(32, 64), block=None, block_after=('deconv1',))
    sample_row['train'] |= dict(epochs=1, batch_size=8, warmup_epochs=0, lr_steps=())
    sample_row['evaluate'] |= dict(boxes='gt')
    sample_row['machine'] |= dict(device='cpu', processes=1, workers=0, image_cache_gb=0)
    return Experiment.model_validate(sample_row)


def test_five_keypoints_train_and_evaluate(experiment, tmp_path):
    experiment.check_data()
    train(experiment, tmp_path / 'out')
    model, restored, _ = load_checkpoint(tmp_path / 'out/model.pt')
    assert model.final_layer.out_channels == 5
    persons = restored.val_set()
    assert persons.keypoint_set.names == tuple(FIVE) and persons.keypoint_set.flip_pairs == ((1, 2), (3, 4))
    result = evaluate(model, persons)
    assert result.keypoints.shape == (len(persons), 5, 2) and 0 <= result.metrics['AP'] <= 1
    assert {len(entry['keypoints']) for entry in result.results} == {15}
    (tmp_path / 'data').rename(tmp_path / 'elsewhere')  # a checkpoint needs no data
    assert load_checkpoint(tmp_path / 'out/model.pt')[0].final_layer.out_channels == 5
    for name in ('model.pt', 'best.pt', 'last.pt'):  # and knows what it predicts
        predictor = Predictor.load(tmp_path / 'out' / name, device='cpu')
        assert predictor.keypoint_set == persons.keypoint_set
    assert predict_images(predictor, np.zeros((64, 32, 3), np.uint8))[0].keypoints.shape == (1, 5, 3)


def test_splits_must_agree(experiment):
    file = experiment.val_set().annotation_file
    data = json.loads(file.read_text())
    data['categories'][0]['keypoints'][0] = 'chin'
    file.write_text(json.dumps(data))
    with pytest.raises(DataError, match='person_keypoints_val.json: categories: keypoints are chin'):
        experiment.check_data()


def test_splits_must_agree_on_flip_pairs(experiment):
    """In any order; a network that was mirrored otherwise in training has no use for a flip test."""
    file = experiment.val_set().annotation_file
    data = json.loads(file.read_text())
    for pairs, agree in (([[5, 4], [2, 3]], True), ([[2, 3]], False)):
        data['categories'][0]['flip_pairs'] = pairs
        file.write_text(json.dumps(data))
        if agree: experiment.check_data()
        else:
            with pytest.raises(DataError, match='person_keypoints_val.json: categories: flip_pairs are not those of person_keypoints_train.json'): experiment.check_data()


SPELLINGS = {
    'left_ankle': ('left_{}', 'right_{}'), 'Left-ankle': ('Left-{}', 'Right-{}'), 'L_ankle': ('L_{}', 'R_{}'), 'ankle_left': ('{}_left', '{}_right'),
    'left ankle': ('left {}', 'right {}'), 'lankle': ('l{}', 'r{}'), 'ankle.R': ('{}.L', '{}.R'), 'ankleleft': ('{}left', '{}right')}


def respelt(name, spelling):
    side, _, part = name.partition('_')
    return SPELLINGS[spelling][side == 'right'].format(part) if part else name


@pytest.mark.parametrize('spelling', SPELLINGS)
def test_left_and_right_are_found_however_they_are_spelt(tmp_path, spelling):
    """A mirrored person has the left wrist where the mirrored picture has it."""
    root = make_sample(tmp_path / 'data', train=2, val=2)
    file = root / 'annotations/person_keypoints_val.json'
    data = json.loads(file.read_text())
    names = [respelt(name, spelling) for name in COCO_KEYPOINTS.names]
    data['categories'][0].update(keypoints=names, sigmas=list(COCO_KEYPOINTS.sigmas))
    expected = CocoPersons(root, 'val', input_size=(96, 128), augmentation=Augmentation(flip_probability=1))
    file.write_text(json.dumps(data))
    mirrored = CocoPersons(root, 'val', input_size=(96, 128), augmentation=Augmentation(flip_probability=1))
    assert mirrored.keypoint_set.flip_pairs == COCO_KEYPOINTS.flip_pairs
    assert (mirrored[0]['keypoints'] == expected[0]['keypoints']).all()
    report = check(root, ['val'])
    assert report.warnings == [] and report.counts['val']['flip pairs'] == 8
    assert report.counts['val']['left and right'][4]['pair'] == f'{names[9]} – {names[10]}'


def test_sides_without_a_pair_are_not_mirrored(experiment):
    """Neither in training nor in the flip test; without them, the data set is as good as any."""
    for split in ('train', 'val'):
        file = experiment.val_set().root / f'annotations/person_keypoints_{split}.json'
        data = json.loads(file.read_text())
        data['categories'][0]['keypoints'][3:] = ['Ankle of the left', 'foot R']
        file.write_text(json.dumps(data))
    message = 'categories: flip_pairs: Ankle of the left is of a side by its name, but in no flip pair; foot R'
    with pytest.raises(DataError, match=message): experiment.check_data()
    still = changed(experiment, 'train', augmentation=experiment.train.augmentation.model_copy(update=dict(flip_probability=0)))
    with pytest.raises(DataError, match=message): still.check_data()
    changed(still, 'evaluate', flip_test=False).check_data()
    with pytest.raises(DataError, match=message): evaluate(torch.nn.Identity(), experiment.val_set())
    assert any('Ankle of the left is of a side by its name' in m for f in check(experiment.val_set().root).warnings for m in f['messages'])

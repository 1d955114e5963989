"""A data set with keypoints of its own, from its file to average precision."""
import json

import pytest

from srl_pose.training.checkpoint import load_checkpoint
from srl_pose.evaluation.evaluate import evaluate
from srl_pose.experiment.experiment import Experiment
from srl_pose.files import DataError
from srl_pose.pose.keypoints import COCO_KEYPOINTS
from srl_pose.sample.scenes import make_sample
from srl_pose.testing import keep_keypoints
from srl_pose.training.train import train

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


def test_splits_must_agree(experiment):
    file = experiment.val_set().annotation_file
    data = json.loads(file.read_text())
    data['categories'][0]['keypoints'][0] = 'chin'
    file.write_text(json.dumps(data))
    with pytest.raises(DataError, match='person_keypoints_val.json: categories: keypoints are chin'):
        experiment.check_data()

"""Training over several processes, and from a checkpoint to predictions."""
import json

import pytest
import torch

from srl_pose.experiment import load_experiments
from srl_pose.files import project_root
from srl_pose.train import load_checkpoint, train


@pytest.fixture
def experiment():
    """A few steps on the sample, without augmentation."""
    root = project_root()
    files = (root / 'params.yaml', root / 'experiments' / 'sample.yaml')
    base = load_experiments(next(f for f in files if f.exists() and 'set: sample' in f.read_text()))['fft'].model_dump()
    base['data'] |= dict(root='sample', train='val')
    base['model'] |= dict(input_size=(32, 64))
    base['train'] |= dict(epochs=1, batch_size=16, warmup_epochs=0, lr_steps=())
    base['train']['augmentation'] = dict(scale=0.0, rotation=0.0, rotation_probability=0.0, flip_probability=0.0)
    base['machine'] = dict(device='cpu', processes=1, workers=0)
    return lambda **machine: type(next(iter(load_experiments(files[0]).values()))).model_validate(
        base | {'machine': base['machine'] | machine})


def test_two_processes_train_and_leave_one_checkpoint(experiment, tmp_path, capfd):
    summary = train(experiment(processes=2), tmp_path)
    assert summary['processes'] == 2
    assert {p.name for p in tmp_path.iterdir()} == {'model.pt', 'train.json', 'curves', 'logs'}
    assert json.loads((tmp_path / 'train.json').read_text()) == summary
    model, restored, _ = load_checkpoint(tmp_path / 'model.pt')
    assert restored == experiment(processes=2) and not model.training
    assert 'epoch 1/1 done' in capfd.readouterr().out
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_same_seed_same_weights(experiment, tmp_path):
    first, second = (train(experiment(), tmp_path / name) and load_checkpoint(tmp_path / name / 'model.pt')[0].state_dict()
                     for name in 'ab')
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_batch_that_cannot_be_shared_is_refused(experiment, tmp_path):
    with pytest.raises(ValueError, match='batch_size 16 cannot be shared by 3 processes'):
        train(experiment(processes=3), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_worker_shows_its_own_error(experiment, tmp_path):
    broken = experiment(processes=2)
    broken = broken.model_copy(update={'data': broken.data.model_copy(update={'train': 'nowhere'})})
    with pytest.raises(Exception, match='person_keypoints_nowhere.json'):
        train(broken, tmp_path)
    assert not (tmp_path / 'model.pt').exists()

"""Training over several processes, every option, exact continuation, and from a checkpoint to predictions."""
import json
import os
import subprocess

import pytest
import torch

from srl_pose.training.checkpoint import CheckpointError, load_checkpoint, read_checkpoint
from srl_pose.experiment.experiment import Experiment
from srl_pose.files import project_root
from srl_pose.training.launch import WorkerError, gather, launch, rank_and_world
from srl_pose.pose.pose_net import PoseResNet
from srl_pose.sample.scenes import make_sample
from srl_pose.training.train import fit, train
from srl_pose.training.watch import Progress, read_curves


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    """A data set of a few persons."""
    return make_sample(tmp_path_factory.mktemp('few') / 'data', train=2, val=8)


@pytest.fixture
def experiment(sample_row, few):
    """A few steps on a few persons, without augmentation; changes by section."""
    base = sample_row
    base['data'] |= dict(root=str(few), train='val')
    base['model'] |= dict(input_size=(32, 32), block_after=('deconv1',))
    base['train'] |= dict(epochs=1, batch_size=11, warmup_epochs=0, lr_steps=(), fused_adam=False)
    base['train']['augmentation'] = dict(scale=0.0, rotation=0.0, rotation_probability=0.0, flip_probability=0.0)
    base['machine'] |= dict(device='cpu', processes=1, workers=0, restarts=0)
    return lambda **changes: Experiment.model_validate({k: v | changes.get(k, {}) if isinstance(v, dict) else v for k, v in base.items()})


def weights(out):
    return read_checkpoint(out / 'model.pt')['model']


def losses(out):
    return read_curves(out / 'curves')['train_loss']


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_two_processes_train_and_leave_one_checkpoint(experiment, tmp_path, capfd):
    two = experiment(machine=dict(processes=2))
    summary = train(two, tmp_path)
    assert summary['processes'] == 2
    assert {p.name for p in tmp_path.iterdir()} == {'model.pt', 'best.pt', 'last.pt', 'train.json', 'curves', 'logs', '.lock'}
    assert json.loads((tmp_path / 'train.json').read_text()) == summary
    model, restored, _ = load_checkpoint(tmp_path / 'model.pt')
    assert restored == two and not model.training
    out = capfd.readouterr().out
    assert 'epoch 1/1 done' in out and '2 processes × 1 part of at most 6; learning rate 0.0015 for the whole batch' in out
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_processes_and_parts_do_not_change_the_losses(experiment, tmp_path):
    """With normalisation by frozen statistics every part sees the same network: only rounding differs."""
    layers = dict(freeze=['stem', 'layer1', 'layer2', 'layer3', 'layer4', 'deconv'], epochs=2, learning_rate=0.01)
    train(experiment(train=layers), tmp_path / 'one')
    one = losses(tmp_path / 'one')
    assert one[2] < 0.999 * one[1]
    for processes, at_once in ((1, 4), (2, 2)):
        other = tmp_path / f'{processes}x{at_once}'
        train(experiment(train=layers, machine=dict(processes=processes, persons_at_once=at_once)), other)
        assert losses(other) == pytest.approx(one, rel=1e-5)
        for name, value in weights(tmp_path / 'one').items():
            torch.testing.assert_close(weights(other)[name], value, rtol=1e-3, atol=1e-5)


def test_two_processes_with_sync_batchnorm_are_one_process(experiment, tmp_path):
    """Statistics over all processes: losses agree to 0.2 % in the first and 1 % in the second epoch, for Adam magnifies rounding."""
    recipe = dict(epochs=2, learning_rate=1e-4, block_rate_factor=2., alpha_rate_factor=5.)
    train(experiment(train=recipe), tmp_path / 'one')
    train(experiment(train=recipe | dict(sync_batchnorm=True), machine=dict(processes=2)), tmp_path / 'sync')
    one, sync = losses(tmp_path / 'one'), losses(tmp_path / 'sync')
    assert sync == pytest.approx(one, rel=1e-2)
    assert sync[1] == pytest.approx(one[1], rel=2e-3)
    for key in ('val_loss', 'val_accuracy'):
        a, b = (read_curves(tmp_path / name / 'curves')[key] for name in ('one', 'sync'))
        assert a == pytest.approx(b, rel=0.05, abs=0.02)
    alphas = [weights(tmp_path / name)['deconv_layers.3.alpha'].item() for name in ('one', 'sync')]
    assert alphas[1] == pytest.approx(alphas[0], rel=0.05) and abs(alphas[0]) > 1e-3  # six steps at the network's own rate come to about 6e-4


AUGMENTED = dict(crops='device', augmentation=dict(scale=0.3, rotation=40.0, rotation_probability=0.6, flip_probability=0.5, dropout_probability=0.5))


def test_crops_of_the_device_are_those_of_the_loader(experiment, tmp_path):
    """But for a grey level here and there; on one process or two, in parts or not, from workers or not."""
    layers = AUGMENTED | dict(freeze=['stem', 'layer1', 'layer2', 'layer3', 'layer4', 'deconv'], epochs=2, learning_rate=0.01)
    train(experiment(train=layers | dict(crops='loader')), tmp_path / 'loader')
    train(experiment(train=layers), tmp_path / 'device')
    assert losses(tmp_path / 'device') == pytest.approx(losses(tmp_path / 'loader'), rel=1e-3)
    for processes, at_once, workers in ((1, 4, 2), (2, 2, 0)):
        other = tmp_path / f'{processes}x{at_once}'
        train(experiment(train=layers, machine=dict(processes=processes, persons_at_once=at_once, workers=workers)), other)
        assert losses(other) == pytest.approx(losses(tmp_path / 'device'), rel=1e-5)


def test_sync_batchnorm_in_half_precision_on_cpu_processes(experiment, tmp_path):
    """As one process with all persons, to the precision of bfloat16; statistics are float32, as they are saved."""
    recipe = dict(epochs=1, learning_rate=1e-4, precision='bf16')
    train(experiment(train=recipe), tmp_path / 'one')
    train(experiment(train=recipe | dict(sync_batchnorm=True), machine=dict(processes=2)), tmp_path / 'sync')
    assert losses(tmp_path / 'sync') == pytest.approx(losses(tmp_path / 'one'), rel=0.02)
    one, sync = weights(tmp_path / 'one'), weights(tmp_path / 'sync')
    for name in ('bn1.running_mean', 'bn1.running_var'):
        assert sync[name].dtype == torch.float32
        torch.testing.assert_close(sync[name], one[name], rtol=0.01, atol=0.01 * one[name].abs().max().item())


def test_same_seed_same_weights(experiment, tmp_path):
    for name in 'ab': train(experiment(), tmp_path / name)
    assert same(weights(tmp_path / 'a'), weights(tmp_path / 'b'))


def test_a_batch_that_cannot_be_shared_is_refused(experiment, tmp_path):
    with pytest.raises(ValueError, match='batch_size 2 cannot be shared by 3 processes'):
        train(experiment(train=dict(batch_size=2), machine=dict(processes=3)), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope='module')
def plain():
    """Weights of a run without any option, once there is one."""
    return {}


@pytest.fixture(scope='module')
def through(tmp_path_factory):
    """Folder of a run that nobody stopped."""
    return tmp_path_factory.mktemp('through')


@pytest.mark.parametrize('option', [
    dict(fused_adam=True), dict(precision='bf16'), dict(precision='fp16'), dict(gradient_clip=1e-4), dict(ema_decay=0.5),
    dict(freeze=['stem', 'layer1']), dict(schedule='cosine'), dict(warmup_epochs=1), dict(seed=1),
    dict(learning_rate=1e-4), dict(batch_size=7), dict(epochs=2),
    dict(block_rate_factor=10.), dict(alpha_rate_factor=30.),
], ids=lambda o: next(iter(o)) + '-' + str(next(iter(o.values()))))
def test_every_option_changes_the_run(experiment, tmp_path, plain, option):
    if not plain:
        train(experiment(), tmp_path / 'plain')
        plain |= weights(tmp_path / 'plain')
    train(experiment(train=option), tmp_path / 'option')
    found = weights(tmp_path / 'option')
    assert found.keys() == plain.keys() and not same(found, plain)
    assert all(t.isfinite().all() for t in found.values())


def test_compile_runs_the_network_through_the_compiler(experiment, tmp_path, monkeypatch):
    real, compiled = torch.compile, []
    monkeypatch.setattr(torch, 'compile', lambda net: compiled.append(net) or real(net, backend='eager'))
    train(experiment(train=dict(compile=True), model=dict(block=None)), tmp_path / 'compiled')
    train(experiment(model=dict(block=None)), tmp_path / 'plain')
    assert len(compiled) == 1 and torch._dynamo.utils.counters['stats']['unique_graphs'] > 0
    assert losses(tmp_path / 'compiled') == pytest.approx(losses(tmp_path / 'plain'), rel=1e-3)
    assert weights(tmp_path / 'compiled').keys() == weights(tmp_path / 'plain').keys()


def test_validation_has_its_cadence_and_ap_chooses_the_best(experiment, tmp_path):
    train(experiment(train=dict(epochs=3, validate_every=2, validate_ap=True)), tmp_path)
    curves = read_curves(tmp_path / 'curves')
    assert {name: list(values) for name, values in curves.items()} == {
        'alpha_deconv_layers.3': [1, 2, 3], 'learning_rate': [1, 2, 3], 'train_loss': [1, 2, 3], 'val_loss': [2, 3], 'val_accuracy': [2, 3], 'val_ap': [2, 3]}
    assert json.loads((tmp_path / 'train.json').read_text())['best'] == max(curves['val_ap'].values())
    assert load_checkpoint(tmp_path / 'best.pt')[1] == load_checkpoint(tmp_path / 'model.pt')[1]


def test_training_starts_from_a_checkpoint_with_another_head(experiment, tmp_path, capsys):
    start = PoseResNet('resnet18', num_keypoints=5)
    torch.save(start.state_dict(), tmp_path / 'five.pth')
    layers = dict(start_from=str(tmp_path / 'five.pth'), start_color_order='BGR', freeze=['stem', 'layer1'])
    train(experiment(train=layers, model=dict(block=None)), tmp_path / 'out')
    assert 'head replaced: 5 keypoints there, 17 here' in capsys.readouterr().out
    found = weights(tmp_path / 'out')
    assert torch.equal(found['conv1.weight'], start.conv1.weight.flip(1))
    assert not torch.equal(found['layer2.0.conv1.weight'], start.layer2[0].conv1.weight)


def test_a_checkpoint_to_start_from_is_looked_for_before_training(experiment):
    with pytest.raises(ValueError, match='nowhere.pt: no such file .train.start_from.'):
        experiment(train=dict(start_from='nowhere.pt')).check_data()


class Stop(Exception):
    pass


@pytest.mark.parametrize('epoch,step,crops', [(0, 1, 'loader'), (1, 0, 'loader'), (1, 2, 'loader'), (1, 1, 'device')])
def test_a_stopped_run_continues_exactly(experiment, through, tmp_path, monkeypatch, epoch, step, crops):
    """With averaged weights, augmentation and loading processes; wherever it stopped, curves and weights end alike."""
    recipe = AUGMENTED | dict(epochs=2, ema_decay=0.9, warmup_epochs=1, crops=crops)
    row = experiment(train=recipe, machine=dict(checkpoint_steps=1, workers=1))
    through /= crops
    if not (through / 'model.pt').exists(): fit(row, through)
    count = Progress.step

    def counted(self, *args):
        count(self, *args)
        if self.done == epoch * self.steps + step + 1: raise Stop  # before a checkpoint knows of it

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Progress, 'step', counted)
        fit(row, tmp_path / 'stopped')
    summary = fit(row, tmp_path / 'stopped')
    assert summary['interruptions'] == (1 if epoch or step else 0)
    assert same(weights(through), weights(tmp_path / 'stopped'))
    assert same(read_checkpoint(through / 'best.pt')['model'], read_checkpoint(tmp_path / 'stopped' / 'best.pt')['model'])
    assert read_curves(through / 'curves') == read_curves(tmp_path / 'stopped' / 'curves')


def test_a_full_disk_stops_training_and_keeps_the_previous_checkpoint(experiment, tmp_path, monkeypatch):
    row, calls = experiment(machine=dict(checkpoint_steps=1)), []
    real = os.fsync

    def fsync(number):
        calls.append(number)
        if len(calls) > 2: raise OSError(28, 'No space left on device')  # in the second checkpoint, two calls each
        real(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', fsync)
        with pytest.raises(CheckpointError, match=r'last.pt: checkpoint could not be written \(No space left on device\); the previous one is intact'):
            train(row, tmp_path)
    assert read_checkpoint(tmp_path / 'last.pt')['training']['step'] == 1
    assert not list(tmp_path.glob('.partial-*'))
    train(row, tmp_path)


def test_a_loss_that_is_no_number_names_the_images_and_the_last_checkpoint(experiment, tmp_path, monkeypatch):
    row = experiment(machine=dict(checkpoint_steps=1))
    seen = []

    def loss(prediction, targets, weights):
        seen.append(len(targets))
        return prediction.mean() * (float('nan') if len(seen) == 2 else 1.0)

    monkeypatch.setattr('srl_pose.training.train.heatmap_loss', loss)
    with pytest.raises(FloatingPointError, match=r'loss is nan in epoch 1, step 2; images .*; the last good checkpoint is .*last.pt'):
        train(row, tmp_path)
    assert read_checkpoint(tmp_path / 'last.pt')['training']['step'] == 1


def test_a_failing_worker_shows_its_own_error(experiment, tmp_path):
    broken = experiment(machine=dict(processes=2))
    broken = broken.model_copy(update={'data': broken.data.model_copy(update={'train': 'nowhere'})})
    with pytest.raises(WorkerError, match='person_keypoints_nowhere.json'):
        train(broken, tmp_path)
    assert not (tmp_path / 'model.pt').exists()


def stop_at(monkeypatch, done):
    """Makes a run stop when it counts this step."""
    count = Progress.step

    def counted(self, *args):
        count(self, *args)
        if self.done == done: raise Stop
    monkeypatch.setattr(Progress, 'step', counted)


def test_another_rate_and_back_again_continues_where_the_first_stood(experiment, tmp_path, monkeypatch, capsys):
    """Nothing of either is lost, however often they change; the end is that of a run that nobody interrupted."""
    rows = {rate: experiment(train=dict(epochs=3, learning_rate=rate), machine=dict(checkpoint_steps=1)) for rate in (1e-3, 1e-4)}
    for rate, row in rows.items(): fit(row, tmp_path / f'through{rate}')
    for rate, done in [(1e-3, 4), (1e-4, 3), (1e-3, 6), (1e-4, 5)]:
        with monkeypatch.context() as patch, pytest.raises(Stop):
            stop_at(patch, done)
            fit(rows[rate], tmp_path / 'both')
    said = capsys.readouterr().out
    assert said.count('set aside as last-') == 3 and said.count('continuing at') == 2
    for rate, row in rows.items():
        fit(row, tmp_path / 'both')
        assert same(weights(tmp_path / f'through{rate}'), weights(tmp_path / 'both'))
        assert same(*(read_checkpoint(tmp_path / name / 'best.pt')['model'] for name in (f'through{rate}', 'both')))
        assert losses(tmp_path / f'through{rate}') == losses(tmp_path / 'both')


def test_a_named_checkpoint_is_not_taken_twice(experiment, tmp_path, monkeypatch):
    """A command with --resume that is interrupted and given again goes on, and what lies in its folder is kept."""
    row = experiment(train=dict(epochs=3), machine=dict(checkpoint_steps=1))
    fit(row, tmp_path / 'through')
    for folder, done in [('named', 2), ('out', 4)]:
        with monkeypatch.context() as patch, pytest.raises(Stop):
            stop_at(patch, done)
            fit(row, tmp_path / folder, tmp_path / 'named' / 'last.pt' if folder == 'out' else None)
    assert read_checkpoint(tmp_path / 'out' / 'last.pt')['training']['seen'] > read_checkpoint(tmp_path / 'named' / 'last.pt')['training']['seen']
    summary = fit(row, tmp_path / 'out', tmp_path / 'named' / 'last.pt')
    assert summary['interruptions'] == 2 and same(weights(tmp_path / 'through'), weights(tmp_path / 'out'))


def second_fails():
    """One process of two has a reason; the other one only loses its connection."""
    if rank_and_world()[0]: raise KeyError('the reason')
    gather('everybody')


def test_the_first_cause_is_shown(tmp_path):
    for n in range(3):
        with pytest.raises(WorkerError, match=r'(?s)process 1 of 2 failed.*the reason'):
            launch(second_fails, device=torch.device('cpu'), processes=2, restarts=0, logs=tmp_path)


def test_the_first_cause_is_shown_by_torchrun(experiment, tmp_path):
    """Its own report names it as the root cause."""
    (tmp_path / 'second.py').write_text('import torch\nfrom torch.distributed.elastic.multiprocessing.errors import record\n'
                                        'from srl_pose.training.launch import gather, process_group, rank_and_world\n'
                                        'def work():\n    with process_group(torch.device("cpu")):\n'
                                        '        if rank_and_world()[0]: raise KeyError("the reason")\n        gather("everybody")\nrecord(work)()\n')
    done = subprocess.run(['torchrun', '--nproc-per-node', '2', 'second.py'], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(project_root())})
    root = done.stderr.partition('Root Cause')[2]
    assert done.returncode and 'rank      : 1' in root and 'the reason' in root, done.stderr

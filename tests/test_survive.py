"""Killed, interrupted and failing training: nothing is lost, nobody is left behind, and the reason is shown."""
import json
import os
import signal
import socket
import subprocess
import time

import pytest
import torch
from srl_pose.training.checkpoint import read_checkpoint
from srl_pose.files import project_root
from srl_pose.benchmarks.survive import CONTAINER, Command, kill_one, make_project, run_folder, same_weights, survive

slow = pytest.mark.kill  # run by `make survive`, not by `make test`


def weights(project):
    return read_checkpoint(run_folder(project) / 'model.pt')['model']


@pytest.fixture(scope='module')
def killed(tmp_path_factory):
    """The short form of `python -m srl_pose.benchmarks.survive`, and the folder of its projects."""
    folder = tmp_path_factory.mktemp('survive') / 'work'
    return survive(folder, {'python': ['rank 0']}, epochs=2), folder


def test_killed_training_ends_with_the_same_weights(killed):
    report, _ = killed
    assert report['passed'], json.dumps(report, indent=1)
    assert report['survived'] == 1 and report['series'][0]['identical']


@slow
def test_a_killed_stage_ends_with_the_same_weights(tmp_path):
    report = survive(tmp_path / 'work', {'dvc repro': ['kernel', 'dvc repro'], 'torchrun': ['launcher']}, epochs=2)
    assert report['passed'], json.dumps(report, indent=1)
    assert report['survived'] == 3 and all(s['identical'] for s in report['series'])


@slow
def test_process_1_of_a_container_may_be_the_launcher(tmp_path):
    """Of torchrun, and of `train` itself; killed and started again."""
    if subprocess.run([*CONTAINER, 'true']).returncode: pytest.skip('no namespaces for processes here')
    report = survive(tmp_path / 'work', {'torchrun in a container': ['launcher'], 'python in a container': ['launcher']}, epochs=2)
    assert report['passed'], json.dumps(report, indent=1)


@slow
@pytest.mark.parametrize('name', ['torchrun', 'python', 'dvc repro'])
def test_a_polite_end_is_survived(killed, tmp_path, name):
    """SIGTERM, as a cluster sends it before it kills."""
    project = make_project(tmp_path / 'project', epochs=2)
    command = Command(name, project, 0)
    found = kill_one(command, 'dvc repro' if name == 'dvc repro' else 'launcher', 5, 0.0, signal.SIGTERM)
    assert found['killed'] and found['status'] != 0 and found['orphans'] == [] and found['seconds_to_end'] < 40
    again = Command(name, project, 1)
    assert again.wait() == 0 and 'continuing at epoch' in again.log.read_text()
    assert same_weights(project, killed[1] / 'untouched')


@slow
def test_another_rate_and_back_again_loses_nothing(killed, tmp_path):
    """Each `dvc repro` is interrupted; the last one goes on where the first one stood."""
    project, params = make_project(tmp_path / 'project', epochs=2), tmp_path / 'project' / 'params.yaml'
    first = params.read_text()
    for number, text in enumerate([first, first.replace('batch_size: 8,', 'batch_size: 8, learning_rate: 0.01,')]):
        params.write_text(text)
        assert kill_one(Command('dvc repro', project, number), 'dvc repro', 5, 0.0)['orphans'] == []
    params.write_text(first)
    command = Command('dvc repro', project, 2)
    assert command.wait() == 0
    assert 'set aside as last-' in command.log.read_text() and 'continuing at epoch' in command.log.read_text()
    assert same_weights(project, killed[1] / 'untouched')


@slow
def test_a_killed_worker_is_started_again_by_the_engine(killed, tmp_path):
    project = make_project(tmp_path / 'project', epochs=2)
    params = project / 'params.yaml'
    params.write_text(params.read_text().replace('restarts: 0', 'restarts: 1'))
    command = Command('python', project, 0)
    found = kill_one(command, 'worker', 5, 0.0)
    assert found['killed'] == 'worker' and found['status'] == 0 and found['orphans'] == []
    assert 'continuing at epoch' in command.log.read_text()
    expected = weights(killed[1] / 'untouched')
    assert all(torch.equal(t, expected[name]) for name, t in weights(project).items())


@slow
def test_ctrl_c_leaves_nobody_behind(tmp_path):
    project = make_project(tmp_path / 'project', epochs=3)
    command = Command('dvc repro', project, 0)
    while command.process.poll() is None and len(command.positions()) < 4:
        command.family()
        time.sleep(0.1)
    os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does
    assert command.wait(60) != 0
    assert command.left_over() == []
    assert read_checkpoint(run_folder(project) / 'last.pt')['training']['step'] > 0


@slow
def test_a_failing_stage_shows_the_traceback_of_its_worker(tmp_path):
    """An image that only decoding finds out to be broken: the reason is on the terminal and in the executed notebook."""
    project = make_project(tmp_path / 'project', epochs=1, images=6)
    params = project / 'params.yaml'
    params.write_text(params.read_text().replace('restarts: 0', 'restarts: 1'))
    broken = sorted((project / 'data' / 'images' / 'train').iterdir())[0]
    broken.write_bytes(b'\xff\xd8' + bytes(500) + b'\xff\xd9')
    command = Command('dvc repro', project, 0)
    assert command.wait() != 0
    notebook = (run_folder(project) / 'train.ipynb').read_text()
    for text in (command.log.read_text(), notebook):
        assert f'{broken.name}: image cannot be decoded' in text and 'also after 1 restarts' in text
        assert 'in read_image' in text  # the worker's own traceback
    assert command.left_over() == []
    assert not (run_folder(project) / 'model.pt').exists()


@slow
def test_slurm_script_trains_on_two_machines(tmp_path):
    """The real script and torchrun; srun and scontrol are stand-ins that start both "machines" here."""
    project, stubs = make_project(tmp_path / 'project', epochs=1, images=4), tmp_path / 'bin'
    stubs.mkdir()
    (stubs / 'scontrol').write_text('#!/bin/sh\necho localhost\n')
    (stubs / 'srun').write_text('#!/bin/bash\nshift\n"$@" & first=$!\n"$@" & wait $! && wait $first\n')
    for file in stubs.iterdir(): file.chmod(0o755)
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    environment = {**os.environ, 'PATH': f'{stubs}:{os.environ["PATH"]}', 'PYTHONPATH': str(project), 'OMP_NUM_THREADS': '1',
                   'SLURM_JOB_NODELIST': 'here', 'SLURM_NNODES': '2', 'SLURM_JOB_ID': '7', 'PROCESSES_PER_NODE': '1',
                   'MASTER_PORT': str(port)}
    done = subprocess.run([project_root() / 'scripts' / 'slurm.sh', 'tiny'], cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run_folder(project) / 'train.json').read_text())['processes'] == 2

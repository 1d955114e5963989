"""A row that was run on one machine is taken over by another, through a DVC remote."""
import json
import os
import re
import shutil
import subprocess

from srl_pose.benchmarks.survive import make_project, run_folder


def test_a_pushed_row_is_pulled_and_shown_elsewhere(tmp_path):
    """What is pushed with its lock file is pulled bit for bit, counts as done, and stands on the page."""
    there, here = (make_project(tmp_path / name, epochs=1, images=4) for name in ('there', 'here'))
    for project in (there, here):
        params = project / 'params.yaml'
        params.write_text(params.read_text().replace('processes: 2', 'processes: 1').replace('workers: 1', 'workers: 0'))

    def dvc(project, *command):
        environment = {**os.environ, 'PYTHONPATH': str(project), 'OMP_NUM_THREADS': '1'}
        done = subprocess.run(['dvc', *command], cwd=project, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    for project in (there, here):
        dvc(project, 'remote', 'add', 'storage', str(tmp_path / 'storage'))
    dvc(there, 'repro', 'evaluate@tiny-0', 'measure@tiny')
    dvc(there, 'push', '--remote', 'storage', 'train@tiny-0', 'evaluate@tiny-0', 'measure@tiny')
    shutil.copy(there / 'dvc.lock', here)
    dvc(here, 'pull', '--remote', 'storage', 'train@tiny-0', 'evaluate@tiny-0', 'measure@tiny')
    for name in ('model.pt', 'best.pt', 'train.json', 'keypoints_val_results.json'):
        assert (run_folder(here) / name).read_bytes() == (run_folder(there) / name).read_bytes()
    again = dvc(here, 'repro', 'evaluate@tiny-0', 'measure@tiny')
    assert re.findall(r"Running stage '(.*?)'", again) == ['code'], again
    assert 'up to date' in dvc(here, 'status', 'evaluate@tiny-0', 'measure@tiny', '--with-deps')
    assert 'Running stage' in dvc(here, 'repro', '--single-item', 'table')
    metrics = json.loads((here / 'outputs/tiny/tiny/metrics/tiny-0.json').read_text())
    page = (here / 'outputs/tiny/tiny/tables/results.md').read_text()
    assert f'{metrics["scores"]["PCK"]:.3f}' in page and metrics['training']['provenance']['device'] in page

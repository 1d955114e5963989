"""Parameter files: committed numbers still belong to them, and the commands in their heads work."""
import re
import shutil
from pathlib import Path

import pytest
from dvc.exceptions import DvcException
from dvc.utils.hydra import apply_overrides

from srl_pose.evaluation.metrics import read_metrics
from srl_pose.experiment.params import load_experiments, load_set
from srl_pose.results.measure import read_measured

ROOT = Path(__file__).parent.parent
RESULTS, SETS = ROOT / 'results', [ROOT / 'params.yaml', *sorted((ROOT / 'experiments').glob('*.yaml'))]


@pytest.mark.parametrize('folder', sorted(RESULTS.glob('*/*/metrics')), ids=lambda p: p.relative_to(RESULTS).as_posix())
def test_committed_metrics_are_of_the_experiments_of_today(folder):
    """With other parameters than they were made with, they would be left out of the pages."""
    name, recipe, _ = folder.relative_to(RESULTS).parts
    rows, files = load_set(name, recipe=recipe), sorted(folder.glob('*.json'))
    for path in files:
        row, _, seed = path.stem.rpartition('-')
        assert read_metrics(path, rows[row].with_seed(int(seed))).scores
    assert files


@pytest.mark.parametrize('folder', sorted(RESULTS.glob('*/measured')), ids=lambda p: p.relative_to(RESULTS).as_posix())
def test_committed_costs_are_of_the_networks_of_today(folder):
    rows = load_set(folder.parent.name)
    for path in folder.glob('*.json'): read_measured(path, rows[path.stem])
    assert {path.stem for path in folder.glob('*.json')} == set(rows)


@pytest.mark.parametrize('path', SETS, ids=lambda p: p.stem)
def test_values_can_be_changed_on_the_command_line(path, tmp_path):
    """`dvc exp run -S` changes the file as its head says, for parameters that are named in it and others."""
    file = Path(shutil.copy(path, tmp_path / 'params.yaml'))
    shown = re.findall(r'-S (\S+?=[^\s)]+)', path.read_text())
    assert len(shown) > 1 and all(change.startswith('++') for change in shown)
    for change in shown:
        apply_overrides(file, [change])
        keys, _, value = change.removeprefix('++').partition('=')
        experiments = load_experiments(file).values()
        *_, section, key = keys.split('.')
        assert {str(getattr(getattr(e, section), key)) for e in experiments} == {value}


def test_a_parameter_that_the_file_does_not_name_needs_a_plus(tmp_path):
    file = Path(shutil.copy(ROOT / 'params.yaml', tmp_path))
    with pytest.raises(DvcException) as refused: apply_overrides(file, ['train.compile=true'])
    assert 'To append to your config use +train.compile=true' in str(refused.value.__cause__)

"""What may be compared, what may be measured, and whose numbers a card may give: refusals, on pages and in files."""
import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from srl_pose.evaluation.cocoeval import METRICS
from srl_pose.evaluation.metrics import RunMetrics, weights_digest, write_metrics
from srl_pose.experiment.params import load_set
from srl_pose.files import project_root, write_json
from srl_pose.results.compare import measured_file, read_rows
from srl_pose.results.measure import Measured, _time_and_memory
from srl_pose.results.pages import write_pages
from srl_pose.testing import changed, invented_cost, invented_run
from srl_pose.training.checkpoint import CheckpointError, load_trained, save_checkpoint

ROOT = project_root(Path(__file__).parent)
PARAMS = """
set: demo
recipe: short
seeds: [0, 1, 2]
data: {}
model: {backbone: resnet18, input_size: 64x64, weights: null}
train: {}
evaluate: {}
machine: {device: cpu}
recipes:
  short: {model: {}, train: {}, evaluate: {}}
rows:
  none: {model: {block: null}, train: {}, evaluate: {}}
  fft: {model: {block: fft}, train: {}, evaluate: {}}
  longer: {model: {block: fft}, train: {epochs: 150}, evaluate: {}}
  mirrored: {model: {block: fft}, train: {}, evaluate: {flip_test: false}}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose rows have runs and costs; `run` and `cost` may be changed before the pages are written."""
    (tmp_path / 'settings.ini').write_text('')
    (tmp_path / 'params.yaml').write_text(PARAMS)
    monkeypatch.chdir(tmp_path)
    from srl_pose.experiment.params import load_experiments
    rng, rows = np.random.default_rng(0), load_experiments(tmp_path / 'params.yaml')
    images = 0.02 * rng.standard_normal(100)
    for place, e in enumerate(rows.values()):
        for one in map(e.with_seed, e.seeds):
            ap = 0.5 + 0.1 * (place > 0) + 0.005 * rng.standard_normal()
            scores = dict.fromkeys(METRICS, 0.5) | dict(AP=ap)
            write_metrics(RunMetrics.model_validate(invented_run(one, scores, ap + images + 0.002 * rng.standard_normal(100))), one.metrics_file())
        write_json(measured_file(e), invented_cost(e, **({} if e.model.block else dict(ratio_alone=None, ratio_in_batch=None))))
    return rows


def edit(path, change):
    content = json.loads(Path(path).read_text())
    change(content)
    Path(path).write_text(json.dumps(content))


def pages(tmp_path):
    out = write_pages(tmp_path / 'params.yaml', tmp_path / 'pages')
    return (out / 'results.md').read_text(), {line['row']: line for line in csv.DictReader((out / 'results.csv').open())}


def test_a_row_of_another_recipe_or_another_evaluation_is_not_compared(project, tmp_path):
    text, table = pages(tmp_path)
    assert float(table['fft']['AP_difference']) == pytest.approx(0.1, abs=0.02) and table['fft']['AP_both_low']
    assert table['longer']['AP_difference'] == table['mirrored']['AP_difference'] == '' and table['longer']['AP']
    assert '- no comparison of `longer` with `none`, since more differs than the block: train.epochs: 140 (none-0, none-1, none-2) against 150 (longer-0' in text
    assert '- no comparison of `mirrored` with `none`, since more differs than the block: evaluate.flip_test: True (' in text
    assert text.count('not comparable') == 2 * 4 * 2  # both rows, four columns, AP and PCK


@pytest.mark.parametrize('name,change', [
    ('training annotations', lambda run: run['training'].update(data_sha256='a' * 64)),
    ('training code', lambda run: run['training'].update(code_sha256='a' * 64)),
    ('starting weights', lambda run: run['training'].update(start_sha256='a' * 64)),
    ('processes', lambda run: run['training'].update(processes=1)),
    ('processes × persons at once', lambda run: run['training'].update(shares=[[8, 32], [8, 16]])),
    ('evaluation annotations', lambda run: run['evaluation'].update(annotation_sha256='a' * 64)),
    ('evaluation code', lambda run: run.update(code_sha256='a' * 64))])
def test_one_run_that_was_made_otherwise_stops_the_comparison(project, tmp_path, name, change):
    edit(project['fft'].with_seed(1).metrics_file(), change)
    text, table = pages(tmp_path)
    assert table['fft']['AP_difference'] == '' and table['fft']['AP']
    assert f'- no comparison of `fft` with `none`, since more differs than the block: {name}: ' in text and '(fft-1)' in text


def test_what_an_older_run_does_not_record_is_said_once_and_not_held_against_it(project, tmp_path):
    def forget(run):
        for name in ('data_sha256', 'code_sha256', 'parameters_sha256', 'shares'): del run['training'][name]
        del run['evaluation']['annotation_sha256'], run['code_sha256'], run['weights_sha256']
    for e in project.values():
        for seed in e.seeds: edit(e.with_seed(seed).metrics_file(), forget)
    text, table = pages(tmp_path)
    assert table['fft']['AP_difference']
    assert text.count('not recorded by') == 1 and '- not recorded by any run: training annotations, processes × persons at once, evaluation annotations, digests of the code;' in text
    edit(project['fft'].with_seed(1).metrics_file(), lambda run: run['training']['provenance']['code'].update(commit='d' * 40))
    assert pages(tmp_path)[1]['fft']['AP_difference'] == ''  # another commit is recorded


def test_runs_with_fewer_draws_are_compared_on_those_that_all_have(project, tmp_path):
    edit(project['fft'].with_seed(1).metrics_file(), lambda run: run['draws'].update(AP=run['draws']['AP'][:60]))
    text, table = pages(tmp_path)
    assert table['fft']['AP_difference'] and 'bootstrap of 60 or 100 draws' in text


@pytest.mark.parametrize('taken', [dict(load=9.), dict(cpu_share=0.4), dict(ratio=[0.9, 1.1], seconds=[0.01, 0.2]), dict(rounds=4)])
def test_a_time_of_a_busy_machine_is_not_shown(project, tmp_path, taken):
    edit(measured_file(project['fft']), lambda cost: cost['alone'].update(taken))
    text, table = pages(tmp_path)
    assert (table['fft']['seconds_alone'], table['fft']['ratio_alone']) == ('', '') and table['fft']['seconds_in_batch']
    line = next(line for line in text.split('## What it costs')[1].splitlines() if line.startswith('| `fft`'))
    assert line.count('–, machine busy') == 2
    assert '- "–, machine busy", in `fft`: ' in text


def test_a_time_that_says_nothing_of_the_machine_is_not_shown(project, tmp_path):
    for e in project.values(): edit(measured_file(e), lambda cost: (cost.pop('alone'), cost.pop('in_batch')))
    text, table = pages(tmp_path)
    assert (table['fft']['seconds_alone'], table['fft']['ratio_in_batch']) == ('', '') and table['fft']['flops']
    assert text.count('–, not recorded') == sum(4 if e.model.block else 2 for e in project.values()) and '- not recorded with the times of all rows: quartiles, rounds and the load' in text


def test_measuring_notes_what_else_ran(monkeypatch):
    experiment = load_set('sample')['fft']
    loads = iter([1.0, os.cpu_count() + 3.0, 1.0, 1.0])
    monkeypatch.setattr('os.getloadavg', lambda: (next(loads), 0, 0))
    found = _time_and_memory(experiment, batch=2, persons=2, least=0.1, threads=1)
    cost = Measured.model_validate(invented_cost(experiment, **found))
    assert cost.alone.load == os.cpu_count() + 3 and cost.doubt('seconds_alone') == cost.doubt('ratio_alone') == 'machine busy'
    assert cost.in_batch.load == 1 and 0 < cost.in_batch.cpu_share < 1.5 and cost.form in ('C', 'torch')


def test_evaluation_refuses_weights_of_another_experiment(tmp_path, monkeypatch):
    experiment = changed(load_set('sample')['none'], 'data', root=str(ROOT / 'sample'))
    (tmp_path / 'settings.ini').write_text('')
    monkeypatch.chdir(tmp_path)
    folder = experiment.run_folder()
    folder.mkdir(parents=True)
    save_checkpoint(folder / 'model.pt', experiment.build_model(pretrained=False), experiment, {})
    assert load_trained(folder / 'model.pt', experiment)[1] == {}
    monkeypatch.setattr('srl_pose.experiment.params.load_experiment', lambda row, seed: changed(experiment, 'train', epochs=9))
    cells = [''.join(c['source']) for c in json.loads((ROOT / 'nbs/stages/evaluate.ipynb').read_text())['cells'] if c['cell_type'] == 'code']
    with pytest.raises(CheckpointError, match=r'model\.pt: train\.epochs: these weights were trained with 3, params.yaml says 9: .*dvc repro train@none-0'):
        exec('\n'.join(cells), {})
    assert not experiment.metrics_file().exists()


def test_a_card_takes_the_metrics_of_its_own_weights(tmp_path):
    share = pytest.importorskip('srl_pose.use.share').share
    e = changed(load_set('sample')['fft'], 'data', root=str(ROOT / 'sample'))
    model = e.build_model()
    save_checkpoint(tmp_path / 'model.pt', model, e, {}, identity=dict(parameters='1', data='2' * 64, code='3' * 64, start=None))
    run = RunMetrics.model_validate(invented_run(e, dict.fromkeys(METRICS, 0.5), [0.4, 0.6])).model_copy(update=dict(weights_sha256=weights_digest(model.state_dict())))
    share(tmp_path / 'model.pt', tmp_path / 'good', data_licence='MIT', metrics=run)
    with torch.no_grad(): model.final_layer.bias += 1
    save_checkpoint(tmp_path / 'best.pt', model, e, {}, identity=dict(parameters='1', data='2' * 64, code='3' * 64, start=None))
    for file, values, name in [('best.pt', {}, 'weights'), ('model.pt', dict(seed=1), 'seed'), ('model.pt', dict(row='nl'), 'row'), ('model.pt', dict(recipe='x'), 'recipe')]:
        with pytest.raises(CheckpointError, match=f'{file}: {name}: is .*, the metrics are of .*: evaluate this checkpoint'):
            share(tmp_path / file, tmp_path / 'bad', data_licence='MIT', metrics=run.model_copy(update=values))
    assert not (tmp_path / 'bad').exists()


def test_rows_that_cannot_stand_in_one_column_are_refused(project):
    edit(project['fft'].with_seed(1).metrics_file(), lambda run: run['draws'].update(images='1'))
    with pytest.raises(ValueError, match='cannot stand in one column'): read_rows(project)

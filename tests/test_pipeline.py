"""Packages import only packages below them, and dvc.yaml names all that a stage depends on, and no more."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from dvc.dependency.param import ParamsDependency
from dvc.exceptions import DvcException
from dvc.repo import Repo
from ruamel.yaml import YAML

from srl_pose.benchmarks.survive import make_project
from srl_pose.experiment.params import ParameterError, load_experiments, load_set
from srl_pose.experiment.provenance import imports_of, modules_behind
from srl_pose.training.identity import LOOK_ON, parameters

ROOT = Path(__file__).parent.parent
STAGES = YAML(typ='safe').load((ROOT / 'dvc.yaml').read_text())['stages']
MODULES = sorted('.'.join(p.relative_to(ROOT / 'srl_pose').with_suffix('').parts).removesuffix('.__init__')
                 for p in (ROOT / 'srl_pose').rglob('*.py') if p.stem != '_modidx' and p.parent / p.stem != ROOT / 'srl_pose' / '__init__')
# from the ground up; modules right in srl_pose are the ground, and the appendices stand on the blocks that they make faster
FLOORS = ['', 'blocks', 'blocks.cpu', 'blocks.gpu', 'pose', 'data', 'experiment', 'evaluation', 'training', 'results', 'pipeline', 'use', 'sample', 'benchmarks']


PLUG = {'blocks': {'blocks.cpu', 'blocks.cpu.fast', 'blocks.cpu.matrix_native', 'blocks.gpu', 'blocks.gpu.fast'}}  # the one arrow upwards: the package of the blocks plugs the appendices in (nbs/9_cpu/07_plug_in.ipynb)


def floor_of(module):
    return FLOORS.index(module if module in FLOORS else module.rpartition('.')[0])


@pytest.mark.parametrize('module', MODULES)
def test_a_floor_stands_only_on_floors_below_it(module):
    """Wherever in the file the import stands. So there is no circle between packages, either."""
    above = {name for name in imports_of(module) & set(MODULES) if floor_of(name) > floor_of(module)}
    assert above == PLUG.get(module, set())


def test_notebooks_stand_in_the_order_of_the_floors():
    """A notebook's chapter is its module's package, and chapters follow the floors, the appendices apart."""
    chapters = {}
    for path in sorted((ROOT / 'nbs').glob('[1-8]_*/*.ipynb')):
        first = next(line for line in path.read_text().splitlines() if '"source"' not in line and '#|' in line or '"# ' in line)
        if '#| default_exp' in first: chapters.setdefault(path.parent.name, []).append(first.split()[-1].strip('",').rpartition('.')[0])
    assert [FLOORS.index(package) for packages in chapters.values() for package in packages] == sorted(
        FLOORS.index(package) for packages in chapters.values() for package in packages)
    assert set(FLOORS) == {package for packages in chapters.values() for package in packages} | {'', 'blocks.cpu', 'blocks.gpu', 'pipeline'}


@pytest.mark.parametrize('stage,modules,aside', [
    ('train', ['training.train', 'experiment.params'], {*LOOK_ON, 'evaluation', 'timing'}),  # training looks through these, but no weight depends on them
    ('evaluate', ['evaluation.evaluate', 'evaluation.metrics', 'experiment.params'], {'timing'}),  # the name of the machine
    ('measure', ['pose.pose_net', 'pose.flops', 'results.measure'], {'data', 'experiment', 'evaluation', 'results', 'files'}),  # of a network, not of a run
    ('table', ['results.pages', 'results.table', 'results.compare', 'results.published'], {'blocks', 'pose', 'data', 'timing'})])  # no network runs
def test_a_stage_depends_on_all_code_that_decides_its_result(stage, modules, aside):
    deps = {ROOT / dep.replace('outputs/code', 'srl_pose') for dep in STAGES[stage]['deps'] if dep.startswith('outputs/code/')}
    assert all(dep.exists() for dep in deps)
    missing = {name for name, file in modules_behind(*modules).items() if not deps & {file, *file.parents}}
    assert {name for name in missing if name not in aside and name.partition('.')[0] not in aside} == set()


@pytest.fixture(scope='module')
def code_hashes(tmp_path_factory):
    """What DVC compares: the digest of all code that each stage depends on, in a copy of the project."""
    copy = tmp_path_factory.mktemp('project')
    for name in ('settings.ini', 'dvc.yaml', 'params.yaml', '.dvcignore'): shutil.copy(ROOT / name, copy)
    for name in ('nbs', 'srl_pose'): shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns('.ipynb_checkpoints', '__pycache__'))
    Repo.init(str(copy), no_scm=True)

    def hashes():
        environment = {**os.environ, 'PYTHONPATH': str(copy)}
        subprocess.run([sys.executable, '-m', 'dvc', 'repro', '--quiet', 'code'], cwd=copy, check=True, env=environment)
        with Repo(str(copy)) as repo:
            return {(stage.name, dep.def_path): str(dep.get_hash()) for stage in repo.index.stages for dep in stage.deps if dep.def_path.startswith('outputs/code/')}
    return copy, hashes


def stages_of(names):
    return {name.split('@')[0] for name, _ in names}


def add_words(cell):
    """A sentence in Markdown and in the line under a title; a comment in exported code."""
    text = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown': text = re.sub('(?m)^> .*', r'\g<0> Another sentence.', text) + '\nOne more sentence.'
    elif text.startswith('#| export'): text += '\n# A comment'
    cell['source'] = text.splitlines(True)


def add_to_docstrings(source):
    lines = source.splitlines(True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            line, at = node.body[0].value.lineno - 1, node.body[0].value.col_offset
            at += 3 if lines[line][at:at + 3] == '"""' else 1
            lines[line] = lines[line][:at] + 'In short: ' + lines[line][at:]
    return ''.join(lines)


def test_words_change_no_stage(code_hashes):
    """More words in every notebook, exported again, and in every docstring."""
    copy, hashes = code_hashes
    before = hashes()
    assert stages_of(before) == set(STAGES) - {'code'}
    for path in (copy / 'nbs').rglob('*.ipynb'):
        notebook = json.loads(path.read_text())
        for cell in notebook['cells']: add_words(cell)
        path.write_text(json.dumps(notebook))
    subprocess.run([Path(sys.executable).with_name('nbdev_export')], cwd=copy, check=True)
    for path in (copy / 'srl_pose').rglob('*.py'): path.write_text(add_to_docstrings(path.read_text()))
    changed = (copy / 'srl_pose' / 'pose' / 'oks.py').read_text()
    assert all(words in changed for words in ('Another sentence.', 'In short: ', '# A comment')) and 'One more sentence.' not in changed
    assert hashes() == before


def test_what_python_leaves_changes_no_stage_but_code_does(code_hashes):
    copy, hashes = code_hashes
    before = hashes()
    for folder in ('__pycache__', '.ipynb_checkpoints'):
        (copy / 'srl_pose' / 'pose' / folder).mkdir(exist_ok=True)
        (copy / 'srl_pose' / 'pose' / folder / 'oks.py').write_text('1')
    assert hashes() == before
    with (copy / 'srl_pose' / 'pose' / 'oks.py').open('a') as file: file.write('x = 1\n')
    assert stages_of(key for key, digest in hashes().items() if digest != before[key]) == {'train', 'evaluate', 'measure'}


def test_the_table_depends_on_all_metrics():
    assert {'outputs/${set}/${recipe}/metrics', 'outputs/${set}/measured', 'results'} <= set(STAGES['table']['deps'])


def test_a_cost_depends_on_no_data_and_no_training():
    assert not any('data' in dep.split('/') or 'training' in dep for dep in STAGES['measure']['deps'])
    assert not any('train' in p for p in STAGES['measure']['params'])


def test_every_parameter_decides_something():
    """Each section of params.yaml except `machine` is watched by a stage."""
    sections = set(YAML(typ='safe').load((ROOT / 'params.yaml').read_text()))
    watched = {p.split('.')[0] for s in STAGES.values() for p in s.get('params', [])}
    assert sections - {'machine'} == watched


def table_of_what_runs_again():
    """Columns of the table in the notebook of identity, by the pattern of a parameter's name."""
    notebook, = (ROOT / 'nbs' / '4_training').glob('*_identity.ipynb')
    cells = json.loads(notebook.read_text())['cells']
    lines = [line for cell in cells if cell['cell_type'] == 'markdown' for line in ''.join(cell['source']).splitlines() if line.startswith('| `data.')
             or re.match(r'\| `\w+\.\*`', line)]
    table = {}
    for line in lines:
        names, *cells = (cell.strip() for cell in line.strip('|').split('|'))
        table |= {name.strip('` '): dict(zip(('train', 'evaluate', 'measure'), (cell == 'yes' for cell in cells), strict=True)) for name in names.split(',')}
    return table


def another(value):
    """Some other value of its kind."""
    kinds = {bool: lambda: not value, int: lambda: value + 1, float: lambda: value * 0.7 + 0.01, str: lambda: value + 'x', list: lambda: [*value, 7], dict: lambda: {**value, 'x': 1}}
    return 'x' if value is None else kinds[type(value)]()


EXPERIMENT = load_set('sample')['fft']
VALUES = EXPERIMENT.model_dump(mode='json', include={'data', 'model', 'train', 'evaluate', 'machine'})
KEYS = [(section, key) for section, values in VALUES.items() for key in values]


@pytest.fixture(scope='module')
def watched(tmp_path_factory):
    """What DVC compares of each stage but code, for values of params.yaml and of its one row; stages that use results of others follow."""
    copy = tmp_path_factory.mktemp('watched')
    for name in ('settings.ini', 'dvc.yaml', '.dvcignore'): shutil.copy(ROOT / name, copy)
    Repo.init(str(copy), no_scm=True)

    def stages(values, row):
        parts = {s: {} for s in ('model', 'train', 'evaluate')}
        whole = dict(set='s', recipe='r', seeds=[0], **values, recipes=dict(r=parts), rows=dict(a=parts | row))
        (copy / 'params.yaml').write_text(json.dumps(whole))
        with Repo(str(copy)) as repo:
            return {stage.name.split('@')[0]: [stage.cmd, [(dep.def_path, dep.read_params() if isinstance(dep, ParamsDependency) else None) for dep in stage.deps]]
                    for stage in repo.index.stages}
    return stages


@pytest.mark.parametrize('section,key', KEYS, ids=lambda name: name)
@pytest.mark.parametrize('where', ['shared', 'row'])
def test_a_parameter_runs_again_what_reads_it_and_no_more(watched, section, key, where):
    """As DVC sees it, as the identity of training does, and as the table in the notebook says."""
    if where == 'row' and section in ('data', 'machine'): pytest.skip('rows do not have this section')
    table = table_of_what_runs_again()
    said = table.get(f'{section}.{key}') or table[f'{section}.*']
    value, row = another(VALUES[section][key]), {}
    changed = {**VALUES, section: {**VALUES[section], key: value}} if where == 'shared' else VALUES
    if where == 'row': row = {section: {key: value}}
    before, after = watched(VALUES, {}), watched(changed, row)
    again = {name for name in before if before[name] != after[name]}
    if 'train' in again: again.add('evaluate')
    assert {name: name in again for name in said} == said
    assert ('table' in again) == any(said.values())
    part = getattr(EXPERIMENT, section).model_copy(update={key: value})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of values that are none of this key
        assert (parameters(EXPERIMENT.model_copy(update={section: part})) != parameters(EXPERIMENT)) == said['train']


STAND_IN = dict(
    train='out.mkdir(parents=True, exist_ok=True); (out / "curves/plots/metrics").mkdir(parents=True); (out / "curves/plots/images").mkdir(); [(out / n).write_text(row) for n in ("model.pt", "train.json", "best.pt")]',
    evaluate='(out / "keypoints_val_results.json").write_text("[]"); e.metrics_file().write_text("{}")',
    measure='assert row != broken, "no time"; (folder := e.folder().parent / "measured").mkdir(exist_ok=True); (folder / f"{row}.json").write_text("{}")',
    table='(tables := e.folder() / "tables").mkdir(exist_ok=True); (tables / "results.md").write_text("the page")')


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A project of two rows whose notebooks only write the files that DVC expects, and a function that calls a command there."""
    folder = make_project(tmp_path_factory.mktemp('stages') / 'project', epochs=1, images=4)
    params = folder / 'params.yaml'
    params.write_text(params.read_text() + '  other: {model: {block: null, block_after: []}, train: {}, evaluate: {}}\n')
    for name, work in STAND_IN.items():
        path = folder / 'nbs' / 'stages' / f'{name}.ipynb'
        notebook = json.loads(path.read_text())
        source = 'import os, sys; from srl_pose.experiment.params import load_experiment, load_experiments; broken = os.environ.get("BROKEN")\n' + (
            'e = next(iter(load_experiments().values()))' if name == 'table' else 'e = load_experiment(row); out = e.run_folder()') + f'\n{work}\nprint("{name} is well")'
        first = [cell for cell in notebook['cells'] if 'parameters' in cell['metadata'].get('tags', ())]
        notebook['cells'] = [*first, dict(cell_type='code', source=source, metadata={}, outputs=[], execution_count=None, id='a')]
        path.write_text(json.dumps(notebook))

    def call(*words, **environment):
        return subprocess.run(words, cwd=folder, env={**os.environ, 'PYTHONPATH': str(folder), **environment}, capture_output=True, text=True)
    return folder, call


def told(done):
    """Lines without their seconds"""
    return [re.sub(r' \(\d+ s\)$', '', line) for line in done.stdout.splitlines()]


def test_make_table_tells_each_stage_in_a_line(small):
    """First one row fails: the reason and the place of its traceback are there. Then only what is missing runs; then nothing."""
    folder, call = small
    failed = call('srl-pose', 'table', BROKEN='other')
    lines = told(failed)
    assert failed.returncode and failed.stderr == ''
    at = lines.index('error: AssertionError: no time')
    assert lines[at - 1].endswith('measuring time and memory of other: failed') and lines[at + 1] == 'failed; the traceback is at the end of outputs/tiny/measured/other.ipynb'
    assert lines[at + 2].startswith("ERROR: failed to reproduce 'measure@other'")
    well = call('srl-pose', 'table')
    lines = told(well)
    assert well.returncode == 0 and well.stderr == ''
    assert '[7/7] writing the pages: table is well' in lines and 'the page' in lines and any(line.startswith('The page: ') for line in lines)
    words = {re.sub(r'\[./7\] ', '', line.partition(':')[0]) for line in told(failed) + lines if line.startswith('[')}
    assert words == {*(f'{doing} {row}, seed 0' for doing in ('training', 'evaluating') for row in ('tiny', 'other')),
                     'measuring time and memory of tiny', 'measuring time and memory of other', 'writing the pages'}
    noise = ('Running stage', '> srl-pose', 'lock file', 'git', 'dvc push', 'Executing', 'Notebook:', 'kernel', 'WARNING', "didn't change")
    assert not [line for line in lines if any(text in line for text in noise)]
    again = call('srl-pose', 'table')
    assert again.returncode == 0 and told(again)[0] == '7 of 7 stages were as they are: nothing they depend on has changed'
    assert 'table is well' in (folder / 'outputs/tiny/tiny/table.ipynb').read_text()


def test_plain_dvc_runs_the_same_stages(small):
    """Without a process that is warm, also one stage alone; a name that does not exist is said, without a traceback."""
    folder, call = small
    done = call('dvc', 'repro', '--force', '--single-item', 'measure@tiny')
    assert done.returncode == 0 and 'measure is well' in done.stdout and 'Executing' not in done.stdout + done.stderr
    none = call('srl-pose', 'stage', 'measure', '--row', 'none')
    assert none.returncode == 1 and none.stderr.startswith('error: ') and len(none.stderr.splitlines()) == 1 and 'rows.none: no such row' in none.stderr


@pytest.mark.parametrize('name', ["tiny;touch X", "$(touch X)", "`touch X`", "a'; touch X; '", 'a" ; touch X ; "', '../up', '-x', 'a b', ''])
@pytest.mark.parametrize('where', ['rows', 'recipes', 'set'])
def test_a_name_is_checked_before_a_shell_can_read_it(tmp_path, name, where):
    """The command of every stage, as DVC gives it to the shell, with a stand-in that says what it is called with."""
    for file in ('settings.ini', 'dvc.yaml', '.dvcignore'): shutil.copy(ROOT / file, tmp_path)
    parts = {s: {} for s in ('model', 'train', 'evaluate')}
    given = dict(rows='tiny', recipes='r', set='s') | {where: name}
    values = dict(set=given['set'], recipe=given['recipes'], seeds=[0], data=dict(root='data', train='train', val='val'), **parts, machine={}, recipes={given['recipes']: parts}, rows={given['rows']: parts})
    (tmp_path / 'params.yaml').write_text(json.dumps(values))
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'srl-pose').write_text(f'#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n')
    (tmp_path / 'bin' / 'srl-pose').chmod(0o755)
    Repo.init(str(tmp_path), no_scm=True)
    with Repo(str(tmp_path)) as repo:
        try:
            commands = [stage.cmd for stage in repo.index.stages if stage.name != 'code']  # which is not told any name
        except (AssertionError, DvcException):
            commands = []  # refused before any shell; an empty name by an assertion
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env={'PATH': f'{tmp_path}/bin:/usr/bin:/bin'}, capture_output=True, text=True, check=True)
        words = json.loads(done.stdout)
        if where == 'rows' and '--row' in words: assert words[words.index('--row') + 1] == name
    assert not (tmp_path / 'X').exists()
    with pytest.raises(ParameterError, match='a name is made of letters'): load_experiments(tmp_path / 'params.yaml')

"""dvc.yaml says the truth about what a stage depends on."""
import ast
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
STAGES = YAML(typ='safe').load((ROOT / 'dvc.yaml').read_text())['stages']


def modules_behind(*names, without=frozenset()):
    """The modules of the package that `names` import, directly or not, and `names` themselves."""
    found, todo = set(without), list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            tree = ast.parse((ROOT / 'srl_pose' / f'{name}.py').read_text())
            todo += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1]
    return found - without


LOOKS_ON = {'draw', 'evaluate'}  # training draws pages and measures AP with them, but no weight depends on them


@pytest.mark.parametrize('stage,modules', [('train', ['train', 'params']), ('evaluate', ['evaluate', 'params', 'metrics'])])
def test_a_stage_depends_on_all_code_that_decides_its_result(stage, modules):
    named = {Path(dep).stem for dep in STAGES[stage]['deps'] if dep.endswith('.py')}
    assert named == modules_behind(*modules, without=LOOKS_ON if stage == 'train' else frozenset())


def test_the_table_depends_on_its_own_code_and_all_metrics():
    assert {'outputs/${set}/${recipe}/metrics', 'outputs/${set}/measured', 'results'} <= set(STAGES['table']['deps'])
    named = {Path(dep).stem for dep in STAGES['table']['deps'] if dep.endswith('.py')}
    assert named == {'bootstrap', 'compare', 'experiment', 'measure', 'metrics', 'params', 'published', 'table'}


def test_a_price_depends_on_the_network_but_on_no_data_and_no_training():
    deps = {Path(dep).stem for dep in STAGES['measure']['deps']}
    assert deps == {'measure', 'benchmark', *modules_behind('pose_net', 'flops')} and not any('train' in p for p in STAGES['measure']['params'])


def test_every_parameter_decides_something():
    """Each section of params.yaml except `machine` is watched by a stage."""
    sections = set(YAML(typ='safe').load((ROOT / 'params.yaml').read_text()))
    watched = {p.split('.')[0] for s in STAGES.values() for p in s['params']}
    assert sections - {'machine'} == watched

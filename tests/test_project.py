"""The project keeps its promises: notebooks clean and exported, stages thin, one notebook per module."""
import configparser
import filecmp
import json
import shutil
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
import torch

ROOT = Path(__file__).parent.parent
STAGES = sorted((ROOT / 'nbs' / 'stages').glob('*.ipynb'))
NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))


def test_notebooks_are_clean_and_exported(tmp_path):
    """`nbdev_clean` and `nbdev_export` into an empty package give exactly the committed files, so none is stale."""
    shutil.copy(ROOT / 'settings.ini', tmp_path)
    shutil.copytree(ROOT / 'nbs', tmp_path / 'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    (tmp_path / 'srl_pose').mkdir()
    for command in ('nbdev_clean', 'nbdev_export'):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=tmp_path, check=True)
    for folder, pattern in (('nbs', '**/*.ipynb'), ('srl_pose', '*.py')):
        names = lambda root: {str(p.relative_to(root)) for p in (root / folder).glob(pattern)
                              if '.ipynb_checkpoints' not in p.parts}
        assert names(tmp_path) == names(ROOT), 'a module without a notebook, or a notebook that was not exported'
        _, different, errors = filecmp.cmpfiles(tmp_path, ROOT, names(ROOT), shallow=False)
        assert not different + errors, 'run nbdev_clean and nbdev_export'


@pytest.mark.parametrize('path', STAGES, ids=lambda p: p.stem)
def test_stage_notebooks_are_thin(path):
    """They define nothing, and papermill finds the parameters that dvc.yaml passes."""
    cells = [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
    assert not any(line.startswith(('def ', 'class ')) for c in cells for line in c['source'])
    parameters = dict(table=[], measure=['row']).get(path.stem, ['row', 'seed'])
    assert list(papermill.inspect_notebook(str(path))) == parameters


@pytest.mark.parametrize('path', NOTEBOOKS + STAGES, ids=lambda p: p.stem)
def test_notebooks_hold_no_noise(path):
    """Outputs are small, without errors, warnings or paths of one machine."""
    cells = [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
    outputs = [o for c in cells for o in c['outputs']]
    assert len(json.dumps(outputs)) < 800_000
    assert not any(o['output_type'] == 'error' or o.get('name') == 'stderr' for o in outputs)
    assert str(Path.home()) + '/' not in json.dumps(outputs)
    assert not any('eval: false' in ''.join(c['source']) for c in cells)


def test_index_names_every_notebook():
    text = (ROOT / 'nbs' / 'index.ipynb').read_text()
    assert [p.name for p in NOTEBOOKS if p.name != 'index.ipynb' and p.name not in text] == []


def test_readme_is_the_index():
    """README.md is `make readme` of nbs/index.ipynb: every Markdown cell stands in it."""
    readme = (ROOT / 'README.md').read_text()
    for cell in json.loads((ROOT / 'nbs' / 'index.ipynb').read_text())['cells']:
        if cell['cell_type'] == 'markdown':
            assert ''.join(cell['source']).replace('](../', '](') in readme, 'run make readme'


def test_versions_are_pinned_and_agree():
    settings = configparser.ConfigParser()
    settings.read(ROOT / 'settings.ini')
    import srl_pose

    assert srl_pose.__version__ == settings['DEFAULT']['version']
    lines = (ROOT / 'constraints.txt').read_text().split()
    assert all('==' in line for line in lines) and any(line.startswith('torch==') for line in lines)


def test_the_committed_lock_records_no_machine():
    """dvc.lock is committed empty; what a machine's own runs write into it stays there."""
    committed = subprocess.run(['git', 'show', 'HEAD:dvc.lock'], cwd=ROOT, capture_output=True, text=True)
    if committed.returncode:
        pytest.skip('not a git checkout')
    assert committed.stdout == "schema: '2.0'\nstages: {}\n", 'run make setup before dvc, so that git leaves dvc.lock alone'


def test_torch_hub_finds_the_block():
    """hubconf.py works from a local path, and what it hands out is the package's own."""
    block = torch.hub.load(str(ROOT), 'spectral_block', source='local', channels=16)
    x = torch.randn(1, 16, 5, 4)
    assert torch.equal(block(x), x) and type(block).__module__ == 'srl_pose.spectral'


EXTRAS = ('dvc', 'dvclive', 'papermill', 'jupyterlab', 'notebook', 'ipykernel', 'IPython', 'nbformat', 'nbdev', 'fastcore', 'execnb', 'onnx', 'onnxruntime', 'onnxscript',
          'huggingface_hub', 'safetensors', 'timm', 'pytest', 'tensorboard')


def test_the_package_needs_none_of_the_extras():
    """Every module is imported, and the command says its help, where none of the optional packages can be."""
    modules = sorted(p.stem for p in (ROOT / 'srl_pose').glob('*.py') if p.stem not in ('__init__', '_modidx', 'share'))
    code = f'''
import importlib, sys, torch, torchvision  # torch looks for some of them, and does without
for name in list(sys.modules):
    if name.partition('.')[0] in {EXTRAS}: del sys.modules[name]
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {EXTRAS}: raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Absent())
for name in {modules}: importlib.import_module(f'srl_pose.{{name}}')
try:
    import srl_pose.share
except ModuleNotFoundError as error:
    assert 'pip install "srl_pose[share]"' in str(error), error
else:
    raise AssertionError('share was imported')
from srl_pose.cli import main
try:
    main(['--help'])
except SystemExit as end:
    assert not end.code
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'srl-pose predict photos/' in done.stdout

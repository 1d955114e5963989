"""The project keeps its promises: notebooks clean and exported, stages thin, one notebook per module."""
import ast
import configparser
import filecmp
import json
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / 'scripts'))

import chapters  # noqa: E402
import render  # noqa: E402

STAGES = sorted((ROOT / 'nbs' / 'stages').glob('*.ipynb'))
NOTEBOOKS = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
NAME = lambda path: path.relative_to(ROOT / 'nbs').with_suffix('').as_posix()  # noqa: E731


def test_notebooks_are_clean_and_exported(tmp_path):
    """`nbdev_clean` and `nbdev_export` into an empty package give exactly the committed files, so none is stale."""
    shutil.copy(ROOT / 'settings.ini', tmp_path)
    shutil.copytree(ROOT / 'nbs', tmp_path / 'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    (tmp_path / 'srl_pose').mkdir()
    for command in ('nbdev_clean', 'nbdev_export'):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=tmp_path, check=True)
    for folder, pattern in (('nbs', '**/*.ipynb'), ('srl_pose', '**/*.py')):
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


def noise_in(notebook):
    """What should not be committed with a notebook: errors, warnings, what one machine or one run prints."""
    cells = [c for c in notebook['cells'] if c['cell_type'] == 'code']
    outputs = [o for c in cells for o in c['outputs']]
    texts = [''.join(text) for o in outputs for text in (o.get('text', ''), *(v for k, v in o.get('data', {}).items() if not k.startswith('image/')))]
    found = [f'{o["output_type"]} {o.get("name", "")}' for o in outputs if o['output_type'] == 'error' or o.get('name') == 'stderr']
    for what, pattern in dict(path=r'(?<![\w.])/(?:home|root|tmp|work|usr|opt|Users|var)/\S+', address=r'\b0x[0-9a-f]{6,}\b', warning=r'\b\w*Warning:',
                              progress=r'\d+%\|', date=r'\b20\d\d-\d\d-\d\d[ T]\d\d:\d\d').items():
        found += [f'{what} {hit[0][:60]}' for text in texts if (hit := re.search(pattern, text))]
    found += [f'execution count of cell {c["id"]}' for c in cells if c['execution_count'] is not None]
    found += [f'cell {c["id"]} is not run' for c in cells if 'eval: false' in ''.join(c['source'])]
    return found


NOISY = {
    'stderr': dict(output_type='stream', name='stderr', text=['careful\n']), 'error': dict(output_type='error', ename='E', evalue='', traceback=[]),
    'path': dict(output_type='stream', name='stdout', text=['saved in /home/me/x.pt\n']), 'address': dict(output_type='execute_result', data={'text/plain': ['<f at 0x7f03bb806de0>']}),
    'warning': dict(output_type='stream', name='stdout', text=['UserWarning: old\n']), 'progress': dict(output_type='stream', name='stdout', text=[' 40%|####  |']),
    'date': dict(output_type='display_data', data={'text/html': ['<p>2026-01-31 12:00</p>']})}


@pytest.mark.parametrize('kind', NOISY)
def test_noise_is_found(kind):
    cell = dict(cell_type='code', id='a', source=[], execution_count=None, outputs=[NOISY[kind]])
    assert noise_in(dict(cells=[cell]))
    assert noise_in(dict(cells=[cell | dict(outputs=[], execution_count=3)]))
    quiet = dict(output_type='stream', name='stdout', text=['AP 0.402 for r50_256x192, 3×3, 40 % of 2026 persons\n'])
    assert not noise_in(dict(cells=[cell | dict(outputs=[quiet])]))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=NAME)
def test_notebooks_hold_no_noise(path):
    assert noise_in(json.loads(path.read_text())) == []


def test_outputs_are_small():
    sizes = {NAME(path): sum(len(json.dumps(c.get('outputs', []))) for c in json.loads(path.read_text())['cells']) for path in NOTEBOOKS}
    assert sum(sizes.values()) < 3_000_000 and max(sizes.values()) < 400_000, sizes


RENDERED = [path for path in NOTEBOOKS if path.parent.name != 'stages' and path.name != 'index.ipynb']


@pytest.mark.parametrize('path', RENDERED, ids=NAME)
def test_outputs_are_of_the_present_code(path):
    """`make render` has run a notebook since its code was edited last."""
    assert nbformat.read(path, 4).metadata.get('rendered') == render.code_of(nbformat.read(path, 4)), 'run make render'


@pytest.mark.parametrize('name', ['1_blocks/07_dimensions', '2_pose/08_oks', '7_sample/01_figure'])
def test_a_notebook_run_again_shows_the_same(name):
    assert render.differences(ROOT / 'nbs' / f'{name}.ipynb') == []


def test_a_stale_output_is_found(tmp_path, monkeypatch):
    """Other text, another picture, one output more: each is a difference; the last digit of a number is none."""
    source = "import matplotlib.pyplot as plt\nprint('loss 0.4001')\nplt.plot([1, 2]); plt.show()"
    path, monkey = tmp_path / 'nbs' / 'a.ipynb', nbformat.v4
    path.parent.mkdir()
    kernel = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    path.write_text(nbformat.writes(monkey.new_notebook(cells=[monkey.new_code_cell(source, id='a')], metadata=kernel)))
    monkeypatch.setattr(render, 'NBS', path.parent)
    render.render(path)
    assert render.differences(path) == []
    good = path.read_text()
    assert 'image/png' in good and '0.4001' in good
    path.write_text(good.replace('"loss 0.4001\\n"', '"loss 0.4002\\n"'))
    assert render.differences(path) == []
    for old, new in (('"loss 0.4001\\n"', '"loss 0.5\\n"'), ('"loss 0.4001\\n"', '"gain 0.4001\\n"'), ('plt.plot([1, 2])', 'plt.plot([2, 1])'), ('plt.show()', 'plt.show(); 3')):
        assert old in good
        path.write_text(good.replace(old, new, 1))
        assert len(render.differences(path)) == 1, (old, new)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=NAME)
def test_exported_cells_are_short(path):
    cells = [''.join(c['source']).strip() for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
    lengths = [len(cell.splitlines()) for cell in cells if cell.startswith('#| export')]
    assert max(lengths, default=0) <= 50


def test_chapters_list_every_notebook():
    for chapter in chapters.chapters():
        assert (chapter / 'README.md').read_text() == chapters.page(chapter), 'run make chapters'


PAGES = [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md'), *ROOT.glob('nbs/**/README.md'), *ROOT.glob('results/**/*.md')]


@pytest.mark.parametrize('path', NOTEBOOKS + PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    """Links inside the project; a page for people and a notebook alike."""
    texts = [path.read_text()] if path.suffix == '.md' else [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'markdown']
    links = [link for text in texts for link in re.findall(r'\]\(([^)\s]+)\)', re.sub(r'`[^`]*`', '', text)) if not re.match(r'[a-z]+:|#|attachment', link)]
    assert [link for link in links if not (path.parent / link.partition('#')[0]).exists()] == []


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


def test_pinned_versions_run_on_every_python_3_11():
    """Debian 12 has 3.11.2: pip finds no version, and says "conflict", where a pin asks for more."""
    pinned = dict(line.split('==') for line in (ROOT / 'constraints.txt').read_text().split())
    needed = {name: metadata.metadata(name)['Requires-Python'] for name in pinned if installed(name)}
    assert len(needed) > 100 and [name for name, python in needed.items() if python and '3.11.0' not in SpecifierSet(python)] == []


def installed(name):
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return None


def test_torch_hub_finds_the_block():
    """hubconf.py works from a local path, and what it hands out is the package's own."""
    block = torch.hub.load(str(ROOT), 'spectral_block', source='local', channels=16)
    x = torch.randn(1, 16, 5, 4)
    assert torch.equal(block(x), x) and type(block).__module__ == 'srl_pose.blocks.spectral'


EXTRAS = ('dvc', 'dvclive', 'papermill', 'jupyterlab', 'notebook', 'ipykernel', 'IPython', 'nbformat', 'nbdev', 'fastcore', 'execnb', 'onnx', 'onnxruntime', 'onnxscript',
          'huggingface_hub', 'openvino', 'safetensors', 'timm', 'pytest', 'tensorboard')


def test_the_package_needs_none_of_the_extras():
    """Every module is imported, and the command says its help, where none of the optional packages can be."""
    modules = sorted('.'.join(p.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
                     for p in (ROOT / 'srl_pose').rglob('*.py') if p.stem not in ('_modidx', 'share', *(() if find_spec('triton') else ('kernels',))))
    code = f'''
import importlib, sys, torch, torchvision  # torch looks for some of them, and does without
for name in list(sys.modules):
    if name.partition('.')[0] in {EXTRAS}: del sys.modules[name]
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {EXTRAS}: raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Absent())
for name in {modules}: importlib.import_module(name)
try:
    import srl_pose.use.share
except ModuleNotFoundError as error:
    assert 'pip install "srl_pose[share]"' in str(error), error
else:
    raise AssertionError('share was imported')
from srl_pose.use.command import main
try:
    main(['--help'])
except SystemExit as end:
    assert not end.code
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'srl-pose predict photos/' in done.stdout


def test_a_wheel_brings_what_is_no_code(tmp_path):
    shutil.copytree(ROOT / 'srl_pose', tmp_path / 'srl_pose', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run([sys.executable, '-m', 'build', '--wheel', '--no-isolation', tmp_path], check=True, capture_output=True)
    wheel, = (tmp_path / 'dist').glob('*.whl')
    zipfile.ZipFile(wheel).extractall(site := tmp_path / 'site')
    assert {path.name for path in (site / 'srl_pose/demonstration').iterdir()} == {'network.pt', 'README.md', 'LICENSE'} and (site / 'srl_pose/py.typed').is_file()
    photo = next((ROOT / 'sample/images/val').iterdir())
    code = f'import sys; sys.path.insert(0, {str(site)!r}); from srl_pose.use.command import main; raise SystemExit(main())'
    (tmp_path / 'elsewhere').mkdir()
    done = subprocess.run([sys.executable, '-c', code, 'predict', photo, '--device', 'cpu'], cwd=tmp_path / 'elsewhere', capture_output=True, text=True)
    assert done.returncode == 0 and 'no --weights: the demonstration network is used' in done.stderr and str(site) in done.stderr, done.stderr
    poses, = json.loads((tmp_path / 'elsewhere/poses/results.json').read_text())
    assert len(poses['keypoints']) == 3 * 12


# of modules of the standard library: what there is on Linux and not on every macOS
LINUX_ONLY = dict(os={'fdatasync', 'sched_getaffinity', 'sched_setaffinity', 'posix_fadvise', 'posix_fallocate', 'memfd_create', 'splice', 'copy_file_range', 'eventfd',
                      'pidfd_open', 'preadv', 'pwritev', 'getxattr', 'setxattr', 'O_DIRECT', 'O_TMPFILE', 'O_PATH', 'O_NOATIME'},
                  mmap={'MAP_POPULATE', 'MADV_HUGEPAGE'}, signal={'sigtimedwait', 'sigwaitinfo', 'SIGRTMIN'}, select={'epoll'}, resource={'prlimit'}, time={'CLOCK_BOOTTIME'})


def test_what_macos_does_not_have_is_asked_for():
    """Each use of such a name stands in a module that asks `hasattr` for it."""
    for path in (ROOT / 'srl_pose').rglob('*.py'):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in LINUX_ONLY.get(node.value.id, ()):
                assert f"hasattr({node.value.id}, '{node.attr}')" in text, f'{path}: {node.value.id}.{node.attr} is not on macOS'

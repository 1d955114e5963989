"""scripts/gpu.sh, with everything tiny, on the CPU."""
import importlib.util
import os
import resource
import subprocess
import sys
from pathlib import Path

from srl_pose.benchmarks.blocks import read_csv
from srl_pose.benchmarks.gpu import LIMITS, TABLES, page
from srl_pose.files import read_json

ROOT = Path(__file__).parent.parent


def run(*options, python=sys.executable):
    environment = os.environ | dict(PYTHON=str(python), PYTHONPATH=str(ROOT))
    return subprocess.run(['bash', 'scripts/gpu.sh', *map(str, options)], cwd=ROOT, env=environment, capture_output=True, text=True)


def processor_time():
    """Seconds that ended child processes took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_all_parts_of_a_small_run(tmp_path):
    """Every part is done, and its table is on the page."""
    before = processor_time()
    done = run('--small', '--out', tmp_path / 'all')
    parts = read_json(tmp_path / 'all' / 'parts.json')
    assert {name: part['state'] for name, part in parts.items()} == dict.fromkeys(['correctness', 'inverse', 'blocks', 'training', 'determinism'], 'done'), done.stdout
    assert [name for name in TABLES if not (tmp_path / 'all' / name).exists()] == ['photographs.csv']
    assert {row['error'] for row in read_csv(tmp_path / 'all' / 'forms.csv')} == {''}
    assert all(row['y'] < 1e-4 for row in read_csv(tmp_path / 'all' / 'forms.csv'))
    assert 'yes' in {row['resumed_is_the_same'] for row in read_csv(tmp_path / 'all' / 'determinism.csv')}
    text = (tmp_path / 'all' / 'page.md').read_text()
    assert text == page(tmp_path / 'all') and 'A small run' in text and text.count('not run') == 2  # the photographs
    assert processor_time() - before < 240  # two minutes of two cores, whoever else uses them
    assert 'matrices' in {row['ran'] for row in read_csv(tmp_path / 'all' / 'forms.csv')}
    assert read_json(tmp_path / 'all' / 'machine.json')['command'].startswith('python -m srl_pose.benchmarks.gpu --out')


def test_a_part_that_fails_takes_nothing_from_the_others(tmp_path):
    """The photographs are not there."""
    run('--small', '--out', tmp_path / 'out', '--parts', 'inverse,photographs', '--data', tmp_path / 'none')
    parts = read_json(tmp_path / 'out' / 'parts.json')
    assert (parts['inverse']['state'], parts['photographs']['state']) == ('done', 'failed (1)')
    assert (tmp_path / 'out' / 'inverse.csv').exists() and (tmp_path / 'out' / 'page.md').exists()


def test_what_is_missing_is_named(tmp_path):
    """By an interpreter without packages."""
    bare = tmp_path / 'bare'
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    done = run('--small', '--out', tmp_path / 'out', python=bare)
    assert done.returncode == 1 and 'opencv-python' in done.stderr and '--wheels' in done.stderr


def test_the_committed_page_is_of_the_committed_results_and_on_the_site(tmp_path, monkeypatch):
    """What has not run says so; no number stands where nothing was measured."""
    folder = ROOT / 'results' / 'gpu'
    text = (folder / 'page.md').read_text()
    assert text == page(folder), 'python -m srl_pose.benchmarks.gpu --out results/gpu --page'
    missing = [name for name in TABLES if not (folder / name).exists()]
    assert text.count('\nnot run\n') == len(missing) and all(name in text for name in LIMITS)
    if len(missing) == len(TABLES): assert 'Not run yet' in text and not any(character.isdigit() for character in text.replace('float64', ''))
    monkeypatch.syspath_prepend(str(ROOT / 'scripts'))
    spec = importlib.util.spec_from_file_location('site_pages', ROOT / 'scripts' / 'site.py')  # `site` is a module of Python
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    monkeypatch.setattr(pages, 'DOCS', tmp_path)
    assert {'On a GPU': 'results/gpu/page.md'} in pages.results_pages() and (tmp_path / 'results' / 'gpu' / 'page.md').exists()

"""`make` in folders whose names have spaces and quotes; programs that would take long are stand-ins that write down how they were called."""
import shutil
import subprocess

import pytest
from srl_pose.files import project_root

STANDIN = '''#!/bin/sh
[ "$1 $2 $3" = "-m venv $3" ] && [ $# = 3 ] && mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && for name in srl-pose dvc; do cp "$0" "$3/bin/$name"; done
printf '%s' "${0##*/}" >> "$LOG"; printf '|%s' "$@" >> "$LOG"; echo >> "$LOG"
'''


@pytest.fixture(params=['plain', "it's my \"own\" project"])
def project(request, tmp_path):
    "A checkout with nothing but what `make` itself reads"
    folder, tools = tmp_path / request.param, tmp_path / 'tools'
    folder.mkdir()
    tools.mkdir()
    for name in ('Makefile', 'pyproject.toml', 'constraints.txt', 'params.yaml'): shutil.copy(project_root() / name, folder)
    (folder / 'scripts').mkdir()
    shutil.copy(project_root() / 'scripts' / 'git.sh', folder / 'scripts')
    subprocess.run(['git', 'init', '--quiet'], cwd=folder, check=True)
    (tools / 'python3.11').write_text(STANDIN)
    (tools / 'python3.11').chmod(0o755)
    (folder / 'outputs/sample/small/tables').mkdir(parents=True)
    return folder


def make(project, *words, **variables):
    "What `make` said and which programs it called"
    log = project.parent / 'log'
    log.unlink(missing_ok=True)
    environment = {'PATH': f'{project.parent / "tools"}:/usr/bin:/bin', 'LOG': str(log), 'HOME': str(project)}
    done = subprocess.run(['make', *words, *(f'{k}={v}' for k, v in variables.items())], cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, log.read_text().splitlines() if log.exists() else []


@pytest.mark.skipif(not shutil.which('make'), reason='there is no make')
def test_an_environment_is_made_once_and_found_again(project):
    venv = project / '.venv'
    said, calls = make(project, 'setup')
    assert calls[0] == f'python3.11|-m|venv|{venv}' and len(calls) == 3 and calls[-1].endswith('|--editable|.[dev]')
    assert f'into {venv} (about' in said and (venv / 'srl_pose.installed').read_text().startswith(f'{project} ')
    assert make(project, 'setup') == ('', [])
    (project / 'constraints.txt').write_text('torch\n')
    assert [line.split('|')[0] for line in make(project, 'setup')[1]] == ['python', 'python']  # installed anew, into the same
    assert sorted(p.name for p in project.iterdir()) == ['.git', '.venv', 'Makefile', 'constraints.txt', 'outputs', 'params.yaml', 'pyproject.toml', 'scripts']


@pytest.mark.skipif(not shutil.which('make'), reason='there is no make')
def test_words_reach_the_programs_whole(project, tmp_path):
    elsewhere, data = tmp_path / "an 'other' place/venv", "/data/a b/it's"
    for venv, given in ((project / 'my own', 'my own'), (elsewhere, str(elsewhere))):
        calls = make(project, 'coco', VENV=given, DATA=data, RECIPE='rehearsal')[1]
        assert calls[0].endswith(f'|venv|{venv}') and calls[-1] == f'srl-pose|select|coco|--data|{data}|--recipe|rehearsal'
        assert make(project, 'sample', VENV=given)[1] == ['srl-pose|select|sample']
    assert make(project, 'measure', VENV=str(elsewhere))[1] == ['dvc|repro|--single-item|code|measure']
    assert make(project, 'table', VENV=str(elsewhere))[1] == ['srl-pose|table']
    assert make(project, 'table', VENV=str(elsewhere), TABLE="4; 'x'")[1] == ["srl-pose|table|4; 'x'"]

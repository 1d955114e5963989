"""dvc.lock is of a clone: git does not track it, and nothing that git or DVC does with it loses or hides anything."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PIPELINE = """stages:
  train:
    cmd: mkdir -p outputs && grep p params.yaml > outputs/out.txt && echo ran >> ../ran
    params: [p]
    outs: [outputs/out.txt]
"""


def shell(folder, *commands, fails=False):
    """What they print; they succeed, or the last one fails."""
    person = {f'GIT_{who}_{what}': 'a@example.org' for who in ('AUTHOR', 'COMMITTER') for what in ('NAME', 'EMAIL')}
    for n, command in enumerate(commands, start=1):
        done = subprocess.run(command, cwd=folder, shell=True, capture_output=True, text=True, env={**os.environ, **person})
        assert (done.returncode != 0) == (fails and n == len(commands)), f'{command}\n{done.stdout}{done.stderr}'
    return done.stdout + done.stderr


@pytest.fixture
def clone(tmp_path):
    """Of a repository with one stage, and what it was cloned from."""
    up = tmp_path / 'up'
    up.mkdir()
    shell(up, 'git init -q -b main', 'dvc init -q')
    (up / 'dvc.yaml').write_text(PIPELINE)
    (up / 'params.yaml').write_text('p: 1\n')
    (up / '.gitignore').write_text('/outputs/\n')
    shell(up, 'git add -A', 'git commit -qm one')
    shell(tmp_path, 'git clone -q up clone')
    return tmp_path / 'clone', up


def test_git_does_not_track_the_lock_and_does_not_ignore_it():
    if not (ROOT / '.git').exists(): pytest.skip('not a git checkout')
    assert shell(ROOT, 'git ls-files dvc.lock') == ''
    shell(ROOT, 'git check-ignore dvc.lock', fails=True)  # DVC refuses an ignored one


def test_nothing_is_lost_refused_in_circles_or_silently_stale(clone):
    here, up = clone
    lock, out = here / 'dvc.lock', here / 'outputs' / 'out.txt'
    shell(here, 'dvc repro')
    assert shell(here, 'git status --short') == '?? dvc.lock\n' and shell(here, 'git diff HEAD') == ''
    shell(here, 'dvc exp run -n two -S p=2')
    assert out.read_text() == 'p: 2\n' and 'p: 2' in lock.read_text() and 'up to date' in shell(here, 'dvc status')
    before = lock.read_text()
    shell(here, 'git stash')
    assert lock.read_text() == before and 'modified' in shell(here, 'dvc status')  # parameters changed, and DVC says so
    shell(here, 'dvc repro', 'dvc exp apply two')
    assert out.read_text() == 'p: 2\n' and 'up to date' in shell(here, 'dvc status') and lock.read_text() == before
    shell(here, 'dvc exp branch two b2', 'git checkout -q -- params.yaml')
    assert 'dvc.lock' in shell(here, 'git switch b2', fails=True)  # that branch tracks one
    (up / 'more').write_text('')
    shell(up, 'git add -A', 'git commit -qm more')
    shell(here, 'git pull -q')  # no lock on the other side
    assert lock.read_text() == before
    shutil.copy(lock, up)
    shell(up, 'git add -A', 'git commit -qm lock')
    assert 'dvc.lock' in shell(here, 'git pull', fails=True) and lock.read_text() == before
    shell(here, 'git stash -q -u', 'git pull -q')  # and what is said helps
    assert (here / '../ran').read_text() == 'ran\n' * 2  # once for each parameter


def test_setup_frees_a_clone_that_has_the_flag(clone):
    """From before: tracked, empty, and not looked at."""
    here, up = clone
    (up / 'dvc.lock').write_text("schema: '2.0'\nstages: {}\n")
    shell(up, 'git add -A', 'git commit -qm before')
    shell(here, 'git pull -q', 'git update-index --skip-worktree dvc.lock', 'dvc repro')
    mine = (here / 'dvc.lock').read_text()
    (up / 'scripts').mkdir()
    shutil.copy(ROOT / 'scripts' / 'git.sh', up / 'scripts')
    shell(up, 'git rm -q dvc.lock', 'git add -A', 'git commit -qm now')
    shell(here, 'git pull -q', fails=True)
    shell(here, 'git fetch -q', 'git checkout origin/main -- scripts', 'scripts/git.sh')
    assert (here / 'dvc.lock.own').read_text() == mine
    shell(here, 'git pull -q', 'scripts/git.sh')
    assert (here / 'dvc.lock').read_text() == mine and 'up to date' in shell(here, 'dvc status')
    assert shell(here, 'git status --short') == '?? dvc.lock\n'


def test_a_downloaded_archive_works_also_in_a_folder_of_another_repository(tmp_path):
    """Without .git, DVC is told so, and the other repository is left alone; once there is one, DVC uses it."""
    here = tmp_path / 'archive'
    here.mkdir()
    for name in ('dvc.yaml', 'params.yaml', 'settings.ini', '.dvcignore', '.gitconfig'): shutil.copy(ROOT / name, here)
    for name in ('.dvc', 'scripts'): shutil.copytree(ROOT / name, here / name, ignore=shutil.ignore_patterns('cache', 'tmp', 'config.local', '__pycache__'))
    assert 'not a git repository' in shell(here, 'dvc status', fails=True)
    shell(tmp_path, 'git init -q -b main')
    config = (tmp_path / '.git' / 'config').read_text()
    shell(here, 'scripts/git.sh', 'scripts/git.sh', 'dvc status')
    assert (tmp_path / '.git' / 'config').read_text() == config
    shell(here, 'git init -q -b main', 'scripts/git.sh')
    assert 'no_scm' not in (here / '.dvc' / 'config.local').read_text()
    assert shell(here, 'git config include.path') == '../.gitconfig\n'

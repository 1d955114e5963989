"""What a stage says when it fails: a traceback is announced where there is one, and only there."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest


def start(folder, *sources):
    "A notebook of these cells, as a stage that has begun"
    cells = [dict(cell_type='code', source=s, metadata={}, outputs=[], execution_count=None, id=f'c{i}') for i, s in enumerate(sources)]
    kernel = dict(name='python3', display_name='Python', language='python')
    (folder / 'a stage.ipynb').write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))
    return subprocess.Popen([*RUN, 'a stage.ipynb', 'out of it/run.ipynb'], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={name: value for name, value in os.environ.items() if name != 'PYTEST_CURRENT_TEST'})  # with it, kernels let go what is written past Python


RUN = [sys.executable, '-c', 'import sys; from srl_pose.pipeline.stage import run_notebook; sys.exit(run_notebook(*sys.argv[1:]))']


def end(process):
    said = process.communicate(timeout=120)[1]
    return process.returncode, said.splitlines()


def test_a_failed_cell_has_a_traceback(tmp_path):
    status, said = end(start(tmp_path, '1/0'))
    assert status == 1 and said == ['error: ZeroDivisionError: division by zero', 'failed; the traceback is at the end of out of it/run.ipynb']
    assert 'ZeroDivisionError' in (tmp_path / 'out of it/run.ipynb').read_text()


@pytest.mark.parametrize('name', ['SIGKILL', 'SIGSEGV'])
def test_a_killed_kernel_has_none(tmp_path, name):
    (tmp_path / 'out of it').mkdir()
    (tmp_path / 'out of it/run.ipynb').write_text('"output_type": "error"')  # of an older run
    status, said = end(start(tmp_path, 'print("so far")', f'import os, signal; os.kill(os.getpid(), signal.{name})'))
    assert status == 1 and said[-2].startswith('failed without a traceback: the notebook\'s process was killed or crashed') and 'the traceback' not in said[-1]
    assert said[-1].endswith('in out of it/run.ipynb') and 'so far' in (tmp_path / 'out of it/run.ipynb').read_text()


def test_a_stage_that_cannot_begin(tmp_path):
    done = subprocess.run([*RUN, 'none.ipynb', 'out/run.ipynb'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == 'failed before the notebook began; the reason is above'


def test_a_stopped_stage(tmp_path):
    process, there = start(tmp_path, 'import os, time', 'open("part", "w").write(str(os.getppid()))', 'os.rename("part", "there"); time.sleep(60)'), tmp_path / 'there'
    while not there.exists() and process.poll() is None: time.sleep(0.1)
    os.kill(int(there.read_text()), signal.SIGKILL)  # papermill
    status, said = end(process)
    assert status == 1 and said[-1].startswith('stopped (status 137, above 128 a signal)')


def test_the_command_that_waits_takes_the_kernel_along(tmp_path):
    process, there = start(tmp_path, 'import os, time', 'open("part", "w").write(str(os.getpid()))', 'os.rename("part", "there"); time.sleep(600)'), tmp_path / 'there'
    while not there.exists() and process.poll() is None: time.sleep(0.1)
    process.kill()
    process.communicate(timeout=120)
    kernel, patience = int(there.read_text()), time.monotonic() + 60
    while os.path.exists(f'/proc/{kernel}') and time.monotonic() < patience: time.sleep(0.1)
    assert not os.path.exists(f'/proc/{kernel}')


def test_what_is_printed_is_on_the_terminal_and_in_the_notebook_and_nothing_else(tmp_path):
    """No banners of papermill, no warnings of kernels; also what is written past Python is kept in the notebook."""
    process = start(tmp_path, 'import os, sys; print("said")', 'print("warned", file=sys.stderr)', 'import subprocess; subprocess.run(["echo", "from elsewhere"]); 1 + 1',
                    'import time; time.sleep(1)')
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert set(out.splitlines()) - {''} == {'said', 'from elsewhere'} and err == 'warned\n'
    kept = (tmp_path / 'out of it/run.ipynb').read_text()
    assert all(text in kept for text in ('said', 'warned', 'from elsewhere', '"2"'))

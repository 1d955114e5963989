"""Shared by all tests."""
import os
from pathlib import Path

import pytest


@pytest.fixture(scope='session')
def external() -> Path:
    "Folder with real images and golden values (data/, golden/), or skip."
    folder = os.environ.get('SRL_POSE_EXTERNAL')
    if not folder:
        pytest.skip('set SRL_POSE_EXTERNAL to the folder that holds data/ and golden/ to run this test')
    if not Path(folder).is_dir():
        pytest.fail(f'SRL_POSE_EXTERNAL={folder} is not a folder')
    return Path(folder).resolve()

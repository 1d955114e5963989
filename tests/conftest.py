"""Shared by all tests."""
import os
from pathlib import Path

import pytest

from srl_pose.experiment.params import load_set


@pytest.fixture(scope='session')
def external() -> Path:
    "Folder with real images and golden values (data/, golden/), or skip."
    folder = os.environ.get('SRL_POSE_EXTERNAL')
    if not folder:
        pytest.skip('set SRL_POSE_EXTERNAL to the folder that holds data/ and golden/ to run this test')
    if not Path(folder).is_dir():
        pytest.fail(f'SRL_POSE_EXTERNAL={folder} is not a folder')
    return Path(folder).resolve()


@pytest.fixture
def sample_row() -> dict:
    "The row fft of the sample as plain values, to be changed into the experiment of a test: a whole ResNet-18, from random numbers, at a plain rate."
    row = load_set('sample')['fft'].model_dump()
    row['model'] |= dict(last_layer='layer4', block_after=('deconv1', 'deconv2', 'deconv3'), decoder='quarter', weights=None)
    row['train'] |= dict(learning_rate=1.5e-3, schedule='step')
    return row

"""`srl-pose predict` as somebody uses it: stopped on the way, on a machine that lacks something, on pictures that are odd."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from srl_pose.data.coco import CocoPersons
from srl_pose.data.check import check
from srl_pose.files import DataError
from srl_pose.pose.pose_net import PoseResNet
from srl_pose.use.command import main

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / 'sample'
COMMAND = [sys.executable, '-c', 'import sys; from srl_pose.use.command import main; sys.exit(main())']
SIZE = ['--input-size', '96x64', '--color-order', 'RGB', '--device', 'cpu']


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A small network with heatmaps that are not flat."""
    torch.manual_seed(0)
    model = PoseResNet('resnet18')
    torch.nn.init.normal_(model.final_layer.weight, std=.1)
    torch.save(model.state_dict(), file := tmp_path_factory.mktemp('weights') / 'model.pth')
    return str(file)


def started(*words, **options):
    """The command in a process of its own."""
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join([*options.pop('path', []), str(ROOT)]))
    return subprocess.Popen([*COMMAND, *map(str, words)], stderr=subprocess.PIPE, text=True, env=environment,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **options)


def lines_of(out):
    """Whole lines of results.jsonl."""
    file = out / 'results.jsonl'
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith('\n')] if file.exists() else []


@pytest.mark.parametrize('number, status, name', [(signal.SIGTERM, 143, 'SIGTERM'), (signal.SIGINT, 130, 'Ctrl-C')])
def test_a_run_that_is_stopped_keeps_what_it_has(weights, tmp_path, number, status, name):
    """Lines are there while it runs, and after the signal every file is whole; nothing is left of the run before."""
    out, pictures = tmp_path / 'out', sorted((SAMPLE / 'images/val').iterdir())
    assert main(['predict', str(pictures[0]), '--weights', weights, '--out', str(out), *SIZE]) == 0
    assert {file.name for file in out.iterdir()} == {'about.json', 'results.json', 'results.csv', 'results.jsonl', 'pictures'}
    process = started('predict', *pictures[1:] * 50, '--weights', weights, '--out', out, '--batch-size', '2', *SIZE)
    until = time.monotonic() + 120
    while not any(line['file_name'] != str(pictures[0]) for line in lines_of(out)):
        assert process.poll() is None and time.monotonic() < until, process.stderr.read()
        time.sleep(.02)
    assert not (out / 'results.json').exists()
    process.send_signal(number)
    said = process.communicate(timeout=60)[1].splitlines()
    lines, entries = lines_of(out), json.loads((out / 'results.json').read_text())
    assert process.returncode == status, said
    assert f'stopped by {name} after {len(lines)} images of {50 * (len(pictures) - 1)}; what was found by then is written' in said
    assert f'{out}: removed what an earlier run had written: results.json, results.csv, results.jsonl, pictures (1)' in said
    assert [e['file_name'] for e in entries] == [line['file_name'] for line in lines for _ in line['persons']]
    assert len((out / 'results.csv').read_text().splitlines()) == 1 + 17 * len(entries)
    assert {file.relative_to(out).as_posix() for file in (out / 'pictures').iterdir()} == {line['picture'] for line in lines}


def test_a_film_does_not_become_its_own_drawing(weights, tmp_path, monkeypatch):
    """Written into its own folder, a film gets a neighbour; run again, the neighbour is replaced and the film still there."""
    monkeypatch.chdir(tmp_path)
    writer = cv2.VideoWriter('film.mp4', cv2.VideoWriter.fourcc(*'mp4v'), 10, (64, 48))
    for i in range(5): writer.write(np.full((48, 64, 3), 50 * i, np.uint8))
    writer.release()
    content = Path('film.mp4').read_bytes()
    for _ in range(2):
        assert main(['predict', 'film.mp4', '--weights', weights, '--out', '.', *SIZE]) == 0
        assert Path('film.mp4').read_bytes() == content
        assert {file.name for file in Path('.').iterdir()} == {'film.mp4', 'film-2.mp4', 'about.json', 'results.json', 'results.csv', 'results.jsonl'}


def hole_in(data):
    """A JPEG without 2000 bytes of its middle."""
    return data[:len(data) // 2] + data[len(data) // 2 + 2000:]


def test_a_jpeg_with_a_hole(weights, tmp_path, capsys):
    """Prediction, the checker and the data set that training reads say the same of it."""
    shutil.copytree(SAMPLE / 'annotations', tmp_path / 'annotations')
    for split in ('train', 'val'): shutil.copytree(SAMPLE / 'images' / split, tmp_path / 'images' / split)
    persons = CocoPersons(tmp_path, 'val', input_size=(64, 96))
    image = persons.image_file(0)
    image.write_bytes(hole_in(image.read_bytes()))
    with pytest.raises(DataError, match='image is damaged .*: a piece is missing') as error: persons[0]
    assert main(['predict', str(image), '--weights', weights, '--out', str(tmp_path / 'out'), *SIZE]) == 1
    assert f'error: {error.value}' in capsys.readouterr().err
    errors = check(tmp_path, ['val']).errors
    assert [(e['kind'], e['messages']) for e in errors] == [('image unreadable', [str(error.value)])]


@pytest.mark.parametrize('words', [['predict', str(SAMPLE / 'images/val'), '--weights', 'WEIGHTS', *SIZE[:4]], ['evaluate', '--data', str(SAMPLE), '--weights', 'WEIGHTS', *SIZE[:4]],
                                   ['train', '--data', str(SAMPLE), '--out', 'OUT']], ids=lambda words: words[0])
def test_a_device_that_is_not_there(weights, tmp_path, capsys, monkeypatch, words):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.chdir(tmp_path)
    assert main([dict(WEIGHTS=weights, OUT='out').get(word, word) for word in words] + ['--device', 'cuda']) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith('error: device: there is no cuda here, only cpu') and said[0].endswith(': say one of them, or leave it out'), said
    assert list(tmp_path.iterdir()) == []


def test_without_the_graphics_library(weights, tmp_path):
    """OpenCV on a server without a screen."""
    (tmp_path / 'cv2').mkdir()
    (tmp_path / 'cv2/__init__.py').write_text("raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory')")
    process = started('predict', 'a.jpg', '--weights', weights, path=[str(tmp_path)], cwd=tmp_path)
    said = process.communicate(timeout=120)[1].splitlines()
    assert process.returncode == 1 and len(said) == 1 and said[0].startswith('error: libGL.so.1: ') and 'opencv-python-headless' in said[0], said


def test_what_is_said_of_odd_pictures_and_boxes(weights, tmp_path, monkeypatch, capsys):
    """One line each, no traceback, and the good picture is done."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (96, 64, 3), np.uint8)
    Path('photos').mkdir()
    cv2.imwrite('photos/5.jpg', pixels)
    for name, head in (('a.heic', b'\0\0\0\x18ftypheic'), ('b.gif', b'GIF89a')): Path('photos', name).write_bytes(head + bytes(99))
    cv2.imwrite('deep.tif', pixels.astype(np.float64))
    film = cv2.VideoWriter('5.mp4', cv2.VideoWriter.fourcc(*'mp4v'), 10, (64, 96))
    for _ in range(3): film.write(pixels)
    film.release()
    Path('boxes.json').write_text(json.dumps([dict(file_name='5.jpg', bbox=[1, 2, 30, 40], score=.9), dict(bbox=[1, 2, 3, 4]), dict(file_name='deep.tif', bbox=[1, 2, 3])]))
    predict = lambda *words: (main(['predict', *words, '--weights', weights, *SIZE]), capsys.readouterr().err)
    status, said = predict('photos', 'photos/a.heic', 'photos/b.gif', 'deep.tif', '--threshold', '1e9')
    assert status == 1 and 'photos: left out 1 .heic, 1 .gif, which are not read' in said and 'each image is taken as one person' in said
    for text in ('a.heic: image is HEIC', 'b.gif: image is GIF', 'deep.tif: image is a TIFF whose pixels are not read', 'images: 4 (3 broken), persons: 1'): assert text in said, said
    assert 'no keypoint has a confidence above 1e+09' in said
    status, said = predict('photos', '5.mp4', '--boxes', 'boxes.json')
    assert status == 1 and 'images: 4 (0 broken), persons: 1' in said and 'error: boxes.json: [1] needs file_name or image_id' in said
    assert 'each image is taken' not in said
    assert [len(line['persons']) for line in lines_of(Path('poses'))] == [1, 0, 0, 0]
    status, said = predict('5.mp4', '--boxes', 'boxes.json')
    assert status == 1 and 'holds boxes of none of these images, only of 5.jpg, deep.tif' in said


def test_a_detector_that_is_not_there(weights, tmp_path, monkeypatch, capsys):
    """The line says which file to fetch, and where it goes."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr('torch.hub.download_url_to_file', lambda *args, **kwargs: (_ for _ in ()).throw(OSError('no network')))
    assert main(['predict', str(SAMPLE / 'images/val'), '--weights', weights, '--detector', 'fcos_resnet50_fpn', '--out', str(tmp_path / 'out'), *SIZE]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith('error: the weights of fcos_resnet50_fpn are not here and could not be downloaded (no network): fetch https://download.pytorch.org/')
    assert f'put fcos_resnet50_fpn_coco-99b0c9b7.pth into {tmp_path}/hub/checkpoints' in said
    assert not (tmp_path / 'out').exists()

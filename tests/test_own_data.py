"""Ten pictures and five keypoints: the commands of docs/own_data.md, outside of a checkout."""
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from srl_pose.data.findings import CURES
from srl_pose.pose.pose_net import PoseResNet
from srl_pose.use.command import main

ROOT = Path(__file__).parent.parent
NAMES = ['nose', 'left_ear', 'right_ear', 'neck', 'tail']
POINTS = np.array([(40, 8), (48, 16), (32, 16), (40, 24), (40, 60)])
QUICKLY = ['--epochs', '2', '--device', 'cpu']
SMALL = ['--input-size', '64x64', '--backbone-weights', 'none']  # nothing is downloaded; what is started from knows its size


def commands():
    """What the page says to type."""
    blocks = re.findall(r'```sh\n(.*?)```', (ROOT / 'docs/own_data.md').read_text(), re.S)
    return [line for block in blocks for line in block.splitlines()]


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    """Type a command in a folder that is in no checkout: exit status, output and error stream."""
    monkeypatch.chdir(tmp_path)
    for extra in ('papermill', 'IPython'): monkeypatch.setitem(sys.modules, extra, None)  # the extra `train` has none

    def typed(line):
        name, *words = shlex.split(line)
        assert name == 'srl-pose'
        if words[0] == 'train': words += QUICKLY + SMALL * ('--start-from' not in words)
        capsys.readouterr()
        return main(words), *capsys.readouterr()
    return typed


def draw_photos(folder):
    """A mouse in each, somewhere: where its keypoints are, by picture."""
    folder.mkdir()
    places = {}
    for i in range(10):
        points = (POINTS + np.random.default_rng(i).integers(0, 16, 2)).tolist()
        image = Image.new('RGB', (96, 80), 'white')
        pen = ImageDraw.Draw(image)
        for (x, y), colour in zip(points, ('red', 'blue', 'green', 'black', 'grey')): pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        image.save(folder / f'mouse{i}.png')
        places[f'mouse{i}.png'] = points
    return places


def fill_in(file, places):
    """What the reader of the page does with an editor."""
    data = json.loads(file.read_text())
    names = {image['id']: image['file_name'] for image in data['images']}
    for a in data['annotations']:
        points = places[names[a['image_id']]]
        a['keypoints'] = [v for x, y in points for v in (x, y, 2)]
        a['bbox'] = [min(x for x, _ in points) - 5, min(y for _, y in points) - 5, 28, 62]
    file.write_text(json.dumps(data))


def export_of_a_tool(file, places):
    """Numbers from 0, a second category, no boxes, areas or counts, flags as booleans, a skeleton from 0, other fields."""
    images = [dict(id=i, file_name=f'/data/upload/1/{name}', width=96, height=80, date_captured='') for i, name in enumerate(places)]
    annotations = [dict(id=i, image_id=i, category_id=0, keypoints=[v for x, y in points for v in (x, y, True)], attributes={}) for i, points in enumerate(places.values())]
    categories = [dict(id=0, name='mouse', supercategory='', keypoints=NAMES, skeleton=[[0, 3], [3, 4]]), dict(id=1, name='cage')]
    file.write_text(json.dumps(dict(info={}, licenses=[], images=images, annotations=annotations, categories=categories)))


def test_the_page(shell, tmp_path):
    """Every command of the page runs, one after the other, and the network that comes out knows its keypoints everywhere."""
    places = draw_photos(tmp_path / 'photos')
    export_of_a_tool(tmp_path / 'export.json', places)
    text = ''
    for line in commands():
        status, out, err = shell(line)
        assert status == 0, f'{line}\n{out}{err}'
        text += out
        if 'new-set mice' in line:
            status, out, _ = shell('srl-pose check mice')
            assert status == 1 and 'no person has a box and labelled keypoints' in out and 'cure: one object for each person' in out
            for split in ('train', 'val'): fill_in(tmp_path / f'mice/annotations/person_keypoints_{split}.json', places)
    assert '10 annotations have flags true or false' in text and '10 annotations have no box' in text and 'errors: none' in text
    assert 'tensors start new' in text and 'val: 2 persons in 2 images' in text and (tmp_path / 'run/curves/plots/images/predictions.png').is_file()
    found = json.loads((tmp_path / 'found/results.json').read_text())
    assert len(found) == 10 and {len(entry['keypoints']) for entry in found} == {15}
    boxed = json.loads((tmp_path / 'boxed/results.json').read_text())
    assert len(boxed) == 2 and all(entry['bbox'][2:] == [28, 62] for entry in boxed)
    lines = (tmp_path / 'found/results.csv').read_text().splitlines()[1:]
    assert {line.split(',')[3] for line in lines} == set(NAMES)
    check_shared(shell, tmp_path)


def check_shared(shell, folder):
    """Names, pairs, limbs and sigmas come out of the checkpoint, also through a shared folder and an exported file."""
    from srl_pose.use.predictor import Predictor

    points = Predictor.load(folder / 'run/model.pt').keypoint_set
    assert (list(points.names), points.flip_pairs, points.skeleton) == (NAMES, ((1, 2),), ((0, 3), (3, 4)))
    assert shell('srl-pose share run/model.pt shared --data-licence CC0 --metrics numbers/metrics.json')[0] == 0
    assert shell('srl-pose predict photos --weights shared --out again')[0] == 0
    assert (folder / 'again/results.csv').read_text() == (folder / 'found/results.csv').read_text()
    assert '2 persons in 2 images' in (folder / 'shared/README.md').read_text()
    onnxruntime = pytest.importorskip('onnxruntime')
    assert shell('srl-pose export run/model.pt run.onnx')[0] == 0
    about = onnxruntime.InferenceSession(folder / 'run.onnx').get_modelmeta().custom_metadata_map
    assert json.loads(about['keypoint_set']) == points.plain()


def test_training_starts_from_somebody_elses_file(shell, tmp_path):
    """Its backbone and its size are taken from it; where nothing tells its colours, training says so before it begins."""
    places = draw_photos(tmp_path / 'photos')
    assert shell(f'srl-pose new-set mice --keypoints {",".join(NAMES)} --photos photos')[0] == 0
    fill_in(tmp_path / 'mice/annotations/person_keypoints_train.json', places)
    torch.save(dict(state_dict=PoseResNet('resnet34').state_dict()), tmp_path / 'theirs_64x96.pth')
    line = 'srl-pose train --data mice --out run --start-from theirs_64x96.pth --block fft'
    status, out, err = shell(line)
    assert status == 1 and '--start-color-order of the command' in err and not out and not (tmp_path / 'run').exists()
    status, out, err = shell(f'{line} --start-color-order BGR')
    assert status == 0, err
    for said in ('resnet34, input 64x96 (height x width), block fft', 'turned from BGR to RGB', 'head replaced: 17 keypoints there, 5 here', 'first is deconv_layers.3.alpha'): assert said in out, out


@pytest.mark.parametrize('line, message', [
    ('srl-pose train --data no --out run', 'no: --data: no such folder'),
    ('srl-pose train --data . --out run', '--data: has no annotations/person_keypoints_train.json'),
    ('srl-pose evaluate --data . --weights no.pt', '--data: has no annotations/person_keypoints_train.json'),
    ('srl-pose new-set a --keypoints a,a', 'keypoint a occurs twice'),
    ('srl-pose new-set a --keypoints a --photos no', 'no: --photos: no such folder'),
    ('srl-pose new-set a --from no.json', '--photos: say where'),
])
def test_errors_name_the_option(line, message, shell):
    status, out, err = shell(line)
    assert (status, out) == (1, '') and err.count('\n') == 1 and message in err


def test_every_finding_has_a_cure():
    source = '\n'.join(file.read_text() for file in (ROOT / 'srl_pose/data').glob('*.py'))
    kinds = set(re.findall(r"(?:(?<![.\w])warning|\b[a-z]\.warn|\bimage\.finding)\('([^']+)'", source))
    assert len(kinds) > 20 and not [kind for kind in kinds if not {kind, f'detections.{kind}'} & CURES.keys()]

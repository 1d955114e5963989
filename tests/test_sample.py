"The committed sample data set: it is what the generator makes, it is small, and COCO's own tools read it."
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from srl_pose.pose.keypoints import COCO_KEYPOINTS
from srl_pose.sample.scenes import SEED, SPLITS, VERSION, make_image, make_sample

SAMPLE = Path(__file__).resolve().parents[1] / 'sample'
COUNTS = dict(train=(250, 759), val=(60, 183))  # images, persons


def read(name):
    return json.loads((SAMPLE / name).read_text())


def annotation_file(split):
    return f'annotations/person_keypoints_{split}.json'


@pytest.mark.parametrize('split', SPLITS)
def test_regenerates(split):
    truth = read(annotation_file(split))
    detections = read('detections/val.json') if split == 'val' else []
    for index in range(0, COUNTS[split][0], 23):
        image, record, people, found = make_image(split, index)
        assert record == truth['images'][index]
        stored = [a for a in truth['annotations'] if a['image_id'] == record['id']]
        assert [p['id'] for p in people] == [a['id'] for a in stored]
        for person, kept in zip(people, stored):
            assert np.allclose(person['keypoints'], kept['keypoints'], atol=0.11)  # a rounding step and a bit
            assert np.allclose(person['bbox'], kept['bbox'], atol=0.011)
            assert np.isclose(person['area'], kept['area'], rtol=1e-3)
        if split == 'val':
            kept, made = ([[*d['bbox'], d['score']] for d in boxes if d['image_id'] == record['id']]
                          for boxes in (detections, found))
            assert np.allclose(made, kept, atol=0.011)
        code = cv2.imencode('.jpg', image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
        jpeg = cv2.imdecode(code, cv2.IMREAD_COLOR)
        kept = cv2.imread(str(SAMPLE / 'images' / split / record['file_name']))
        difference = np.abs(jpeg.astype(int) - kept)  # zero with the same OpenCV; another build may round otherwise
        assert difference.mean() < 1 and np.percentile(difference, 99.5) < 12


def test_files_are_what_the_generator_writes(tmp_path):
    """A small data set begins as the committed one does, in all its JSON files."""
    make_sample(tmp_path / 'few', train=2, val=2)
    for split in SPLITS:
        made, kept = json.loads((tmp_path / 'few' / annotation_file(split)).read_text()), read(annotation_file(split))
        assert list(made) == list(kept)
        assert (made['info'], made['categories'], made['images']) == (kept['info'], kept['categories'], kept['images'][:2])
    boxes = json.loads((tmp_path / 'few' / 'detections/val.json').read_text())
    assert boxes == read('detections/val.json')[:len(boxes)]


@pytest.mark.parametrize('split', SPLITS)
def test_is_coco(split, capsys):
    coco = COCO(str(SAMPLE / annotation_file(split)))
    assert (len(coco.getImgIds()), len(coco.getAnnIds())) == COUNTS[split]
    category, = coco.loadCats(coco.getCatIds())
    assert category['keypoints'] == list(COCO_KEYPOINTS.names)
    assert category['skeleton'] == [[i + 1, j + 1] for i, j in COCO_KEYPOINTS.skeleton]
    assert coco.dataset['info']['seed'] == SEED and coco.dataset['info']['version'] == VERSION
    for image in coco.dataset['images']:
        h, w, _ = cv2.imread(str(SAMPLE / 'images' / split / image['file_name'])).shape
        assert (w, h) == (image['width'], image['height'])
        assert coco.getAnnIds(imgIds=[image['id']])
    for person in coco.dataset['annotations']:
        image = coco.imgs[person['image_id']]
        x, y, w, h = person['bbox']
        assert x >= 0 and y >= 0 and x + w <= image['width'] + 0.02 and y + h <= image['height'] + 0.02
        assert person['num_keypoints'] == sum(v > 0 for v in person['keypoints'][2::3]) > 0
        assert set(person['keypoints'][2::3]) <= {0, 1, 2}


def test_detections_load(capsys):
    coco = COCO(str(SAMPLE / annotation_file('val')))
    found = coco.loadRes(str(SAMPLE / 'detections/val.json'))
    assert set(found.getImgIds()) == set(coco.getImgIds())
    assert all(0 < d['score'] < 1 for d in found.dataset['annotations'])
    assert len(coco.getAnnIds()) < len(found.getAnnIds()) < 1.4 * len(coco.getAnnIds())


def test_is_small_and_complete():
    files = {str(f.relative_to(SAMPLE)): f.stat().st_size for f in SAMPLE.rglob('*') if f.is_file()}
    assert sum(files.values()) <= 6_000_000
    expected = {'detections/val.json', *(annotation_file(s) for s in SPLITS)}
    expected |= {f"images/{s}/{i['file_name']}" for s in SPLITS for i in read(annotation_file(s))['images']}
    assert set(files) == expected


def test_refuses_a_full_folder(tmp_path):
    (tmp_path / 'kept').write_text('')
    with pytest.raises(ValueError, match='not an empty folder'):
        make_sample(tmp_path, train=1, val=1)
    assert [f.name for f in tmp_path.iterdir()] == ['kept']


def test_another_seed_is_another_set():
    (one, *_), (two, *_) = make_image('train', 0), make_image('train', 0, SEED + 1)
    assert one.shape != two.shape or (one != two).any()

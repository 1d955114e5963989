"""Person crops against outputs of the original implementation, and what happens to data that is wrong."""
import json
import pickle
import shutil
import warnings

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from srl_pose.data.check import check
from srl_pose.data.coco import CocoPersons
from srl_pose.pose.crops import Augmentation
from srl_pose.data.annotations import read_annotations
from srl_pose.evaluation.cocoeval import evaluate_results
from srl_pose.evaluation.evaluate import evaluate
from srl_pose.files import DataError
from srl_pose.pose.heatmap import Heatmaps
from srl_pose.pose.keypoints import COCO_KEYPOINTS, KeypointSet

SIZE = (96, 128)


# ---------------------------------------------------------------------------------------- the original's outputs

@pytest.fixture(scope='module')
def golden(external):
    return np.load(external / 'golden' / 'coco.npz')


def test_golden_samples(external, golden):
    sizes = sorted({tuple(map(int, k.split('|')[0].split('x'))) for k in golden.files if k.endswith('|gt|idx')})
    assert sizes
    for h, w in sizes:
        g = {k.split('|')[2]: golden[k] for k in golden.files if k.startswith(f'{h}x{w}|gt|')}
        persons = CocoPersons(external / 'data/coco-mini', 'val2017', input_size=(w, h))
        assert len(persons) == g['n']
        assert np.array_equal(persons.image_id[g['idx']], g['image_id'])
        assert np.abs(persons.center[g['idx']] - g['center']).max() <= 1e-4
        assert np.abs(persons.scale[g['idx']] - g['scale']).max() <= 1e-4
        items = [persons[int(i)] for i in g['idx']]
        names = 'image', 'keypoints', 'visible'
        image, keypoints, visible = (torch.stack([item[k] for item in items]) for k in names)
        pooled = torch.nn.functional.avg_pool2d(image.flip(1).float(), 8).numpy()  # RGB -> BGR
        assert np.abs(pooled - g['bgr_pool8']).mean(axis=(1, 2, 3)).max() <= 1
        assert np.abs(keypoints.numpy() - g['joints'][..., :2]).max() <= 1e-3
        heatmaps, weights = Heatmaps((w, h)).encode(keypoints, visible)
        assert np.array_equal(weights.numpy(), g['weight'][..., 0])
        assert np.abs(heatmaps.numpy() - g['target'].astype(np.float32)).max() <= 1e-3  # half precision in the file


@pytest.mark.parametrize('data, split, count', [
    ('coco-mini', 'train2017', 86), ('coco-mini', 'val2017', 68), ('lspet', 'train', 4000), ('lspet', 'val', 600)])
def test_real_data_sets_open(external, data, split, count):
    persons = CocoPersons(external / 'data' / data, split, input_size=SIZE)
    assert len(persons) == count
    assert persons[count - 1]['image'].float().std() > 1


def test_table_agrees_with_coco(external):
    person = read_annotations(
        external / 'data/coco-mini/annotations/person_keypoints_val2017.json', COCO_KEYPOINTS.names)['categories'][0]
    assert list(COCO_KEYPOINTS.names) == person['keypoints']
    pairs = lambda skeleton: {tuple(sorted(pair)) for pair in skeleton}
    assert pairs(COCO_KEYPOINTS.skeleton) == pairs((np.array(person['skeleton']) - 1).tolist())


# ---------------------------------------------------------------------------------------- a data set to break

def write(file, data):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(data if isinstance(data, str) else json.dumps(data))


@pytest.fixture
def root(tmp_path):
    """Two images, three persons, two detections."""
    rng = np.random.default_rng(0)
    root = tmp_path / 'data'
    (root / 'images/val').mkdir(parents=True)
    for name in 'ab':
        noise = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (160, 120), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(root / f'images/val/{name}.jpg'), noise)

    def person(i, image, x):
        keypoints = np.concatenate([rng.uniform(0, 40, (17, 2)) + [x, 30], np.full((17, 1), 2)], 1)
        return dict(id=i, image_id=image, category_id=1, bbox=[x, 30., 40., 60.], area=1500., iscrowd=0,
                    num_keypoints=17, keypoints=keypoints.ravel().round(1).tolist())

    write(root / 'annotations/person_keypoints_val.json', dict(
        images=[dict(id=i, file_name=f'{n}.jpg', width=160, height=120) for i, n in ((20, 'b'), (10, 'a'))],
        categories=[dict(id=1, name='person', keypoints=list(COCO_KEYPOINTS.names))],
        annotations=[person(1, 10, 20.), person(2, 20, 50.), person(3, 10, 90.)]))
    write(root / 'detections/val.json', [
        dict(image_id=10, category_id=1, bbox=[20, 30, 40, 60], score=0.9),
        dict(image_id=20, category_id=3, bbox=[0, 0, 9, 9], score=0.8),
        dict(image_id=20, category_id=1, bbox=[50, 30, 40, 60], score=0.7)])
    return root


def change(kind, edit):
    """A breaker that edits the parsed annotation ('person_keypoints_val.json') or detection ('val.json') file."""
    def breaker(root):
        file = root / ('detections/val.json' if kind == 'detections' else 'annotations/person_keypoints_val.json')
        data = json.loads(file.read_text())
        edit(data)
        write(file, data)
    return breaker


def annotated(section, **fields):
    return change('annotations', lambda d: d[section][1].update(fields))


def dropped(section, field):
    return change('annotations', lambda d: d[section][1 if section != 'categories' else 0].pop(field))


def detected(**fields):
    return change('detections', lambda d: d[2].update(fields))


def edit_image(edit):
    return lambda root: edit(root / 'images/val/a.jpg')


def persons_file(edit):
    return lambda root: edit(root / 'annotations' / FILE)


FILE, DETECTIONS, IMAGE = 'person_keypoints_val.json', 'detections/val.json', 'images/val/a.jpg'
ALL = {  # what is broken: (how, file named by the message, field or reason named by the message)
    'no root': (shutil.rmtree, 'data', 'no such data root'),
    'annotations missing': (persons_file(lambda f: f.unlink()), FILE, 'no such file'),
    'annotations a folder': (persons_file(lambda f: [f.unlink(), f.mkdir()]), FILE, 'cannot be read'),
    'annotations empty': (persons_file(lambda f: f.write_text('')), FILE, 'is not JSON'),
    'annotations cut': (persons_file(lambda f: f.write_text(f.read_text()[:-40])), FILE, 'is not JSON'),
    'annotations binary': (persons_file(lambda f: f.write_bytes(b'\xff\xfe\x00')), FILE, 'is not JSON'),
    'annotations nested': (persons_file(lambda f: f.write_text('[' * 100000)), FILE, 'is not JSON'),
    'annotations a list': (persons_file(lambda f: f.write_text('[]')), FILE, 'images, annotations and categories'),
    **{f'no {key}': (change('annotations', lambda d, key=key: d.pop(key)), FILE, repr(key))
       for key in ('images', 'annotations', 'categories')},
    'images null': (change('annotations', lambda d: d.update(images=None)), FILE, "'images'"),
    'images empty': (change('annotations', lambda d: d.update(images=[])), FILE, 'image_id'),
    'image not an object': (change('annotations', lambda d: d['images'].append(7)), FILE, 'images[2]'),
    **{f'image without {key}': (dropped('images', key), FILE, f"images[1] has no '{key}'")
       for key in ('id', 'file_name', 'width', 'height')},
    **{f'annotation without {key}': (dropped('annotations', key), FILE, f"annotations[1] has no '{key}'")
       for key in ('id', 'image_id', 'category_id', 'bbox', 'keypoints')},
    'category without id': (dropped('categories', 'id'), FILE, "categories[0] has no 'id'"),
    'no person category': (change('annotations', lambda d: d['categories'][0].update(id=2)), FILE, 'categories'),
    'other keypoints': (
        change('annotations', lambda d: d['categories'][0]['keypoints'].reverse()), FILE, 'categories: keypoints'),
    'image id twice': (annotated('images', id=20), FILE, 'images[1].id 20 occurs twice'),
    'image id text': (annotated('images', id='10'), FILE, 'images[1].id'),
    'width zero': (annotated('images', width=0), FILE, 'images[1].width must be positive'),
    'width fraction': (annotated('images', width=160.5), FILE, 'images[1].width'),
    'height text': (annotated('images', height='120'), FILE, 'images[1].height'),
    'annotation id twice': (annotated('annotations', id=1), FILE, 'annotations[1].id 1 occurs twice'),
    'unknown image': (annotated('annotations', image_id=99), FILE, 'annotations[1].image_id must be the id of'),
    'huge id': (annotated('annotations', image_id=2**70), FILE, 'annotations[1].image_id'),
    'box of three': (annotated('annotations', bbox=[1, 2, 3]), FILE, 'annotations[1].bbox must be 4 finite numbers, none beyond 1e10, has 3: [1, 2, 3]'),
    'box null': (annotated('annotations', bbox=None), FILE, 'annotations[1].bbox'),
    'box with text': (annotated('annotations', bbox=[1, 2, 3, '4']), FILE, 'annotations[1].bbox'),
    'box nan': (annotated('annotations', bbox=[1, 2, 3, float('nan')]), FILE, 'annotations[1].bbox'),
    'box infinite': (annotated('annotations', bbox=[1, 2, 3, float('inf')]), FILE, 'annotations[1].bbox'),
    'area nan': (annotated('annotations', area=float('nan')), FILE, 'annotations[1].area'),
    'keypoints short': (annotated('annotations', keypoints=[1, 2, 2] * 16), FILE, 'annotations[1].keypoints must be 51 finite numbers, none beyond 1e10, has 48'),
    'keypoints null': (annotated('annotations', keypoints=[1, 2, 2] * 16 + [None, 0, 0]), FILE, 'but [48], x of right_ankle, is None'),
    'keypoints nan': (annotated('annotations', keypoints=[float('nan')] * 51), FILE, 'annotations[1].keypoints'),
    'keypoints nested': (annotated('annotations', keypoints=[[1, 2, 2]] * 17), FILE, 'annotations[1].keypoints'),
    'keypoints astronomic': (annotated('annotations', keypoints=[1e300] * 51), FILE, 'annotations[1].keypoints'),
    'iscrowd text': (annotated('annotations', iscrowd='no'), FILE, 'annotations[1].iscrowd'),
    'nobody labelled': (
        change('annotations', lambda d: [a.update(keypoints=[0] * 51) for a in d['annotations']]), FILE, 'labelled'),
    'nobody': (change('annotations', lambda d: d.update(annotations=[])), FILE, 'no person'),
    'outside by ..': (annotated('images', file_name='../val/a.jpg'), FILE, "images[1].file_name must be a path below"),
    'outside by way': (annotated('images', file_name='x/../../a.jpg'), FILE, 'images[1].file_name'),
    'outside absolute': (annotated('images', file_name='/etc/hostname'), FILE, 'images[1].file_name'),
    'name empty': (annotated('images', file_name=''), FILE, 'images[1].file_name'),
    'name the folder': (annotated('images', file_name='.'), FILE, 'images[1].file_name'),
    'name a number': (annotated('images', file_name=5), FILE, 'images[1].file_name'),
    'name with null': (annotated('images', file_name='a\0.jpg'), FILE, 'images[1].file_name'),
    'image folder missing': (lambda r: shutil.rmtree(r / 'images'), 'images/val', 'no such image folder'),
    'image missing': (edit_image(lambda f: f.unlink()), IMAGE, 'missing'),
    'image a folder': (edit_image(lambda f: [f.unlink(), f.mkdir()]), IMAGE, 'cannot be read'),
    'image empty': (edit_image(lambda f: f.write_bytes(b'')), IMAGE, 'empty'),
    'image truncated': (edit_image(lambda f: f.write_bytes(f.read_bytes()[:-200])), IMAGE, 'truncated'),
    'image head only': (edit_image(lambda f: f.write_bytes(f.read_bytes()[:20])), IMAGE, 'truncated'),
    'image of text': (edit_image(lambda f: f.write_text('404 not found')), IMAGE, 'unreadable'),
    'dangling link': (edit_image(lambda f: [f.unlink(), f.symlink_to('nowhere.jpg')]), IMAGE, 'missing'),
}
BOXES = {
    'detections missing': (lambda r: (r / DETECTIONS).unlink(), DETECTIONS, 'no such file'),
    'detections not JSON': (lambda r: write(r / DETECTIONS, '{'), DETECTIONS, 'is not JSON'),
    'detections an object': (lambda r: write(r / DETECTIONS, '{}'), DETECTIONS, 'must be a list'),
    'detections empty': (lambda r: write(r / DETECTIONS, '[]'), DETECTIONS, 'category_id 1'),
    'no person': (change('detections', lambda d: [x.update(category_id=3) for x in d]), DETECTIONS, 'category_id 1'),
    'not an object': (change('detections', lambda d: d.append(None)), DETECTIONS, 'detections[3]'),
    **{f'detection without {key}': (
        change('detections', lambda d, key=key: d[2].pop(key)), DETECTIONS, f"detections[2] has no '{key}'")
       for key in ('image_id', 'category_id', 'bbox', 'score')},
    'unknown image': (detected(image_id=7), DETECTIONS, 'detections[2].image_id'),
    'box of five': (detected(bbox=[1, 2, 3, 4, 5]), DETECTIONS, 'detections[2].bbox'),
    'box without size': (detected(bbox=[1, 2, 0, 0]), DETECTIONS, 'detections[2].bbox must have a positive size'),
    'box negative': (detected(bbox=[1, 2, -3, 4]), DETECTIONS, 'detections[2].bbox'),
    'box astronomic': (detected(bbox=[1e300, 2, 3, 4]), DETECTIONS, 'detections[2].bbox'),
    'score nan': (detected(score=float('nan')), DETECTIONS, 'detections[2].score'),
    'score text': (detected(score='0.5'), DETECTIONS, 'detections[2].score'),
    'image missing': (edit_image(lambda f: f.unlink()), IMAGE, 'missing'),
}


def snapshot(folder):
    return sorted((str(f), f.lstat().st_mtime_ns) for f in folder.rglob('*'))


@pytest.mark.parametrize('boxes, case', [('gt', c) for c in ALL] + [('detections/val.json', c) for c in BOXES])
def test_bad_input(root, boxes, case):
    breaker, file, field = (ALL if boxes == 'gt' else BOXES)[case]
    CocoPersons(root, 'val', input_size=SIZE, boxes=boxes)
    breaker(root)
    before = snapshot(root)
    with pytest.raises(DataError) as caught:
        CocoPersons(root, 'val', input_size=SIZE, boxes=boxes)
    assert file in str(caught.value) and field in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert snapshot(root) == before  # nothing written


@pytest.mark.parametrize('kwargs, message', [
    (dict(split='../val'), 'split'), (dict(boxes='../val.json'), 'boxes'), (dict(boxes='/elsewhere/val.json'), 'boxes'),
    (dict(boxes=''), 'boxes'), (dict(input_size=(96, 130)), 'input_size'), (dict(input_size=(0, 128)), 'input_size'),
    (dict(seed=-1), 'seed'), (dict(seed=0.5), 'seed'),
    (dict(boxes='detections/val.json', augmentation=Augmentation()), 'augmentation'),
    (dict(keypoint_set=KeypointSet(('a', 'b'), (), (), (.1, .1))), 'categories: keypoints')])
def test_bad_arguments(root, kwargs, message):
    with pytest.raises(ValueError, match=message):
        CocoPersons(root, **{'split': 'val', 'input_size': SIZE, **kwargs})


def test_errors_while_running_name_the_image(root):
    persons = CocoPersons(root, 'val', input_size=SIZE)
    file = root / 'images/val/b.jpg'
    good = file.read_bytes()
    cv2.imwrite(str(file), np.zeros((120, 161, 3), np.uint8))
    with pytest.raises(DataError, match=r'b\.jpg: image is 161x120, width and height in .* say 160x120'):
        persons[0]
    for content in (good[:-300], b'', b'\xff\xd8 not much \xff\xd9'):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r'b\.jpg: image'):
            persons[0]
    file.unlink()
    with pytest.raises(DataError, match=r'b\.jpg: image is missing'):
        persons[0]
    CocoPersons(root, 'val', input_size=SIZE, check_images=False)  # the images are looked at later


# ---------------------------------------------------------------------------------------- what must hold

def test_order_links_and_fields(root):
    file = root / 'images/val/a.jpg'
    file.rename(root / 'elsewhere.jpg')
    file.symlink_to(root / 'elsewhere.jpg')  # as DVC may store a file
    persons = CocoPersons(root, 'val', input_size=SIZE)
    assert persons.image_id.tolist() == [20, 10, 10]  # images in the file's order
    assert persons.center.tolist() == [[69.5, 59.5], [39.5, 59.5], [109.5, 59.5]]  # clipped as the original does
    assert persons.score.tolist() == [1, 1, 1]
    assert np.allclose(persons.area, np.prod(persons.scale * 200, 1))
    boxes = CocoPersons(root, 'val', input_size=SIZE, boxes='detections/val.json')
    assert boxes.image_id.tolist() == [10, 20] and boxes.score.tolist() == [0.9, 0.7]
    assert boxes.center.tolist() == [[40, 60], [70, 60]]  # not clipped


def test_absent_optional_fields_are_filled_in(root):
    change('annotations', lambda d: [a.pop(k) for a in d['annotations'] for k in ('iscrowd', 'num_keypoints')])(root)
    change('annotations', lambda d: d['categories'][0].pop('keypoints'))(root)
    persons = read_annotations(root / 'annotations' / FILE, COCO_KEYPOINTS.names)['annotations']
    assert [(p['iscrowd'], p['num_keypoints']) for p in persons] == [(0, 17)] * 3
    assert len(CocoPersons(root, 'val', input_size=SIZE)) == 3


def test_skipped_persons(root):
    """Crowds, other categories, empty areas, boxes outside and persons without labels are no persons to train on."""
    good = dict(iscrowd=0, category_id=1, area=9., bbox=[9, 9, 20, 20], keypoints=[30, 30, 1] * 17)
    for fields in (dict(iscrowd=1), dict(category_id=2), dict(area=0), dict(bbox=[500, 0, 20, 20]),
                   dict(keypoints=[0] * 51)):
        annotated('annotations', **fields)(root)
        assert CocoPersons(root, 'val', input_size=SIZE).image_id.tolist() == [10, 10]
        annotated('annotations', **good)(root)
        assert len(CocoPersons(root, 'val', input_size=SIZE)) == 3


THREE = dict(keypoints=['top', 'left_end', 'right_end'], skeleton=[[1, 2], [1, 3]], sigmas=[.05, .08, .08])


def three_keypoints(root, **category):
    """Make the data set's persons ones of three keypoints."""
    change('annotations', lambda d: d['categories'][0].update({**THREE, **category}))(root)
    keypoints = [60, 40, 2, 50, 60, 2, 70, 60, 1]
    change('annotations', lambda d: [a.update(keypoints=keypoints) for a in d['annotations']])(root)


def test_other_keypoints(root):
    points = KeypointSet(tuple(THREE['keypoints']), ((1, 2),), ((0, 1), (0, 2)), (.05, .08, .08))
    three_keypoints(root)
    mirror = Augmentation(scale=0, rotation=0, flip_probability=1)
    for given in (None, points):
        persons = CocoPersons(root, 'val', input_size=SIZE, keypoint_set=given, augmentation=mirror)
        assert persons.keypoint_set == points
        assert persons[0]['keypoints'].shape == (3, 2)
        assert persons[0]['visible'].tolist() == [2, 1, 2]  # left and right exchanged
    change('annotations', lambda d: d['categories'][0].pop('sigmas'))(root)
    assert len(CocoPersons(root, 'val', input_size=SIZE, keypoint_set=points)) == 3
    with pytest.raises(DataError, match=rf'{FILE}: categories: .* so sigmas'):
        CocoPersons(root, 'val', input_size=SIZE)


@pytest.mark.parametrize('category, message', [
    (dict(sigmas=[.1] * 4), 'sigmas: 4 numbers for 3 keypoints'), (dict(sigmas=[.1, .1, 0]), 'sigmas: all must be positive, that of right_end is 0'),
    (dict(sigmas=[.1, 'x', .1]), "sigmas must be numbers, sigmas[1] is 'x'"),
    (dict(sigmas=None), 'sigmas must be a list'), (dict(flip_pairs=[['left_end', 4]]), "flip_pairs: unknown keypoint '4'"),
    (dict(flip_pairs=[[1, 2], [2, 3]]), 'flip_pairs: keypoint left_end occurs twice'), (dict(flip_pairs=[[1, 2, 3]]), 'is not a pair'),
    (dict(keypoints=['a', 'b', 'a']), 'names: keypoint a occurs twice'), (dict(keypoints=[1, 2, 3]), 'keypoints must be names'),
    (dict(keypoints=[]), 'keypoints must be names, the list is empty'), (dict(keypoints=['a', 2, 'c']), 'keypoints[1] is 2'), (dict(keypoints='abc'), 'keypoints must be a list')])
def test_keypoints_that_make_no_sense(root, category, message):
    three_keypoints(root, **category)
    with pytest.raises(DataError) as caught:
        CocoPersons(root, 'val', input_size=SIZE)
    assert str(caught.value).startswith(f'{root / "annotations" / FILE}: categories: ') and message in str(caught.value)


@pytest.mark.parametrize('skeleton, limbs', [
    ([[0, 1], [0, 2]], 2), ([[1, 2], [4, 2]], 1), ('x', 0), (None, 0), ([[1]], 0), ([1, 2], 0), ([[1, 2, 3], [1, 3]], 1), ([['top', 'left_end']], 1), ([[True, 2.5]], 0)])
def test_a_skeleton_is_only_drawn(root, skeleton, limbs):
    """Counted from 0, or with joints beyond the list, it keeps nobody out."""
    three_keypoints(root, skeleton=skeleton)
    persons = CocoPersons(root, 'val', input_size=SIZE)
    assert len(persons) == 3 and len(persons.keypoint_set.skeleton) == limbs
    assert all(0 <= k < 3 for limb in persons.keypoint_set.skeleton for k in limb)
    report = check(root)
    assert report.errors == [] and ([f['kind'] for f in report.warnings if f['kind'] == 'categories.skeleton'] == []) == (skeleton == [['top', 'left_end']])


def perfect(persons):
    """Results of somebody who knows the answer."""
    return [dict(image_id=int(i), category_id=1, keypoints=np.column_stack([k, np.ones(17)]).ravel().tolist(), score=1.) for i, k in zip(persons.image_id, persons.keypoints)]


@pytest.mark.parametrize('edit, said', [
    (lambda d: [a.update(id=i) for i, a in enumerate(d['annotations'])], 'annotations[0].id is 0, which COCOeval takes for no match'),
    (lambda d: d['annotations'][1].update(num_keypoints=0), 'annotations[1].num_keypoints is 0, but 17 keypoints are labelled; the labels count'),
    (lambda d: [a.update(num_keypoints=0) for a in d['annotations']], 'the labels count'),
    (lambda d: d['annotations'][1].update(num_keypoints=17, keypoints=[0] * 51), 'annotations[1].num_keypoints is 17, but 0 keypoints are labelled')])
def test_who_counts_is_the_same_for_training_and_evaluation(root, edit, said):
    change('annotations', edit)(root)
    persons = CocoPersons(root, 'val', input_size=SIZE)
    scores = evaluate_results(persons.annotation_file, perfect(persons))
    assert (scores['AP'], scores['AR']) == (1, 1)
    fewer = evaluate_results(persons.annotation_file, perfect(persons)[1:])
    assert fewer['AR'] == pytest.approx(1 - 1 / len(persons))
    assert any(said in m for f in check(root).warnings for m in f['messages'])


@pytest.mark.parametrize('kind, area', [('stand-in', lambda w, h: .53 * w * h), ('boxes', lambda w, h: w * h), ('share of boxes', lambda w, h: w * h / 2), ('placeholder', lambda w, h: 1)])
def test_the_kind_of_area_is_said(root, kind, area):
    change('annotations', lambda d: [a.update(bbox=[a['bbox'][0], 30, 40, 60 + i], area=area(40, 60 + i)) for i, a in enumerate(d['annotations'])])(root)
    persons = CocoPersons(root, 'val', input_size=SIZE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        found = evaluate(torch.nn.Conv2d(3, 17, 4, 4), persons, resamples=3)
    assert found.settings['area'] == kind and len(found.settings['area_over_box']) == 3
    assert len(found.settings['warnings']) == (kind != 'stand-in') == sum('AP and AR depend on it' in str(w.message) for w in caught)
    assert [f['kind'] for f in check(root).warnings if 'area' in f['kind']] == ['kind of area'] * (kind != 'stand-in')


def as_floats(data):
    for section, fields in (('images', ('id', 'width', 'height')), ('annotations', ('id', 'image_id', 'category_id', 'iscrowd', 'num_keypoints')), ('categories', ('id',))):
        for entry in data[section]:
            entry.update({field: float(entry[field]) for field in fields})


@pytest.mark.parametrize('edit, said', [
    (as_floats, 'annotations[0].image_id is 10.0, taken as 10 (and 2 more)'),
    (lambda d: [a.update(iscrowd=False) for a in d['annotations']], 'annotations[0].iscrowd is False, taken as 0 (and 2 more)'),
    (lambda d: [a.pop('area') for a in d['annotations']], 'annotations[0].area is missing, taken as 0.53 of the box (and 2 more)'),
    (lambda d: d['annotations'][1].update(area=None), 'annotations[1].area is missing, taken as 0.53 of the box'),
    (lambda d: d['annotations'].append(dict(id=9, image_id=10, category_id=3)), 'category_id 3 is in no category')])
def test_what_other_tools_take_is_taken_and_said(root, edit, said):
    before = CocoPersons(root, 'val', input_size=SIZE)
    change('annotations', edit)(root)
    persons = CocoPersons(root, 'val', input_size=SIZE)
    assert np.array_equal(persons.keypoints, before.keypoints) and np.array_equal(persons.image_id, before.image_id)
    assert evaluate_results(persons.annotation_file, perfect(persons))['AR'] == 1
    report = check(root)
    assert report.errors == [] and any(said in m for f in report.warnings for m in f['messages'])


@pytest.mark.parametrize('workers', [0, 1, 2])
def test_same_samples_for_any_worker_count(root, workers):
    augmentation = Augmentation(half_body_probability=0.5, dropout_probability=0.5)
    persons = CocoPersons(root, 'val', input_size=SIZE, augmentation=augmentation, seed=5)
    loader = DataLoader(persons, batch_size=2, num_workers=workers, persistent_workers=workers > 0)
    for epoch in (0, 3, 1):
        persons.set_epoch(epoch)
        for batch in loader:
            for k, index in enumerate(batch['index'].tolist()):
                fresh = CocoPersons(root, 'val', input_size=SIZE, augmentation=augmentation, seed=5)
                fresh.set_epoch(epoch)
                for name, value in fresh[index].items():
                    assert torch.equal(batch[name][k], value), (epoch, index, name)


def test_augmentation_depends_on_seed_epoch_and_index(root):
    def crop(seed, epoch, index):
        persons = CocoPersons(root, 'val', input_size=SIZE, augmentation=Augmentation(), seed=seed)
        persons.set_epoch(epoch)
        return persons[index]['image']

    assert torch.equal(crop(1, 2, 0), crop(1, 2, 0))
    assert not torch.equal(crop(1, 2, 0), crop(2, 2, 0)) and not torch.equal(crop(1, 2, 0), crop(1, 3, 0))


@pytest.mark.parametrize('rotation', [0., 40.])
def test_keypoints_follow_the_image(root, rotation):
    """Bright dots at the keypoints of a black image are found at the keypoints of its augmented crops."""
    dots = list(zip(range(20, 122, 6), range(40, 74, 2)))
    fields = dict(keypoints=[v for x, y in dots for v in (x, y, 2)], bbox=[20., 40., 100., 34.])
    change('annotations', lambda d: [a.update(fields) for a in d['annotations']])(root)
    augmentation = Augmentation(rotation=rotation, rotation_probability=1)
    for name in 'ab':
        image = np.zeros((120, 160, 3), np.uint8)
        for x, y in dots:
            image[y, x] = 255
        cv2.imwrite(str(root / f'images/val/{name}.png'), image)
    change('annotations', lambda d: [i.update(file_name=i['file_name'][:-3] + 'png') for i in d['images']])(root)
    persons, seen, flips = CocoPersons(root, 'val', input_size=(192, 256), augmentation=augmentation), 0, set()
    for epoch in range(8):
        persons.set_epoch(epoch)
        item = persons[0]
        flips.add(bool(item['keypoints'][0, 0] < item['keypoints'][5, 0]))
        for x, y in item['keypoints'].round().int().tolist():
            if 3 < x < 188 and 3 < y < 252:
                seen += 1
                assert item['image'][:, y - 2:y + 3, x - 2:x + 3].max() > 50
    assert seen > 40 and (rotation or len(flips) == 2)


def test_nothing_but_arrays_per_person(root):
    """Workers share arrays; a list of a million objects they would copy."""
    persons = CocoPersons(root, 'val', input_size=SIZE)
    for name, value in (vars(persons) | vars(persons.images) | vars(persons.images.files)).items():
        if isinstance(value, np.ndarray):
            assert value.dtype != object and value.flags.c_contiguous, name
        else:
            assert not isinstance(value, (list, dict)) or len(value) == len(COCO_KEYPOINTS), name
    assert torch.equal(pickle.loads(pickle.dumps(persons))[0]['image'], persons[0]['image'])

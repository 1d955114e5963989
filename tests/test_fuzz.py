"""Broken inputs, generated: each gives one `DataError` naming file and field, or a listed warning of the checker."""
import io
import json
import os
import random
import re
import shutil
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from srl_pose.data.check import check
from srl_pose.data.coco import CocoPersons
from srl_pose.files import DataError
from srl_pose.testing import keep_keypoints
from srl_pose.use.boxes import boxes_from_file, check_boxes
from srl_pose.use.frames import Frame
from test_images import ARCHIVES

SAMPLE = Path(__file__).resolve().parents[1] / 'sample'
ANNOTATIONS, DETECTIONS = 'annotations/person_keypoints_val.json', 'detections/val.json'


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """Three images of the sample with their persons and detections."""
    root = tmp_path_factory.mktemp('whole') / 'data'
    data, found = (json.loads((SAMPLE / name).read_text()) for name in (ANNOTATIONS, DETECTIONS))
    data['images'] = data['images'][:3]
    ids = {image['id'] for image in data['images']}
    data['annotations'] = [a for a in data['annotations'] if a['image_id'] in ids]
    for name, content in (ANNOTATIONS, data), (DETECTIONS, [d for d in found if d['image_id'] in ids]):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(json.dumps(content))
    (root / 'images/val').mkdir(parents=True)
    for image in data['images']:
        shutil.copy(SAMPLE / 'images/val' / image['file_name'], root / 'images/val' / image['file_name'])
    return root


@pytest.fixture
def root(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / 'data')


def read_everything(root):
    for boxes in ('gt', DETECTIONS):
        persons = CocoPersons(root, 'val', input_size=(96, 128), boxes=boxes)
        for i in range(len(persons)):
            persons[i]
        if boxes == 'gt':
            count = len(persons)
    return count


def judge(root):
    """The reader's error (None: everything could be read) and the checker's report; both must agree and write nothing."""
    snapshot = lambda: sorted((str(f), f.lstat().st_mtime_ns, f.lstat().st_size) for f in root.rglob('*'))
    before, error, count = snapshot(), None, None
    try:
        count = read_everything(root)
    except DataError as e:  # any other exception fails the test
        error = str(e)
        assert len(error.splitlines()) == 1 and len(error) < 1000 and error.startswith(f'{root}/'), error
    report = check(root, ['val'], detections=DETECTIONS)
    messages = [m for f in report.errors + report.warnings for m in f['messages']]
    assert all(m.startswith(f'{root}/') and len(m.splitlines()) == 1 and len(m) < 1000 for m in messages), messages
    assert bool(error) == bool(report.errors), (error, report.errors)
    assert error.split(': ')[0] in ' '.join(messages) if error else report.counts['val']['persons to train on'] == count
    json.dumps([report.counts, report.errors, report.warnings], allow_nan=False)
    assert snapshot() == before
    return error, report


def edit(root, name, change):
    data = json.loads((root / name).read_text())
    change(data)
    (root / name).write_text(json.dumps(data))


def test_the_unbroken_set_is_clean(root):
    error, report = judge(root)
    assert (error, report.errors, report.warnings) == (None, [], [])


# ---------------------------------------------------------------------------------------- a wrong value in a field

def nested(depth):
    return [nested(depth - 1)] if depth else []


VALUES = [
    None, True, 'text', '', '12', 0.5, -1, 0, -0.0, float('nan'), float('inf'), -float('inf'), 1e300, 2**31, 2**53, 2**63, 2**64, -2**63,
    10**400, [], {}, {'a': 1}, [None], [1, 2], [1, 2, 3, '4'], [1, 2, 3, 4, 5], [True] * 4, [True] * 51, [[1, 2, 3, 4]], nested(60), nested(900),
    [0, 0, 0, 0], [1, 2, -3, -4], [900, 900, 5, 5], [-90, -90, 5, 5], [float('nan')] * 4, [-2**63] * 4, [9e9] * 4, [1e300] * 4, [1e-300] * 4,
    [0] * 51, [1, 1, 3] * 17, [1, 1, -1] * 17, [9e9, 9e9, 2] * 17, [1, 1, .5] * 17, ['1'] * 51, [0, 0, 2] * 17, [1] * 50, [1] * 10000,
    'x' * 5000, '../a.jpg', 'x/../../a.jpg', '/etc/hostname', '.', 'a\0.jpg', 'a\nb.jpg', '\ud800.jpg', '\udc80.jpg', '\x1b[31m', 'C:\\a.jpg']
FIELDS = {
    ANNOTATIONS: dict(images=('id', 'width', 'height', 'file_name'), categories=('id', 'name', 'keypoints', 'skeleton'), annotations=(
        'id', 'image_id', 'category_id', 'bbox', 'area', 'keypoints', 'iscrowd', 'num_keypoints')),
    DETECTIONS: {'': ('image_id', 'category_id', 'bbox', 'score')}}


def harmless(name, section, field, value):
    """Values that are fine in this field, though unusual."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (
        (field == 'id' and section == 'annotations' and isinstance(value, int) and number and 0 < abs(value) < 2**53)
        or (field == 'area' and number and 0 < value < 1e10) or (field == 'iscrowd' and value == 0 and isinstance(value, int) and number)
        or (field == 'score' and number and 0 <= value <= 1) or (field == 'skeleton' and value == [])
        or (name == DETECTIONS and field == 'category_id' and isinstance(value, int) and number and abs(value) < 2**53)
        or (name == DETECTIONS and field == 'bbox' and value in ([900, 900, 5, 5], [-90, -90, 5, 5], [9e9] * 4))
        or (field == 'keypoints' and section == 'annotations' and value == [0] * 51))


def wrong_values():
    rng = random.Random(0)
    for name, sections in FIELDS.items():
        for section, fields in sections.items():
            for field in fields:
                fitting = [v for v in VALUES if not harmless(name, section, field, v)]
                kind = dict(bbox=list, keypoints=list, skeleton=list, file_name=str, name=str).get(field, (int, float))
                near = [v for v in fitting if isinstance(v, kind)]
                far = rng.sample([v for v in fitting if not isinstance(v, kind)], 4)
                yield from ((name, section, field, value) for value in near + far + ['dropped'])


@pytest.mark.parametrize('name,section,field,value', list(wrong_values()), ids=lambda v: re.sub(r'\W+', '-', repr(v))[:24])
def test_wrong_value(root, name, section, field, value):
    def change(data):
        entries = data[section] if section else data
        entry = entries[0 if section == 'categories' else 1]
        if value == 'dropped':
            entry.pop(field)
        else:
            entry[field] = value

    edit(root, name, change)
    error, report = judge(root)
    optional = value == 'dropped' and field in ('iscrowd', 'num_keypoints', 'skeleton')
    messages = [m for f in report.errors + report.warnings for m in f['messages']]
    assert optional or any(field in m for m in messages) or field == 'file_name' and 'images/val/' in messages[0], messages
    assert error is None or field in error or field == 'file_name' and 'images/val/' in error, error


# ---------------------------------------------------------------------------------------- a wrong file

def text(content):
    return lambda file: file.write_bytes(content if isinstance(content, bytes) else content.encode())


def rewrite(change):
    return lambda file: file.write_bytes(change(file.read_bytes()))


def replace(make):
    def breaker(file):
        file.unlink()
        make(file)
    return breaker


def cut(seed):
    return rewrite(lambda b: b[:random.Random(seed).randrange(len(b))])


def changed(change):
    return lambda file: edit(file.parent.parent, f'{file.parent.name}/{file.name}', change)


def encoded(encoding):
    return rewrite(lambda b: b.decode().encode(encoding))


BROKEN_JSON = {
    'missing': lambda f: f.unlink(), 'folder': replace(Path.mkdir), 'pipe': replace(os.mkfifo), 'zero bytes': text(''),
    'link loop': replace(lambda f: f.symlink_to(f)), 'dangling link': replace(lambda f: f.symlink_to('nowhere')),
    'endless device': replace(lambda f: f.symlink_to('/dev/zero')), 'null': text('null'), 'number': text('7'), 'text': text('"x"'), 'nan': text('NaN'),
    'wrong container': rewrite(lambda b: b'{}' if b[:1] == b'[' else b'[]'), 'container of containers': text('[[], [], {}]'),
    'deep': text('[' * 10**5), 'deep and closed': text('[' * 10**5 + ']' * 10**5), 'deep objects': text('{"a":' * 10**5),
    'long number': text('1' * 5000), 'latin 1': text('["é"]'.encode('latin-1')), 'binary': text(bytes(range(256))), 'null bytes': text(bytes(100)),
    'a zip': text(b'PK\3\4' + bytes(100)), 'html': text('<html>404</html>'), 'two documents': rewrite(lambda b: b + b), 'single quotes': text("{'a': 1}"),
    'byte order mark': encoded('utf-8-sig'), 'utf-16': encoded('utf-16'), 'utf-16 big': encoded('utf-16-be'), 'utf-32': encoded('utf-32'),
    **{f'cut {seed}': cut(seed) for seed in range(6)}}
BROKEN_ANNOTATIONS = {
    **{f'{key} {value!r}': changed(lambda d, key=key, value=value: d.update({key: value}))
       for key in ('images', 'annotations', 'categories') for value in (None, {}, [], [7], [[]], ['x'], 'text', [{}], [None])},
    'image id twice': changed(lambda d: d['images'].append(dict(d['images'][0], file_name='x.jpg'))),
    'image twice': changed(lambda d: d['images'].append(dict(d['images'][0], id=9))),
    'annotation twice': changed(lambda d: d['annotations'].append(d['annotations'][0])),
    'category twice': changed(lambda d: d['categories'].append(d['categories'][0])),
    'dangling': changed(lambda d: d['images'].pop()),
    'five names': changed(lambda d: d['categories'][0].update(keypoints=list('abcde'))),
    'five names with tolerances': changed(lambda d: d['categories'][0].update(keypoints=list('abcde'), sigmas=[.1] * 5)),
    'four tolerances': changed(lambda d: d['categories'][0].update(keypoints=list('abcde'), sigmas=[.1] * 4)),
    'nobody labelled': changed(lambda d: [a.update(keypoints=[0] * 51) for a in d['annotations']]),
    'only crowds': changed(lambda d: [a.update(iscrowd=1) for a in d['annotations']]),
    'no tolerances and other faults': changed(lambda d: [
        d['categories'][0].update(keypoints=[f'p{k}' for k in range(17)]), d['images'][1].update(file_name='gone.jpg'), d['annotations'][1].update(bbox=[1, 2, 3])]),
    'more names than keypoints': changed(lambda d: d['categories'][0].update(keypoints=[f'p{k}' for k in range(21)], sigmas=[.1] * 21)),
    'fewer names than keypoints': changed(lambda d: d['categories'][0].update(keypoints=['a', 'b'], sigmas=[.1] * 2)),
    'nulls at the end': changed(lambda d: [a['keypoints'].__setitem__(slice(48, 51), [None, None, 0]) for a in d['annotations']]),
    'empty list of names': changed(lambda d: d['categories'][0].update(keypoints=[])),
    'names that are none': changed(lambda d: d['categories'][0].update(keypoints=['a', None, 'c'])),
    'another category': changed(lambda d: [d['categories'][0].update(id=7), *(a.update(category_id=7) for a in d['annotations'])]),
    'category 0': changed(lambda d: [d['categories'][0].update(id=0), *(a.update(category_id=0) for a in d['annotations'])]),
    'a category of text': changed(lambda d: d['categories'][0].update(id='person')),
    'no categories': changed(lambda d: d.update(categories=[])),
    'several categories': changed(lambda d: [d['categories'].insert(0, dict(id=3, name='horse', keypoints=['tail'])), d['annotations'].insert(
        0, dict(id=99999, image_id=d['images'][0]['id'], category_id=3, bbox=[1, 2, 30, 40], keypoints=[1, 2, 2]))]),
    'a category without poses': changed(lambda d: d['annotations'].insert(0, dict(id=99999, image_id=d['images'][0]['id'], category_id=3))),
    'sides in no pair': changed(lambda d: d['categories'][0].update(keypoints=[*d['categories'][0]['keypoints'][:16], 'the right ankle'], sigmas=[.1] * 17)),
    'sides in wrong pairs': changed(lambda d: d['categories'][0].update(flip_pairs=[[1, 2], [3, 4]])),
    'no sides': changed(lambda d: d['categories'][0].update(keypoints=[f'p{k}' for k in range(17)], sigmas=[.1] * 17)),
    'skeleton from 0': changed(lambda d: d['categories'][0].update(skeleton=[[a - 1, b - 1] for a, b in d['categories'][0]['skeleton']])),
    'skeleton beyond': changed(lambda d: d['categories'][0]['skeleton'].append([17, 23])),
    'tolerances with text': changed(lambda d: d['categories'][0].update(sigmas=[.1] * 16 + ['.1'])),
    'area dropped': changed(lambda d: [a.pop('area') for a in d['annotations']]), 'area null': changed(lambda d: [a.update(area=None) for a in d['annotations']]),
    'crowd flags true and false': changed(lambda d: [a.update(iscrowd=i == 1) for i, a in enumerate(d['annotations'])]),
    'ids with a point': changed(lambda d: [*(a.update(id=float(a['id']), image_id=float(a['image_id'])) for a in d['annotations']), *(i.update(id=float(i['id'])) for i in d['images'])]),
    'ids from 0': changed(lambda d: [a.update(id=i) for i, a in enumerate(d['annotations'])]),
    'num_keypoints 0': changed(lambda d: [a.update(num_keypoints=0) for a in d['annotations']]),
    'areas of boxes': changed(lambda d: [a.update(area=a['bbox'][2] * a['bbox'][3]) for a in d['annotations']]),
    'areas of 1': changed(lambda d: [a.update(area=1) for a in d['annotations']]),
    'no area': changed(lambda d: [a.update(area=0) for a in d['annotations']]),
    'ids equal as floats': changed(lambda d: [
        *(a.update(image_id=2**63 - 1) for a in d['annotations'] if a['image_id'] == d['images'][0]['id']), d['images'][0].update(id=2**63)])}
BROKEN_DETECTIONS = {
    'empty': text('[]'), 'nobody': changed(lambda d: [x.update(category_id=2) for x in d]),
    'none': changed(lambda d: d.append(None)), 'ids with a point': changed(lambda d: [x.update(image_id=float(x['image_id']), category_id=1.) for x in d]),
    'score null': changed(lambda d: d[0].update(score=None)), 'score of text': changed(lambda d: d[0].update(score='.5')), 'score a list': changed(lambda d: d[0].update(score=[.5])), 'results of another set': changed(lambda d: [x.update(image_id=5) for x in d]),
    'corners': changed(lambda d: [x.update(bbox=[x['bbox'][0], x['bbox'][1], 9000, 9000]) for x in d])}


@pytest.mark.parametrize('name,case', [
    *((ANNOTATIONS, c) for c in BROKEN_JSON | BROKEN_ANNOTATIONS), *((DETECTIONS, c) for c in BROKEN_JSON | BROKEN_DETECTIONS)])
def test_wrong_file(root, name, case):
    cases = BROKEN_JSON | (BROKEN_ANNOTATIONS if name == ANNOTATIONS else BROKEN_DETECTIONS)
    cases[case](root / name)
    error, report = judge(root)
    messages = [m for f in report.errors + report.warnings for m in f['messages']]
    assert any(Path(name).name in m for m in messages)
    assert error is None or Path(name).name in error


# ---------------------------------------------------------------------------------------- a wrong image

def saved(format, change=lambda image: image, **options):
    """The image in another format, in a file of the old name."""
    def breaker(file):
        stream = io.BytesIO()
        change(Image.open(file)).save(stream, format=format, **options)
        file.write_bytes(stream.getvalue())
    return breaker


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def deep_png(file):
    image = cv2.imread(str(file)).astype(np.uint16) * 257
    file.write_bytes(cv2.imencode('.png', image)[1].tobytes())


def giant(size):
    """The size in a JPEG's header becomes (size, size)."""
    def change(b):
        at = b.index(b'\xff\xc0') + 5
        return b[:at] + size.to_bytes(2, 'big') * 2 + b[at + 4:]
    return rewrite(change)


def hole(fill):
    """A sixth of a file, from its middle on, is missing or something else."""
    return rewrite(lambda b: b[:len(b) // 2] + fill * (len(b) // 6) + b[len(b) // 2 + len(b) // 6:])


EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n'
BROKEN_IMAGES = {
    'missing': lambda f: f.unlink(), 'folder': replace(Path.mkdir), 'pipe': replace(os.mkfifo), 'link loop': replace(lambda f: f.symlink_to(f)),
    'dangling link': replace(lambda f: f.symlink_to('nowhere.jpg')), 'endless device': replace(lambda f: f.symlink_to('/dev/zero')),
    'zero bytes': text(''), 'one byte': text('x'), 'text': text('404 not found'), 'null bytes': text(bytes(1000)), 'EPS': text(EPS),
    'SVG': text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'), 'only markers': text(b'\xff\xd8\xff\xd9'),
    'garbage between markers': rewrite(lambda b: b'\xff\xd8' + random.Random(1).randbytes(999) + b'\xff\xd9'),
    'header only': rewrite(lambda b: b[:300] + b'\xff\xd9'), 'no size': giant(0), 'giant': giant(65500), 'turned size': saved('JPEG', lambda i: i.rotate(90, expand=True)),
    '1x1': saved('JPEG', lambda i: i.resize((1, 1))), 'smaller': saved('JPEG', lambda i: i.resize((i.width - 1, i.height))),
    'PNG': saved('PNG'), 'BMP': saved('BMP'), 'WebP': saved('WEBP'), 'TIFF': saved('TIFF'), 'GIF': saved('GIF'), 'PNG cut': lambda f: [saved('PNG')(f), cut(3)(f)],
    'CMYK': saved('JPEG', lambda i: i.convert('CMYK')), 'transparent PNG': saved('PNG', lambda i: i.convert('RGBA')), '16 bits': deep_png,
    **{f'orientation {o}': saved('JPEG', exif=exif(o)) for o in (3, 6, 8, 9)},
    **{f'{what}, {kind} JPEG': lambda f, fill=fill, options=options: [saved('JPEG', **options)(f), hole(fill)(f)]
       for what, fill in (('hole', b''), ('zeros', b'\0'), ('ones', b'\xff')) for kind, options in (('plain', {}), ('progressive', dict(progressive=True)))},
    'turned by its tag': saved('JPEG', lambda i: i.rotate(90, expand=True), exif=exif(6)), **{f'cut {seed}': cut(seed) for seed in range(8)}}


@pytest.mark.parametrize('case', BROKEN_IMAGES)
def test_wrong_image(root, case):
    image = sorted((root / 'images/val').iterdir())[1]
    BROKEN_IMAGES[case](image)
    error, report = judge(root)
    messages = [m for f in report.errors + report.warnings for m in f['messages']]
    assert any(m.startswith(f'{image}: image') for m in messages)
    assert error is None or error.startswith(f'{image}: image')


# ---------------------------------------------------------------------------------------- an archive

def pack(root):
    """The folder of images becomes an archive."""
    shutil.make_archive(root / 'images/val', 'zip', root / 'images', 'val')
    shutil.rmtree(root / 'images/val')
    return root / 'images/val.zip'


def add_entries(archive, entries):
    with zipfile.ZipFile(archive, 'a') as file:
        for name, data in entries.items():
            file.writestr(name, data)


def test_an_archive_is_as_good_as_the_folder(root):
    counts = check(root, ['val'], detections=DETECTIONS).counts
    archive = pack(root)
    error, report = judge(root)
    assert (error, report.errors, report.warnings, report.counts) == (None, [], [], counts)
    archive.rename(root.parent / 'elsewhere.zip')
    archive.symlink_to(root.parent / 'elsewhere.zip')
    assert judge(root)[1].counts['val']['links out of the data folder'] == 3


@pytest.mark.parametrize('case', [c for c in BROKEN_IMAGES if not re.search('folder|pipe|link|device', c)])
def test_wrong_image_in_an_archive(root, case):
    """Whatever is said of an image in a folder is said of it in an archive."""
    image = sorted((root / 'images/val').iterdir())[1]
    BROKEN_IMAGES[case](image)
    error, report = judge(root)
    pack(root)
    packed_error, packed = judge(root)
    moved = lambda found: json.loads(json.dumps(found).replace(f'{root}/images/val/', f'{root}/images/val.zip/val/'))
    assert (moved(error), moved(report.errors), moved(report.warnings)) == (packed_error, packed.errors, packed.warnings)


@pytest.mark.parametrize('case', ARCHIVES)
def test_wrong_archive(root, case):
    archive = pack(root)
    breaker, message = ARCHIVES[case]
    breaker(archive)
    error, report = judge(root)
    assert message in error and message in report.errors[0]['messages'][0]


@pytest.mark.parametrize('inside', ['', 'images/val/', 'some/other/'])
def test_another_folder_inside_an_archive(root, inside):
    counts = check(root, ['val'], detections=DETECTIONS).counts['val']
    archive = pack(root)
    with zipfile.ZipFile(archive) as old:
        entries = {info.filename.removeprefix('val/'): old.read(info) for info in old.infolist() if not info.is_dir()}
    archive.unlink()
    add_entries(archive, {inside + name: data for name, data in entries.items()})
    error, report = judge(root)
    where = f'in {inside}' if inside else 'in no folder'
    assert (error, report.errors, report.warnings, report.counts['val']) == (None, [], [], counts | {'images inside the archive': where})


def test_all_entries_of_an_archive_are_looked_at(root):
    image, other, _ = sorted((root / 'images/val').iterdir())
    data, name = image.read_bytes(), other.name
    archive = pack(root)
    add_entries(archive, {'val/more.jpg': data, 'val/notes.txt': b'', '__MACOSX/val/._a.jpg': b'', 'val/sub/': b''})
    with pytest.warns(UserWarning, match='Duplicate name'):
        add_entries(archive, {f'val/{name}': data})
    report = judge(root)[1]
    assert {f['kind']: f['messages'] for f in report.warnings} == {
        'entry twice': [f"{archive}: entry '{name}' is there 2 times; the last is read"],
        'same image twice': [f'{archive}/val/{name}: image has the same bytes as images/val.zip/val/{image.name}']}
    assert report.counts['val']['image files not in annotations'] == 2


# ---------------------------------------------------------------------------------------- damage by chance

@pytest.mark.parametrize('seed', range(60))
def test_damaged_bytes(root, seed):
    """Some bytes of a file change. What is still well-formed may pass, but nothing crashes, and reader and checker agree."""
    rng = random.Random(seed)
    file = rng.choice([root / ANNOTATIONS, root / DETECTIONS, *sorted((root / 'images/val').iterdir())])
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content))
    for _ in range(rng.choice((1, 3, 20))):
        content[min(start + rng.randrange(200), len(content) - 1)] = rng.choice((rng.randrange(256), ord(rng.choice('0123456789[]{},"-e.'))))
    file.write_bytes(content)
    judge(root)


@pytest.mark.parametrize('seed', range(40))
def test_several_faults_at_once(root, seed):
    """In categories, annotations, boxes and images: nothing crashes, and reader and checker agree."""
    rng = random.Random(seed)
    for name, cases in ((ANNOTATIONS, BROKEN_ANNOTATIONS), (DETECTIONS, BROKEN_DETECTIONS)):
        for case in rng.sample(sorted(cases), 3 if name == ANNOTATIONS else 1):
            try:
                cases[case](root / name)
            except (KeyError, IndexError, TypeError, AttributeError):
                pass  # what it changes is broken already
    for image in rng.sample(sorted((root / 'images/val').iterdir()), rng.choice((0, 1))):
        BROKEN_IMAGES[rng.choice(sorted(BROKEN_IMAGES))](image)
    judge(root)


# ---------------------------------------------------------------------------------------- decisions

def test_stored_pixels_count_not_the_orientation_tag(root):
    """Keypoints refer to the stored pixels, in COCO and here; `cv2.imread` alone would turn the image."""
    persons = CocoPersons(root, 'val', input_size=(96, 128))
    before, file = persons.read_image(0), persons.image_file(0)
    saved('PNG')(file)
    plain = persons.read_image(0)
    saved('PNG', exif=exif(6))(file)
    assert np.array_equal(plain, before) and np.array_equal(persons.read_image(0), before)
    assert cv2.imread(str(file)).shape[:2] == before.shape[1::-1]


@pytest.mark.parametrize('what', ['image', 'folder'])
def test_links_out_of_the_folder_are_followed_and_counted(root, tmp_path, what):
    """DVC and shared disks store data as links; a *name* cannot leave the folder."""
    link = root / 'images/val' if what == 'folder' else sorted((root / 'images/val').iterdir())[0]
    link.rename(tmp_path / 'elsewhere')
    link.symlink_to(tmp_path / 'elsewhere')
    error, report = judge(root)
    assert error is None and report.warnings == []
    assert report.counts['val']['links out of the data folder'] == (3 if what == 'folder' else 1)


def test_unlisted_images_are_counted(root):
    shutil.copy(next((root / 'images/val').iterdir()), root / 'images/val/more.jpg')
    assert judge(root)[1].counts['val']['image files not in annotations'] == 1


def test_same_bytes_and_ids(root):
    """Within a split and between two."""
    first, second, _ = sorted((root / 'images/val').iterdir())
    shutil.copytree(root / 'images/val', root / 'images/train')
    shutil.copy(root / ANNOTATIONS, root / 'annotations/person_keypoints_train.json')
    report = check(root)
    assert report.errors == [] and list(report.counts) == ['train', 'val']
    assert {f['kind']: f['count'] for f in report.warnings} == {'same image in both': 3, 'same image id in both': 3}
    shutil.copy(first, root / 'images/val/copy.jpg')
    edit(root, ANNOTATIONS, lambda d: d['images'].append(dict(d['images'][0], id=1, file_name='copy.jpg')))
    warnings = {f['kind']: f['messages'] for f in judge(root)[1].warnings}
    assert warnings == {'same image twice': [f'{root}/images/val/copy.jpg: image has the same bytes as images/val/{first.name}']}


def test_same_bytes_in_a_folder_and_an_archive(root):
    shutil.copytree(root / 'images/val', root / 'images/train')
    shutil.copy(root / ANNOTATIONS, root / 'annotations/person_keypoints_train.json')
    archive, name = pack(root), min(f.name for f in (root / 'images/train').iterdir())
    report = check(root)
    assert report.errors == [] and {f['kind']: f['count'] for f in report.warnings} == {'same image in both': 3, 'same image id in both': 3}
    assert f'{archive}/val/{name}: image has the same bytes as images/train/{name}' in str(report)


def test_a_test_set_has_images_only(root):
    """COCO's test-dev2017: a list of images, which are some of test2017; a detector finds persons in them."""
    (root / ANNOTATIONS).rename(root / 'annotations/image_info_test-dev2017.json')
    edit(root, 'annotations/image_info_test-dev2017.json', lambda d: d.pop('annotations'))
    (root / 'images/val').rename(root / 'images/test2017')
    for detections in (None, DETECTIONS):
        report = check(root, ['test-dev2017'], detections=detections)
        assert (report.errors, report.warnings, report.counts['test-dev2017']['images']) == ([], [], 3)
    boxes = {d['image_id'] for d in json.loads((root / DETECTIONS).read_text())}
    assert report.counts['test-dev2017']['images with detector boxes'] == f'{len(boxes)} of 3 ({len(boxes) / 3:.1%})'
    next((root / 'images/test2017').iterdir()).unlink()
    assert [f['kind'] for f in check(root, ['test-dev2017']).errors] == ['image missing']
    assert CocoPersons(root, 'test-dev2017', input_size=(96, 128), boxes=DETECTIONS, check_images=False).image_file(0).parent.name == 'test2017'


@pytest.mark.parametrize('names', [['nose', 'left_wrist', 'right_wrist', 'left_ankle', 'right_ankle']])
def test_other_keypoints_are_those_of_the_file(root, names):
    edit(root, ANNOTATIONS, lambda data: keep_keypoints(data, names, sigmas=[.05] * 5))
    error, report = judge(root)
    assert (error, report.errors, report.warnings) == (None, [], [])
    assert [row['keypoint'] for row in report.counts['val']['keypoints']] == names
    assert [row['pair'] for row in report.counts['val']['left and right']] == ['left_wrist – right_wrist', 'left_ankle – right_ankle']


def test_an_odd_image_without_persons_is_a_warning(root):
    (root / 'images/val/empty.jpg').write_bytes(b'')
    edit(root, ANNOTATIONS, lambda d: d['images'].append(dict(d['images'][0], id=1, file_name='empty.jpg')))
    error, report = judge(root)
    assert error is None and [f['kind'] for f in report.warnings] == ['image unreadable']


@pytest.mark.parametrize('broken', [False, True])
def test_output_is_whole(root, tmp_path, broken, monkeypatch):
    if broken:
        next((root / 'images/val').iterdir()).write_bytes(b'')
    edit(root, ANNOTATIONS, lambda d: d['annotations'][0].update(keypoints=[9e9, 9e9, 2] * 17))
    report = check(root, out=tmp_path / 'out')
    assert bool(report.errors) == broken
    files = {f.name: f.read_bytes() for f in (tmp_path / 'out').iterdir()}
    assert set(files) == {'report.txt', 'report.json', 'crops-val.png'}
    assert json.loads(files['report.json'])['errors'] == report.errors and files['report.txt'].decode() == str(report)
    monkeypatch.setattr(os, 'replace', lambda *_: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(DataError, match='out: cannot be written .No space left'):
        check(root, out=tmp_path / 'out')
    assert {f.name: f.read_bytes() for f in (tmp_path / 'out').iterdir()} == files  # the old ones, and nothing else


@pytest.mark.parametrize('change', [
    lambda d: d['categories'][0].update(keypoints=[f'p{k}' for k in range(17)]), lambda d: d['categories'][0].update(keypoints=[]),
    lambda d: [d['categories'][0].update(id=7), *(a.update(category_id=7) for a in d['annotations'])],
    lambda d: [d['categories'].append(dict(id=2, name='horse')), *(a.update(category_id=2) for a in d['annotations'][-2:])]],
    ids=['no tolerances', 'no names', 'another category', 'two categories'])
def test_one_fault_does_not_hide_others(root, change):
    """Whatever is wrong with the category: persons, images and boxes are looked at as well."""
    def faults(d):
        d['annotations'][1].update(bbox=[1, 2, 3])
        d['annotations'][2].update(bbox=[900, 900, 5, 5])
        d['annotations'][3]['keypoints'][2] = 5
    edit(root, ANNOTATIONS, faults)
    sorted((root / 'images/val').iterdir())[1].unlink()
    edit(root, DETECTIONS, lambda d: d[0].update(score=3))
    expected = {f['kind'] for f in check(root, ['val'], detections=DETECTIONS).errors + check(root, ['val'], detections=DETECTIONS).warnings}
    assert expected >= {'annotations.bbox', 'image missing', 'box outside the image', 'visibility flag', 'detections.score'}
    edit(root, ANNOTATIONS, change)
    report = check(root, ['val'], detections=DETECTIONS)
    assert {f['kind'] for f in report.errors + report.warnings} >= expected
    assert report.counts['val']['persons to train on'] > 0


def test_what_a_file_does_not_say_can_be_said(root):
    edit(root, ANNOTATIONS, lambda d: d['categories'][0].update(keypoints=[f'p{k}' for k in range(17)]))
    report = check(root, ['val'], sigmas=[.1], flip_pairs=[('p1', 'p2'), (4, 5)])
    assert report.errors == [] and report.counts['val']['flip pairs'] == 2
    assert 'p3 – p4' in str(report) and 'training and evaluation read them from this file' in str(report)
    assert 'sigmas: 2 numbers for 17 keypoints' in str(check(root, ['val'], sigmas=[.1, .2]))


def test_lists_are_capped(root):
    edit(root, ANNOTATIONS, lambda d: [a.update(bbox=[1, 2, 3]) for a in d['annotations']])
    report = judge(root)[1]
    found, = (f for f in report.errors if f['kind'] == 'annotations.bbox')
    assert len(found['messages']) == report.listed < found['count']
    assert f'and {found["count"] - report.listed} more' in str(report)


@pytest.mark.parametrize('value', VALUES, ids=lambda v: re.sub(r'\W+', '-', repr(v))[:24])
@pytest.mark.parametrize('field', ['bbox', 'score', 'category_id', 'image_id', 'file_name'])
def test_wrong_box_to_predict_in(tmp_path, field, value):
    """A box file either serves an image, or costs it, or is refused as a whole: always by name, and the other image has its box."""
    file, image = tmp_path / 'boxes.json', np.zeros((48, 64, 3), np.uint8)
    good = dict(image_id=1, category_id=1, bbox=[1, 2, 30, 40], score=0.9)
    file.write_text(json.dumps([good, good | dict(image_id=2) | {field: value}]))
    try:
        first, second = boxes_from_file(file, threshold=0.5)([Frame('1.jpg', image), Frame('2.jpg', image)])
    except DataError as error:
        assert str(error).startswith(f'{file}: ')
        return
    for found in (first, second):
        try:
            if isinstance(found, DataError): raise found
            boxes, scores = check_boxes(*found, (64, 48), 'image')
        except DataError as error:
            assert re.match(rf'{re.escape(str(file))}: \[1\]|image: boxes\[\d\] is', str(error)), error
        else:
            assert np.isfinite(boxes).all() and np.isfinite(scores).all()
    assert isinstance(first, tuple) or field in ('image_id', 'file_name')

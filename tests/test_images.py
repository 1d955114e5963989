"""Images out of folders, archives and the cache: always the same pixels, and one error for whatever is wrong."""
import errno
import json
import os
import pickle
import shutil
import zipfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from srl_pose.data import images as module
from srl_pose.data.coco import CocoPersons
from srl_pose.pose.crops import Augmentation, apply_matrix, crop_matrix
from srl_pose.files import DataError, project_root
from srl_pose.data.images import ArchiveImages, FolderImages, open_cache, open_images

SAMPLE, SIZE = project_root(Path(__file__).parent) / 'sample', (96, 128)
EVERYTHING = Augmentation(half_body_probability=0.5, dropout_probability=0.5)


@pytest.fixture
def some(tmp_path):
    """Six images of the sample in a folder of their own, their sizes, and a copy of the folder as an archive."""
    (tmp_path / 'images/val').mkdir(parents=True)
    files = sorted((SAMPLE / 'images/val').glob('*.jpg'))[:6]
    for file in files:
        shutil.copy(file, tmp_path / 'images/val')
    shutil.make_archive(tmp_path / 'packed/val', 'zip', tmp_path / 'images', 'val')
    images = FolderImages(tmp_path / 'images/val', np.array([file.name for file in files]))
    return images, np.array([images.read(i).shape[1::-1] for i in range(6)])


def samples(persons, epochs, workers):
    """All items of some epochs."""
    loader = DataLoader(persons, batch_size=7, num_workers=workers, persistent_workers=workers > 0)
    return [batch for epoch in epochs if not persons.set_epoch(epoch) for batch in loader]


@pytest.mark.parametrize('size', [(192, 256), (288, 384), (384, 512)])
def test_real_crops_are_the_same_from_everywhere(external, tmp_path, size):
    """Folder, archive, empty and filled cache to the bit; and the plain warp of the whole image but for rounding."""
    source = external / 'data/coco-mini'
    (tmp_path / 'data/images').mkdir(parents=True)
    shutil.copytree(source / 'annotations', tmp_path / 'data/annotations')
    shutil.make_archive(tmp_path / 'data/images/train2017', 'zip', source / 'images', 'train2017')
    options = dict(input_size=size, augmentation=Augmentation(), seed=1)
    plain = CocoPersons(source, 'train2017', **options)
    packed = CocoPersons(tmp_path / 'data', 'train2017', **options)
    cached = CocoPersons(source, 'train2017', **options, image_cache=tmp_path / 'cache')
    for persons in (plain, packed, cached):
        persons.set_epoch(3)
    for i in range(len(plain)):
        items = [persons[i] for persons in (plain, packed, cached, cached)]
        assert all(torch.equal(item[name], items[0][name]) for item in items for name in item)
        center, scale, angle, flip = plain.view(i)
        image = plain.read_image(i)
        if flip:
            image, center = image[:, ::-1], [image.shape[1] - 1 - center[0], center[1]]
        matrix = crop_matrix(np.array(center), scale, size, angle)
        whole = cv2.warpAffine(np.ascontiguousarray(image), matrix, size, flags=cv2.INTER_LINEAR)
        difference = np.abs(whole[..., ::-1].transpose(2, 0, 1).astype(int) - items[0]['image'].numpy())
        assert difference.mean() < 0.1 if flip else difference.max() <= 1 and difference.mean() < 1e-3


def test_workers_fill_one_cache_and_see_the_same(tmp_path):
    options = dict(input_size=SIZE, augmentation=EVERYTHING, seed=5)
    expected = samples(CocoPersons(SAMPLE, 'val', **options), (0, 1), 0)
    for workers in (2, 1, 0, 2):  # the first pass fills the cache, the others find it
        found = samples(CocoPersons(SAMPLE, 'val', **options, image_cache=tmp_path), (0, 1), workers)
        assert len(found) == len(expected)
        assert all(torch.equal(a[name], b[name]) for a, b in zip(found, expected) for name in a)
    assert len(list(tmp_path.iterdir())) == 1


def fill(cache, images):
    for _ in range(5):
        for i in range(len(images.names)):
            cache.write(i, images.stamp(i), images.read(i))
            if not np.array_equal(cache.read(i, images.stamp(i), 0, len(images.read(i))), images.read(i)):
                return False
    return True


def test_processes_may_write_the_same_image(some, tmp_path):
    images, sizes = some
    cache = open_cache(tmp_path / 'cache', images, sizes, 1)
    with ProcessPoolExecutor(3, get_context('fork')) as pool:
        assert all(job.result() for job in [pool.submit(fill, cache, images) for _ in range(3)])
    assert fill(pickle.loads(pickle.dumps(cache)), images)


def test_an_image_that_changed_is_decoded_again(some, tmp_path):
    images, sizes = some
    cache = open_cache(tmp_path / 'cache', images, sizes, 1)
    before, old = images.read(0), images.stamp(0)
    cache.write(0, old, before)
    cv2.imwrite(str(images.file(0)), 255 - before)
    assert images.stamp(0) != old and cache.read(0, images.stamp(0), 0, 9) is None
    cache.write(0, images.stamp(0), images.read(0))
    assert np.array_equal(cache.read(0, images.stamp(0), 0, 9), images.read(0)[:9])
    assert cache.read(0, old, 0, 9) is None


def test_a_writer_that_dies_leaves_nothing_to_be_read(some, tmp_path, monkeypatch):
    images, sizes = some
    cache = open_cache(tmp_path / 'cache', images, sizes, 1)
    cache.write(1, images.stamp(1), images.read(1))
    cv2.imwrite(str(images.file(1)), 255 - images.read(1))

    def die(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, 'fdatasync', die)
    for i in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            cache.write(i, images.stamp(i), images.read(i))
        assert os.pread(cache._handle(), 8, 8 * i) == bytes(8)
        assert cache.read(i, images.stamp(i), 0, 9) is None
    monkeypatch.undo()
    assert fill(cache, images)


def test_without_room_images_are_decoded_as_before(some, tmp_path, monkeypatch, caplog):
    images, sizes = some
    assert open_cache(tmp_path / 'cache', images, sizes, 1e-4) is None
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    assert open_cache(tmp_path / 'cache', images, sizes, 1) is None
    monkeypatch.undo()
    (tmp_path / 'file').touch()
    assert open_cache(tmp_path / 'file', images, sizes, 1) is None
    reasons = 'the limit is 0.0001 GB', '0.0 GB are free', 'File exists'
    assert len(caplog.records) == 3 and all(r in m for r, m in zip(reasons, caplog.messages))
    assert not (tmp_path / 'cache').exists() or not list((tmp_path / 'cache').iterdir())


def test_a_disk_that_is_full_later_is_said_once(some, tmp_path, monkeypatch, caplog):
    images, sizes = some
    cache = open_cache(tmp_path / 'cache', images, sizes, 1)
    cache.write(0, images.stamp(0), images.read(0))

    def full(fd, data, offset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, 'pwrite', full)
    for i in range(1, 6):
        cache.write(i, images.stamp(i), images.read(i))
        assert cache.read(i, images.stamp(i), 0, 9) is None
    assert [m.split(': ')[1] for m in caplog.messages] == ['no more decoded images are kept (No space left on device)']
    assert np.array_equal(cache.read(0, images.stamp(0), 0, 9), images.read(0)[:9])


def test_a_cache_that_is_deleted_is_no_loss(some, tmp_path, caplog):
    images, sizes = some
    cache = open_cache(tmp_path / 'cache', images, sizes, 1)
    cache.write(0, images.stamp(0), images.read(0))
    cache.path.unlink()
    assert fill(pickle.loads(pickle.dumps(cache)), images)  # another process makes a new file
    shutil.rmtree(tmp_path / 'cache')
    there_is_none = pickle.loads(pickle.dumps(cache))
    assert there_is_none.read(0, images.stamp(0), 0, 9) is None
    for i in (0, 1):
        there_is_none.write(i, images.stamp(i), images.read(i))
    assert len(caplog.messages) == 1 and 'no more decoded images are kept (No such file or directory)' in caplog.messages[0]


# ---------------------------------------------------------------------------------------- archives

def repack(edit, **options):
    """A breaker that writes the archive anew from its edited entries."""
    def breaker(file):
        with zipfile.ZipFile(file) as archive:
            entries = {info.filename: archive.read(info) for info in archive.infolist()}
        edit(entries)
        with zipfile.ZipFile(file, 'w', **options) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
    return breaker


def flag(file):
    """Mark the entries of the directory as encrypted."""
    data = file.read_bytes()
    for n in range(data.count(b'PK\1\2')):
        at = [i for i in range(len(data)) if data.startswith(b'PK\1\2', i)][n]
        data = data[:at + 8] + bytes([data[at + 8] | 1]) + data[at + 9:]
    file.write_bytes(data)


def damage(file):
    data = bytearray(file.read_bytes())
    data[3000] ^= 255  # in the first entry
    file.write_bytes(data)


first = lambda entries: sorted(name for name in entries if name.endswith('.jpg'))[0]
ARCHIVES = {
    'empty file': (lambda f: f.write_bytes(b''), 'is not a readable zip archive'),
    'text': (lambda f: f.write_text('404 not found'), 'is not a readable zip archive'),
    'cut': (lambda f: f.write_bytes(f.read_bytes()[:-500]), 'is not a readable zip archive'),
    'beginning lost': (lambda f: f.write_bytes(f.read_bytes()[9000:]), 'image cannot be read'),
    'entry missing': (repack(lambda e: e.pop(first(e))), 'image is missing'),
    'two other folders': (repack(lambda e: [e.update({f'{x}/{n}': e[n] for x in 'xy'}) or e.pop(n) for n in list(e)]), 'image is missing'),
    'entry above': (repack(lambda e: e.update({'../' + first(e): e.pop(first(e))})), 'image is missing'),
    'entry a folder': (repack(lambda e: e.update({first(e) + '/': b'', 'x': e.pop(first(e))})), 'image is missing'),
    'entry empty': (repack(lambda e: e.update({first(e): b''})), 'image is empty'),
    'entry cut': (repack(lambda e: e.update({first(e): e[first(e)][:-300]})), 'image is truncated'),
    'entry of text': (repack(lambda e: e.update({first(e): b'404 not found'})), 'image is truncated or unreadable'),
    'damaged': (damage, 'image cannot be read'),
    'encrypted': (flag, 'is encrypted or packed by an unknown method'),
    'bzip2': (repack(lambda e: None, compression=zipfile.ZIP_BZIP2), 'is encrypted or packed by an unknown method'),
}


@pytest.mark.parametrize('case', ARCHIVES)
def test_bad_archives(some, tmp_path, case):
    images, _ = some
    archive = tmp_path / 'packed/val.zip'
    ArchiveImages(archive, images.names).check()
    breaker, message = ARCHIVES[case]
    breaker(archive)
    with pytest.raises(DataError) as caught:
        ArchiveImages(archive, images.names).check()
    text = str(caught.value)
    assert text.startswith(str(archive)) and message in text and len(text.splitlines()) == 1
    assert case in ('empty file', 'text', 'cut') or '.jpg' in text
    assert [p.name for p in archive.parent.iterdir()] == ['val.zip']  # nothing unpacked


@pytest.mark.parametrize('move', [lambda n: n.removeprefix('val/'), lambda n: f'images/{n}', lambda n: f'data set/x/{n[4:]}'], ids=['flat', 'images before', 'elsewhere'])
def test_another_folder_inside_an_archive(some, tmp_path, move):
    images, _ = some
    archive = tmp_path / 'packed/val.zip'
    repack(lambda e: [e.update({move(n): e.pop(n), '__MACOSX/._a.jpg': b'x'}) for n in list(e) if not n.endswith('/')])(archive)
    packed = ArchiveImages(archive, images.names)
    packed.check()
    assert all(np.array_equal(packed.read(i), images.read(i)) for i in range(6))
    assert set(images.names) <= set(packed.listed())
    assert str(packed.file(0)) == f'{archive}/{move(f"val/{images.names[0]}")}'
    assert np.array_equal(pickle.loads(pickle.dumps(packed)).read(5), images.read(5))


def test_a_folder_inside_a_folder(some, tmp_path):
    """As `unzip val.zip` in a folder `val` leaves it."""
    images, _ = some
    (tmp_path / 'images/val').rename(tmp_path / 'val')
    (tmp_path / 'images/val').mkdir()
    (tmp_path / 'val').rename(tmp_path / 'images/val/val')
    open_images(tmp_path / 'images/val', images.names).check()
    shutil.copy(tmp_path / 'images/val/val' / images.names[0], tmp_path / 'images/val')
    with pytest.raises(DataError, match=f'images/val/{images.names[1]}: image is missing'):  # some are here, so this is the folder
        open_images(tmp_path / 'images/val', images.names).check()


def test_a_data_set_of_archives_trains_and_says_what_is_wrong(tmp_path):
    shutil.copytree(SAMPLE / 'annotations', tmp_path / 'annotations')
    with pytest.raises(DataError, match='images/val: no such image folder, and no val.zip beside it'):
        CocoPersons(tmp_path, 'val', input_size=SIZE)
    shutil.make_archive(tmp_path / 'images/val', 'zip', SAMPLE / 'images', 'val')
    options = dict(input_size=SIZE, augmentation=EVERYTHING)
    found = samples(CocoPersons(tmp_path, 'val', **options), (0,), 2)
    for a, b in zip(found, samples(CocoPersons(SAMPLE, 'val', **options), (0,), 0)):
        assert torch.equal(a['image'], b['image'])
    persons = pickle.loads(pickle.dumps(CocoPersons(tmp_path, 'val', **options)))
    damage(tmp_path / 'images/val.zip')
    with pytest.raises(DataError, match=r'val\.zip/val/\d+\.jpg: image cannot be read'):
        samples(persons, (0,), 0)


# ---------------------------------------------------------------------------------------- what a crop samples

def test_dots_are_found_in_half_bodies(tmp_path):
    """Keypoints follow the image when only a half is looked at, with UDP's warp, too; and labels stay as they were."""
    for unbiased in (False, True):
        plain, half = (CocoPersons(SAMPLE, 'val', input_size=SIZE, unbiased=unbiased, augmentation=Augmentation(
            scale=0, rotation=0, flip_probability=0, half_body_probability=p)) for p in (0, 1))
        many = np.flatnonzero((half.visible > 0).sum(1) > 8)
        assert len(many) > 20
        zoomed = 0
        for i in many[:20].tolist():
            center, scale, _, _ = half.view(i)
            matrix = crop_matrix(center, scale, SIZE, unbiased=unbiased)
            seen = half.visible[i] > 0
            assert np.allclose(half[i]['keypoints'].numpy()[seen], apply_matrix(matrix, half.keypoints[i])[seen], atol=1e-3)
            assert torch.equal(half[i]['visible'], plain[i]['visible'])
            zoomed += scale[0] < plain.scale[i, 0]
        assert zoomed > 10
    few = int(np.flatnonzero((half.visible > 0).sum(1) <= 8)[0])
    assert torch.equal(half[few]['image'], plain[few]['image'])


def test_options_that_are_off_change_nothing():
    off, on = (CocoPersons(SAMPLE, 'val', input_size=SIZE, augmentation=Augmentation(dropout_probability=p), seed=2)
               for p in (0, 0.5))
    holes = 0
    for i in range(30):
        a, b = off[i], on[i]
        assert torch.equal(a['keypoints'], b['keypoints']) and torch.equal(a['visible'], b['visible'])
        differs = (a['image'] != b['image']).any(0)
        assert not b['image'][:, differs].any()
        holes += bool(differs.any())
    assert 5 < holes < 25


def test_half_bodies_need_names_of_both_halves(tmp_path):
    shutil.copytree(SAMPLE / 'annotations', tmp_path / 'annotations')
    file = tmp_path / 'annotations/person_keypoints_val.json'
    data = json.loads(file.read_text())
    data['categories'][0].update(keypoints=[f'p{k}' for k in range(17)], sigmas=[.1] * 17)
    file.write_text(json.dumps(data))
    with pytest.raises(DataError, match='half_body_probability needs keypoints of both halves'):
        CocoPersons(tmp_path, 'val', input_size=SIZE, augmentation=EVERYTHING, check_images=False)

"""COCO's own evaluation of predictions that are the truth, by how the annotation file numbers and counts. As CSV; status 1 where AP is not what was expected."""
import contextlib
import importlib
import io
import sys
from importlib.metadata import version

PERSONS, SIDE = 4, 100
ONE_LOST = 3 / 4 * 76 / 101  # precision 3/4 at recalls of 0 to .75: the best scored person counts as a mistake
FILES = {'ids from 1': {}, 'ids from 0': dict(first_id=0), 'num_keypoints 0 beside 17 labelled keypoints': dict(num_keypoints=0)}
EXPECTED = {'pycocotools': (1, ONE_LOST, -1), 'xtcocotools': (1, 1, 1), 'faster-coco-eval': (1, ONE_LOST, -1)}
LIBRARIES = {  # distribution: modules of COCO and COCOeval, their names
    'pycocotools': ('pycocotools.coco', 'pycocotools.cocoeval', 'COCO', 'COCOeval'),
    'xtcocotools': ('xtcocotools.coco', 'xtcocotools.cocoeval', 'COCO', 'COCOeval'),  # mmpose's
    'faster-coco-eval': ('faster_coco_eval', 'faster_coco_eval', 'COCO', 'COCOeval_faster')}


def average_precision(library, first_id=1, num_keypoints=17):
    "AP of perfect predictions: one person in each of some images, numbered from `first_id`, whose `num_keypoints` is as given."
    coco, cocoeval, COCO, COCOeval = LIBRARIES[library]
    COCO, COCOeval = getattr(importlib.import_module(coco), COCO), getattr(importlib.import_module(cocoeval), COCOeval)
    poses = [[v for k in range(17) for v in (10 + 5 * k, 10 + (7 * k + 3 * i) % 80, 2)] for i in range(PERSONS)]
    truth = COCO()
    truth.dataset = dict(
        images=[dict(id=i + 1, width=SIDE, height=SIDE) for i in range(PERSONS)], categories=[dict(id=1, name='person')],
        annotations=[dict(id=first_id + i, image_id=i + 1, category_id=1, iscrowd=0, area=SIDE ** 2, bbox=[0, 0, SIDE, SIDE], keypoints=pose,
                          num_keypoints=num_keypoints) for i, pose in enumerate(poses)])
    truth.createIndex()
    found = truth.loadRes([dict(image_id=i + 1, category_id=1, keypoints=pose, score=1 - i / 10) for i, pose in enumerate(poses)])
    evaluation = COCOeval(truth, found, 'keypoints')
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    return float(evaluation.stats[0])


failed = False
print('library,version,annotation_file,AP,expected')
for library in LIBRARIES:
    for (file, options), expected in zip(FILES.items(), EXPECTED[library]):
        with contextlib.redirect_stdout(io.StringIO()): ap = average_precision(library, **options)
        print(f'{library},{version(library)},{file},{ap:.3f},{expected:.3f}')
        failed |= abs(ap - expected) > 1e-6
sys.exit(failed)

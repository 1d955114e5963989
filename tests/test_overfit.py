"""The whole chain on real photographs: a few persons of coco-mini, learned by heart."""
import json

from srl_pose.training.checkpoint import load_checkpoint
from srl_pose.evaluation.evaluate import evaluate
from srl_pose.experiment.experiment import Experiment
from srl_pose.training.train import train


def few_persons(source, root, persons, copies):
    """A data set of the `persons` images with one fully visible large person; in `train` each occurs `copies` times."""
    data = json.loads((source / 'annotations' / 'person_keypoints_val2017.json').read_text())
    alone = {}
    for annotation in data['annotations']:
        alone.setdefault(annotation['image_id'], []).append(annotation)
    chosen = sorted((a[0] for a in alone.values() if len(a) == 1 and not a[0]['iscrowd']),
                    key=lambda a: -a['num_keypoints'])[:persons]
    names = {image['id']: image for image in data['images']}
    for split, count in (('train', copies), ('val', 1)):
        images, annotations = [], []
        for number, annotation in enumerate(chosen * count, start=1):
            images.append({**names[annotation['image_id']], 'id': number})
            annotations.append({**annotation, 'id': number, 'image_id': number})
        (root / 'annotations').mkdir(parents=True, exist_ok=True)
        (root / 'annotations' / f'person_keypoints_{split}.json').write_text(
            json.dumps({**data, 'images': images, 'annotations': annotations}))
        (root / 'images').mkdir(exist_ok=True)
        (root / 'images' / split).symlink_to(source / 'images' / 'val2017')


def test_a_few_real_persons_are_learned_by_heart(external, tmp_path, sample_row):
    few_persons(external / 'data' / 'coco-mini', tmp_path / 'data', persons=4, copies=24)
    values = sample_row
    values['data'] = dict(root=str(tmp_path / 'data'), train='train', val='val', detections=None)
    values['model'] |= dict(input_size=(192, 256))
    values['train'] |= dict(epochs=5, batch_size=4, learning_rate=1e-3, warmup_epochs=1, schedule='step', lr_steps=(4,))
    values['train']['augmentation'] = dict(scale=0.0, rotation=0.0, rotation_probability=0.0, flip_probability=0.0)
    values['evaluate'] |= dict(boxes='gt', flip_test=False)
    values['machine'] |= dict(processes=1, workers=0)
    experiment = Experiment.model_validate(values)
    train(experiment, tmp_path / 'out')
    model, _, _ = load_checkpoint(tmp_path / 'out' / 'model.pt')
    metrics = evaluate(model, experiment.val_set(), flip_test=False).metrics
    assert metrics['AP'] > 0.9, metrics

"""How fast should the factor α of a block learn? Chosen on a part of the training images, never on the validation set.

    python scripts/choose_alpha_rate.py --data <folder of Leeds Sports Pose Extended>    # two hours of one core

α starts at 0, and Adam moves a number by about its rate in a step, whatever its gradient. So in a short training the rate decides how large α can become.
Every tenth image of `train` is held out. The rows fft and fft_ortho of the recipe `long` are trained on the others for two epochs, from
the backbone of drawn people, with α at 1 to 100 times the rate of all other parameters. AP, PCK and the blocks' α at the end go to results/leeds/alpha_rate.csv.
"""
import argparse
import csv
import itertools
import json
from pathlib import Path

from srl_pose.data.coco import CocoPersons
from srl_pose.evaluation.evaluate import evaluate
from srl_pose.experiment.experiment import Experiment
from srl_pose.experiment.params import load_set
from srl_pose.files import project_root, whole_file, write_json
from srl_pose.pose.pose_net import blocks_of
from srl_pose.training.checkpoint import load_checkpoint
from srl_pose.training.train import train

EVERY = 10  # of so many images one is held out


def hold_out(data: Path, folder: Path) -> Path:
    "A folder with the splits `fit` and `held` of the images of `train`."
    (folder / 'annotations').mkdir(parents=True, exist_ok=True)
    whole = json.loads((data / 'annotations/person_keypoints_train.json').read_text())
    for split, held in (('fit', False), ('held', True)):
        images = [image for i, image in enumerate(whole['images']) if (i % EVERY == 0) == held]
        ids = {image['id'] for image in images}
        write_json(folder / f'annotations/person_keypoints_{split}.json',
                   whole | dict(images=images, annotations=[a for a in whole['annotations'] if a['image_id'] in ids]))
        if not (link := folder / 'images' / split).exists():
            link.parent.mkdir(exist_ok=True)
            link.symlink_to((data / 'images/train').resolve())
    return folder


def row_with(data: Path, row: str, factor: float, epochs: int) -> Experiment:
    "The row with that rate of α, on that folder."
    values = load_set('leeds', recipe='long')[row].model_dump()
    values['data'] |= dict(root=str(data.resolve()), train='fit', val='held')
    values['model'] |= dict(weights='weights/drawn_people_resnet18.pt')
    values['train'] |= dict(epochs=epochs, alpha_rate_factor=factor)
    return Experiment.model_validate(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', type=Path, required=True, help='folder with annotations/ and images/')
    parser.add_argument('--work', type=Path, default=project_root() / 'outputs/alpha_rate', help='for checkpoints; what was stopped goes on (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=project_root() / 'results/leeds/alpha_rate.csv', help='file to write (default: %(default)s)')
    parser.add_argument('--factors', type=float, nargs='+', default=[1, 10, 30, 100], help='of the learning rate (default: %(default)s)')
    parser.add_argument('--rows', nargs='+', default=['fft', 'fft_ortho'], help='default: %(default)s')
    parser.add_argument('--epochs', type=int, default=2, help='default: %(default)s')
    p = parser.parse_args()
    data, rows = hold_out(p.data, p.work / 'data'), []
    for row, factor in itertools.product(p.rows, p.factors):
        experiment, run = row_with(data, row, factor, p.epochs), p.work / f'{row}-{factor:g}'
        train(experiment, run)
        network, _, _ = load_checkpoint(run / 'model.pt')
        persons = CocoPersons(data, 'held', input_size=experiment.model.input_size)
        found = evaluate(network, persons, heatmaps=experiment.build_heatmaps())
        rows.append(dict(row=row, alpha_rate_factor=factor, AP=round(found.metrics['AP'], 4), PCK=round(found.metrics['PCK'], 4))
                    | {f'alpha_{name}': round(block.alpha.item(), 4) for name, block in blocks_of(network).items()})
        print(rows[-1], flush=True)
    p.out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(p.out) as path, open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == '__main__':
    main()

"""Do trained networks tell left from right, and is that what a block changes?

    python scripts/left_right.py --runs outputs/leeds/long/runs --data <folder of Leeds Sports Pose Extended> --out results/leeds/long/left_right.csv

Of the pairs with both keypoints labelled (shoulders, …, ankles): how many are found exchanged; PCK; and PCK if each pair may be taken either way,
which asks only whether limbs were found. From the results files of runs, in a data set with one person in each image.
"""
import argparse
import csv
from pathlib import Path

import numpy as np

from srl_pose.data.coco import CocoPersons
from srl_pose.evaluation.evaluate import pck_hits
from srl_pose.files import DataError, read_json, whole_file
from srl_pose.use.demonstration import share_exchanged


def found_by(file: Path, dataset: CocoPersons) -> np.ndarray:  # (N, K, 2) in pixels of the image
    "The keypoints of a results file, in the data set's order."
    found = {result['image_id']: np.reshape(result['keypoints'], (-1, 3))[:, :2] for result in read_json(file)}
    if set(found) != (ids := set(map(int, dataset.image_id))) or len(ids) < len(dataset): raise DataError(f'{file}: must have one person for each image of {dataset.annotation_file}')
    return np.array([found[int(i)] for i in dataset.image_id])


def line_of(file: Path, dataset: CocoPersons) -> dict[str, object]:
    "One run."
    found, pairs = found_by(file, dataset), dataset.keypoint_set.flip_pairs
    own, either, labelled = 0, 0, 0
    for left, right in pairs:
        there = (dataset.visible[:, [left, right]] > 0).all(1)
        truth, side = dataset.keypoints[there][:, [left, right]], dataset.longer_side[there]
        hits = [pck_hits(found[there][:, pair], truth, np.ones((len(side), 2)), side)[0] for pair in ([left, right], [right, left])]
        own, either, labelled = own + hits[0].sum(), either + np.maximum(*hits).sum(), labelled + len(side)
    row, _, seed = file.parent.name.rpartition('-')
    return dict(row=row, seed=seed, pairs=labelled, exchanged=share_exchanged(found, dataset), pck=own / 2 / labelled, pck_either_way=either / 2 / labelled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--runs', type=Path, required=True, help='folder of runs')
    parser.add_argument('--data', type=Path, required=True, help='folder of the data set')
    parser.add_argument('--out', type=Path, required=True, help='CSV file to write')
    p = parser.parse_args()
    dataset = CocoPersons(p.data, 'val', input_size=(192, 192))
    if not (files := sorted(p.runs.glob('*/keypoints_val_results.json'))): parser.error(f'{p.runs}: there is no */keypoints_val_results.json')
    lines = [line_of(file, dataset) for file in files]
    with whole_file(p.out) as partial, open(partial, 'w', newline='') as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows({name: f'{value:.4f}' if isinstance(value, float) else value for name, value in line.items()} for line in lines)
    print(f'{p.out}: {len(lines)} runs')


if __name__ == '__main__': main()

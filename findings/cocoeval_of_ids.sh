#!/usr/bin/env bash
# What COCOeval makes of predictions that are the truth, where an annotation file counts from 0 or miscounts its labels.
#
#   bash findings/cocoeval_of_ids.sh
#
# In pycocotools a matched annotation is noted by its id, and an id of 0 reads as "no match": the person counts as found by nobody, and who found it as a
# mistake. Perfect predictions of four persons then have an AP of .564. And a person whose `num_keypoints` is 0 is ignored, whatever keypoints are labelled;
# if all are, every number is -1. It says nothing of either; faster-coco-eval warns of the id, and counts likewise. xtcocotools, which mmpose evaluates
# with, takes neither so: AP is 1 for the same two files.
# Exit code 1 if any of this is no longer so. Python 3.11.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q numpy==1.26.4 pycocotools==2.0.11 xtcocotools==1.14.3 faster-coco-eval==1.8.0 >&2
"$tmp/venv/bin/python" -W ignore "$here/cocoeval_of_ids.py"

#!/usr/bin/env bash
# IRNet as published (Ahn, Cho and Kwak, CVPR 2019) on PASCAL VOC 2012, ResNet-50: CAMs, pseudo masks and pseudo objects.
# NOT RUN by this project yet: no VOC, weights or GPU were at hand. Expected scores are the paper's; people who run the
# public code again report those in brackets.
#
#   command    scripts/irn.sh VOC_ROOT [flags of run_sample.py]
#              VOC_ROOT   VOCdevkit/VOC2012 with JPEGImages, Annotations, SegmentationClass, SegmentationObject and
#                         ImageSets/Segmentation/{train,train_aug,val}.txt
#   weights    torchvision's first ResNet-50, fetched once. Without a way to the internet bring resnet50-19c8e357.pth
#              (torchvision's name) and add: --cam.weights FILE --aff.weights FILE
#   hardware   batches of 16 and 32 crops of 512; one GPU. On several put "torchrun --nproc-per-node N" before
#              run_sample.py: the pairs of all processes count as one batch. Published in float32, hence amp off.
#
#   step           list     expected                               source
#   2 make_cam     train    48.3 mIoU (48.1 to 48.6)               paper, issues
#   5 random_walk  train    66.5 mIoU (64.9 to 66.0)               paper, issues
#   5 random_walk  train    37.7 AP50 of objects (32.4 to 35.7)    paper, issues
#
# Steps 6 and 7 are left out: the published segmentation network (DeepLab on ResNet-50, 63.5 val) is not here. For
# another one say --steps 6-8 --seg.weights FILE.
set -euo pipefail
if [ $# -lt 1 ]; then
    sed -n '2,/^set/p' "$0" | sed '$d'
    exit 2
fi
root=$(realpath "$1")
shift
. "$(dirname "$0")/env.sh" requirements.txt
exec .venv/bin/python run_sample.py irn_cam --preset published --data voc12 --root "$root" --machine.amp off \
    --steps 1-5 report "$@"

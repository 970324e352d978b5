#!/usr/bin/env bash
# IRNet as published (Ahn, Cho and Kwak, CVPR 2019) on PASCAL VOC 2012, ResNet-50: CAMs, pseudo masks and pseudo objects.
# NOT RUN by this project yet: no VOC, weights or GPU were at hand. Expected scores are the paper's; people who run the
# public code again report those in brackets.
#
#   command    scripts/irn.sh VOC_ROOT [flags of run_sample.py]
#              VOC_ROOT   VOCdevkit/VOC2012 with JPEGImages, Annotations, SegmentationClass, SegmentationObject and
#                         ImageSets/Segmentation/{train,train_aug,val}.txt
#   weights    torchvision's first ResNet-50 and ResNet-101, fetched once. Without a way to the internet bring the files
#              (torchvision's names) and add: --cam.weights resnet50-19c8e357.pth --aff.weights resnet50-19c8e357.pth
#              --seg.weights resnet101-5d3b4d8f.pth
#   hardware   batches of 16 and 32 crops of 512; one GPU. On several say GPUS=N before the command: the pairs of all
#              processes count as one batch. Published in float32, as the recipe says.
#
#   step           list     expected                               source
#   2 make_cam     train    48.3 mIoU (48.1 to 48.6)               paper, issues
#   5 random_walk  train    66.5 mIoU (64.9 to 66.0)               paper, issues
#   5 random_walk  train    37.7 AP50 of objects (32.4 to 35.7)    paper, issues
#   7 infer_seg    val      63.5 mIoU, DeepLab on ResNet-50; here  paper
#                           DeepLab v2 on ResNet-101: not comparable
#
# The authors' weights, used without training: add one of these to the command (no such file was at hand; more:
# docs/results.md)
#
#   --cam.released res50_cam.pth --steps 1-2                                train 48.3
#   --cam.released res50_cam.pth --aff.released res50_irn.pth --steps train_cam make_cam train_aff random_walk
#       -> train 66.5
set -euo pipefail
. "$(dirname "$0")/system.sh" root -- "$@"
launch irn_cam --data voc12 --root "$root"

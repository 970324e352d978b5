#!/usr/bin/env bash
# PSA as published (Ahn and Kwak, CVPR 2018) on PASCAL VOC 2012, ResNet38. NOT RUN by this project yet: no VOC, weights or
# GPU were at hand. Expected scores are the public repository's and the paper's.
#
#   command    scripts/psa.sh VOC_ROOT IMAGENET_PARAMS [flags of run_sample.py]
#              VOC_ROOT         VOCdevkit/VOC2012 with JPEGImages, Annotations, SegmentationClass(Aug) and
#                               ImageSets/Segmentation/{train,train_aug,val}.txt
#              IMAGENET_PARAMS  ilsvrc-cls_rna-a1_cls1000_ep-0001.params (ResNet38 A1, MXNet file of ademxapp)
#   hardware   the authors: 2 to 4 GPUs of 12 GB, batch 16 in all. With 2 GPUs say
#              GPUS=2 before the command; the batches stay the recipe's (8 or 16, and 10 for
#              the segmentation network: the number of GPUs must divide them). Published in float32, as the recipe says.
#
#   step           list        expected                                   source
#   2 make_cam     train       47.7 mIoU (released weights), 48.0         repository, paper
#   5 random_walk  train       61.0 (released weights, alphas 4/16/32)    repository
#   7 infer_seg    val         61.7, with the paper's ResNet38; here DeepLab v1 as SEAM re-trains it, so not comparable
#
# The authors' weights, used without training: add one of these to the command (no such file was at hand; more:
# docs/results.md)
#
#   --cam.released res38_cls.pth --steps 1-2                                train 47.7
#   --cam.released res38_cls.pth --aff.released resnet38_aff.pth --steps train_cam make_cam train_aff random_walk
#       -> train 61.0
set -euo pipefail
. "$(dirname "$0")/system.sh" root params -- "$@"
launch psa --data voc12 --root "$root" --cam.weights "$params" --aff.weights "$params" --seg.weights "$params"

#!/usr/bin/env bash
# SEAM as published (Wang et al., CVPR 2020) on PASCAL VOC 2012. NOT RUN by this project yet: no VOC, weights or GPU were
# at hand. Expected scores are the paper's and the public repository's.
#
#   command    scripts/seam.sh VOC_ROOT IMAGENET_PARAMS [flags of run_sample.py]
#              VOC_ROOT         VOCdevkit/VOC2012 with JPEGImages, Annotations, SegmentationClass(Aug) and
#                               ImageSets/Segmentation/{train,train_aug,val}.txt
#              IMAGENET_PARAMS  ilsvrc-cls_rna-a1_cls1000_ep-0001.params (ResNet38 A1, MXNet file of ademxapp)
#   hardware   the authors: 4 GPUs of 12 GB, batch 8 in all. With 2 GPUs say
#              GPUS=2 before the command; the batches stay the recipe's (8 or 16, and 10 for
#              the segmentation network: the number of GPUs must divide them). Published in float32, as the recipe says.
#
#   step           list        expected                                   source
#   2 make_cam     train       55.41 mIoU (best background score)         paper
#   5 random_walk  train       63.61 (a user's re-run: 63.42)             paper, repository
#   7 infer_seg    val         64.5 (released re-training: 64.75)         paper, codebase
set -euo pipefail
. "$(dirname "$0")/system.sh" root params -- "$@"
launch seam --data voc12 --root "$root" --cam.weights "$params" --aff.weights "$params" --seg.weights "$params"

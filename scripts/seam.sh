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
#
# The public walk has an optional CRF (whether 63.61 was measured with it is not said); a walk in a run folder of its own:
#
#   scripts/seam.sh VOC_ROOT IMAGENET_PARAMS --aff.walk.crf.iterations 1
#
# The authors' weights, used without training: add one of these to the command (no such file was at hand; more:
# docs/results.md)
#
#   --cam.released FILE --steps 1-2                                         train 55.41
#   --cam.released FILE --aff.released FILE --steps train_cam make_cam train_aff random_walk  train 63.61
#   --seg.released deeplabv1_resnet38_VOCDataset_itr20000_all.pth --steps train_seg infer_seg  val 64.75
set -euo pipefail
. "$(dirname "$0")/system.sh" root params -- "$@"
launch seam --data voc12 --root "$root" --cam.weights "$params" --aff.weights "$params" --seg.weights "$params"

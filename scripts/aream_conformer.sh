#!/usr/bin/env bash
# AReAM on Conformer-S as published (arXiv 2305.03112) on PASCAL VOC 2012. NOT RUN by this project yet: no VOC, weights or
# GPU were at hand. Expected scores are those of the public repository.
#
#   command    scripts/aream_conformer.sh VOC_ROOT CONFORMER_PTH RES38_CLS [flags of run_sample.py]
#              VOC_ROOT         VOCdevkit/VOC2012 with JPEGImages, Annotations, SegmentationClass(Aug) and
#                               ImageSets/Segmentation/{train,train_aug,val}.txt
#              CONFORMER_PTH    Conformer_small_patch16.pth (Conformer-S, ImageNet)
#              RES38_CLS        res38_cls.pth, PSA's VOC classifier (weights of steps 4 and 6)
#   hardware   the authors' is not stated; batch 8 of 384 x 384 in float32, as the recipe says. With N GPUs say GPUS=N
#              before the command; the batch stays the recipe's, but batch norms see each
#              process's own images, and the pairs' loss is normalised by its own pairs.
#
#   step           list        expected                                        source
#   2 make_cam     train       70.69 mIoU (best background score)              released checkpoint; which weighting of
#                              (TransCAM: 64.9)                                the layers it had is not stated
#
# Unless --aff.walk.threshold NUMBER is given, the walk takes the background score that step 2 found best on train.
# The maps come from the last epoch, as published. Scores after the random walk and of the segmentation network were not
# published in numbers that could be found.
#
# Layers weighted by entropy: train with --cam.network.pair-weight 0 in a run folder of its own, measure with
# "python -m scripts.layer_entropy aream_conformer ..." and the same flags, and add what it prints to this command.
#
# COCO 2014 (no score was found; the recipe is the same):
#
#   python run_sample.py aream_conformer --preset published --data coco14 --root COCO \
#       --cam.weights CONFORMER_PTH --aff.weights RES38_CLS --seg.weights RES38_CLS
#
# The authors' weights, used without training: add one of these to the command (no such file was at hand; more:
# docs/results.md)
#
#   --cam.released checkpoint.pth --steps 1-2  train 70.69
set -euo pipefail
. "$(dirname "$0")/system.sh" root conformer classifier -- "$@"
launch aream_conformer --data voc12 --root "$root" \
    --cam.weights "$conformer" --aff.weights "$classifier" --seg.weights "$classifier"

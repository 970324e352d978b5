#!/usr/bin/env bash
# AReAM on MCTformer-V2 as published (arXiv 2305.03112) on PASCAL VOC 2012. NOT RUN by this project yet: no VOC, weights or
# GPU were at hand. Expected scores are those of the public repository.
#
#   command    scripts/aream_mctformer.sh VOC_ROOT RES38_CLS [flags of run_sample.py]
#              VOC_ROOT         VOCdevkit/VOC2012 with JPEGImages, Annotations, SegmentationClass(Aug) and
#                               ImageSets/Segmentation/{train,train_aug,val}.txt
#              RES38_CLS        res38_cls.pth, PSA's VOC classifier (weights of steps 4 and 6)
#              The CAM network starts from DeiT-S, fetched from the internet by timm; without internet add
#              --cam.weights deit_small_patch16_224-cd65a155.pth.
#   hardware   the authors' is not stated; batch 64 of 224 x 224 in float32, as the recipe says. With N GPUs say
#              GPUS=N before the command; the batch stays the recipe's, but the pairs' loss is then
#              normalised by each process's own pairs.
#
#   step           list        expected                                        source
#   2 make_cam     train       67.93 mIoU (best background score)              released checkpoint
#                              67.73 with layers weighted by entropy           first README of the repository
#
# The maps come from the epoch of the best mAP on the TAGS of val, as published; --cam.selection last does not look at
# val. Unless --aff.walk.threshold NUMBER is given, the walk takes the background score that step 2 found best on train.
# Scores after the random walk and of the segmentation network were not published in numbers that could be found.
#
# Layers weighted by entropy: train with --cam.network.pair-weight 0 in a run folder of its own, measure with
# "python -m scripts.layer_entropy aream_mctformer ..." and the same flags, and add what it prints to this command.
#
# COCO 2014: nothing was published for AReAM on MCTformer, only on Conformer: see scripts/aream_conformer.sh.
#
# The authors' weights, used without training: add one of these to the command (no such file was at hand; more:
# docs/results.md)
#
#   --cam.released checkpoint_best.pth --steps 1-2  train 67.93
set -euo pipefail
. "$(dirname "$0")/system.sh" root classifier -- "$@"
launch aream_mctformer --data voc12 --root "$root" --aff.weights "$classifier" --seg.weights "$classifier"

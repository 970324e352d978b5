#!/usr/bin/env bash
# Puzzle-CAM as published (Jo and Yu, ICIP 2021) on PASCAL VOC 2012, on ResNeSt-101. NOT RUN by this project yet: no
# VOC, weights or GPU were at hand. Expected scores are the published ones.
#
#   command    scripts/puzzlecam.sh VOC_ROOT BACKBONE [flags of run_sample.py]
#              VOC_ROOT         VOCdevkit/VOC2012 with JPEGImages, Annotations, SegmentationClass(Aug) and
#                               ImageSets/Segmentation/{train,train_aug,val}.txt
#              BACKBONE         resnest101e, resnest269e (or another ResNeSt of timm) or resnet50, of all three networks.
#              ImageNet weights are fetched from the internet by timm; without internet add --cam.weights FILE
#              --aff.weights FILE --seg.weights FILE, one file for all three: resnest101-22405ba7.pth,
#              resnest269-0cc87c48.pth (resnest50-528c19ca.pth, resnest200-75117900.pth) of the authors of ResNeSt,
#              resnet50-19c8e357.pth of torchvision
#   hardware   the authors' is not stated; batch 32 of 512 x 512, each image twice (whole and in tiles). With N GPUs say
#              GPUS=N before the command; --cam.fit.micro-batch limits what one holds at a time.
#              Published in float32, as the recipe says.
#
#   step           list        expected                                                      source
#   2 make_cam     train       about 61.9 mIoU, ResNeSt-101 (best background score)          from memory, not checked
#   7 infer_seg    val         66.9, ResNeSt-101; 71.9, ResNeSt-269                          from memory, not checked
#                  not named   67.7, ResNeSt-101; 72.2, ResNeSt-269                          README of the repository
#
# Difference from the published pipeline: that keeps the epoch that scores best against the PIXEL LABELS of train (CAM
# network) and val (segmentation network); here the last one is kept unless --cam.selection train_miou is said.
#
# The authors' weights, used without training: add one of these to the command (no such file was at hand; more:
# docs/results.md)
#
#   --cam.released FILE --steps 1-2                  train about 61.9 (resnest101e)
#   --seg.released FILE --steps train_seg infer_seg  67.7 (resnest101e), 72.2 (resnest269e), set not named
set -euo pipefail
. "$(dirname "$0")/system.sh" root backbone= -- "$@"
network=()
for phase in cam aff seg; do
    case $backbone in
        resnet50) network+=("--$phase.network.backbone" resnet) ;;
        *) network+=("--$phase.network.backbone" resnest "--$phase.network.resnest.name" "$backbone") ;;
    esac
done
launch puzzlecam --data voc12 --root "$root" "${network[@]}"

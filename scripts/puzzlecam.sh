#!/usr/bin/env bash
# Puzzle-CAM as published (Jo and Yu, ICIP 2021) on PASCAL VOC 2012, on ResNeSt-101. NOT RUN by this project yet: no
# VOC, weights or GPU were at hand. Expected scores are the published ones.
#
#   command    scripts/puzzlecam.sh VOC_ROOT BACKBONE [flags of run_sample.py]
#              VOC_ROOT         VOCdevkit/VOC2012 with JPEGImages, Annotations, SegmentationClass(Aug) and
#                               ImageSets/Segmentation/{train,train_aug,val}.txt
#              BACKBONE         resnest101e, resnest269e (or another ResNeSt of timm) or resnet50
#              ImageNet weights are fetched from the internet by timm, those of the refiner (ResNet-50) and of the
#              segmentation network (ResNet-101) too; without internet add --cam.weights FILE
#              --aff.weights resnet50-19c8e357.pth --seg.weights resnet101-5d3b4d8f.pth
#   hardware   the authors' is not stated; batch 32 of 512 x 512, each image twice (whole and in tiles). With N GPUs put
#              "torchrun --nproc-per-node N" before run_sample.py; --cam.fit.micro-batch limits what one holds at a time.
#              Published in float32, hence amp off.
#
#   step           list        expected                                                      source
#   2 make_cam     train       about 61.9 mIoU, ResNeSt-101 (best background score)          from memory, not checked
#   7 infer_seg    val         66.9, ResNeSt-101; 71.9, ResNeSt-269                          from memory, not checked
#                  test        67.7, ResNeSt-101; 72.2, ResNeSt-269                          README of the repository
#
# Differences from the published pipeline: its segmentation network is a DeepLab v3+ on ResNeSt, here it is DeepLab v2 on
# ResNet-101, and its refiner can be a ResNeSt too; it keeps the epoch that scores best against the PIXEL LABELS of
# train, here the last one is kept unless --cam.selection train_miou is said.
set -euo pipefail
. "$(dirname "$0")/system.sh" root backbone= -- "$@"
case $backbone in
    resnet50) network=(--cam.network.backbone resnet) ;;
    *) network=(--cam.network.backbone resnest --cam.network.resnest.name "$backbone") ;;
esac
launch puzzlecam --data voc12 --root "$root" "${network[@]}" --machine.amp off

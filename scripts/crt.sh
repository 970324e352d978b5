#!/usr/bin/env bash
# CRT as published (Huo, Su and Wu, 2022) on PASCAL VOC 2012. NOT RUN by this project yet: no VOC, weights or GPU were at
# hand. Expected scores are the published ones.
#
#   command    scripts/crt.sh VOC_ROOT COCO_WEIGHTS [flags of run_sample.py]
#              VOC_ROOT         VOCdevkit/VOC2012 with JPEGImages, Annotations, SegmentationClass(Aug) and
#                               ImageSets/Segmentation/{train,train_aug,val}.txt
#              COCO_WEIGHTS     start of the segmentation network, trained on COCO's pixel masks:
#                               deeplabv1_resnet101-coco.pth, or init.caffemodel that it was made of
#              DeiT-S, ResNet-152 and ResNet-50 are fetched from the internet by timm; without internet add
#              --cam.weights deit_small_patch16_224-cd65a155.pth,resnet152-b121ed2d.pth
#              --aff.weights resnet50-19c8e357.pth
#   hardware   the authors: two RTX 2080 Ti, batch 16 of 336 x 336. With N GPUs say GPUS=N before the command; the
#              batch stays the recipe's. Published in float32, as the recipe says.
#
#   step           list        expected                                                        source
#   2 make_cam     train       57.7 mIoU (best background score)                               published
#   5 random_walk  train       71.8                                                            published
#   7 infer_seg    val         71.2; test: 71.7 (DeepLab v2, ResNet-101, COCO start)           published
#
# The authors' weights, used without training: add one of these to the command (no such file was at hand; more:
# docs/results.md)
#
#   --cam.released deits_cam.pth,res152_cam.pth --steps 1-2                 train 57.7
#   --cam.released deits_cam.pth,res152_cam.pth --aff.released res50_irn.pth --steps train_cam make_cam train_aff random_walk
#       -> train 71.8
#   --seg.released checkpoint_final.pth --steps train_seg infer_seg         val 71.2
set -euo pipefail
. "$(dirname "$0")/system.sh" root coco -- "$@"
launch crt --data voc12 --root "$root" --seg.weights "$coco"

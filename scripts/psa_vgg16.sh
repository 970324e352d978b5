#!/usr/bin/env bash
# PSA as published (Ahn and Kwak, CVPR 2018) on PASCAL VOC 2012, VGG16 in both trainings. NOT RUN by this project yet: no
# VOC, weights or GPU were at hand. Expected scores are the public repository's.
#
#   command    scripts/psa_vgg16.sh VOC_ROOT VGG16_WEIGHTS IMAGENET_PARAMS [flags of run_sample.py]
#              VOC_ROOT         VOCdevkit/VOC2012 with JPEGImages, Annotations, SegmentationClass(Aug) and
#                               ImageSets/Segmentation/{train,train_aug,val}.txt
#              VGG16_WEIGHTS    vgg16_20M.caffemodel, of both networks (page of PSA's repository)
#              IMAGENET_PARAMS  ilsvrc-cls_rna-a1_cls1000_ep-0001.params, of the segmentation network (ResNet38)
#   hardware   as scripts/psa.sh; both trainings at the rate 0.1. Published in float32, as the recipe says.
#
#   step           list        expected                                   source
#   2 make_cam     train       48.9 mIoU (val 46.6; released weights)     repository
#   5 random_walk  train       59.6 (val 54.0; released, alphas 4/16/32)  repository
#   7 infer_seg    val         58.4 with the paper's DeepLab on VGG16, which is not here: DeepLab v1 on ResNet38 takes its
#                              place, so not comparable
#
# The authors' weights, used without training: add one of these to the command (no such file was at hand; more:
# docs/results.md)
#
#   --cam.released FILE --steps 1-2                                         train 48.9
#   --cam.released FILE --aff.released FILE --steps train_cam make_cam train_aff random_walk  train 59.6
set -euo pipefail
. "$(dirname "$0")/system.sh" root vgg params -- "$@"
preset=published_vgg16
launch psa --data voc12 --root "$root" --cam.weights "$vgg" --aff.weights "$vgg" --seg.weights "$params"

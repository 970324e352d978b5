#!/usr/bin/env bash
# MCTformer as published (Xu et al., CVPR 2022; MCTformer+: 2023) on PASCAL VOC 2012. NOT RUN by this project yet: no VOC,
# weights or GPU were at hand. Expected scores are the papers' and the public repository's.
#
#   command    scripts/mctformer.sh VERSION VOC_ROOT RES38_CLS [flags of run_sample.py]
#              VERSION          v1, v2 or plus
#              VOC_ROOT         VOCdevkit/VOC2012 with JPEGImages, Annotations, SegmentationClass(Aug) and
#                               ImageSets/Segmentation/{train,train_aug,val}.txt
#              RES38_CLS        res38_cls.pth, PSA's VOC classifier (weights of steps 4 and 6)
#              The CAM network starts from DeiT-S, fetched from the internet by timm; without internet add
#              --cam.weights deit_small_patch16_224-cd65a155.pth.
#   hardware   trained and applied in half precision in steps 1 and 2; the authors' GPUs are not stated. With N GPUs say
#              GPUS=N before the command; the batch stays the recipe's.
#
#   step           list        expected: v1    v2      plus    source
#   2 make_cam     train                 55.2  61.7    68.8    papers (users of v2: 55 to 58.7)
#   5 random_walk  train                 -     69.1    76.2    papers (users of plus: 69.7 to 72.6; its settings were
#                                                              never published, those of v2 are taken)
#   7 infer_seg    val                   -     71.9    74.0    papers (a user's v2: 71.1)
#
# COCO 2014 (the paper's val: v2 42.0, plus 45.2; nothing after the CAMs was published for COCO, so steps 3 to 7 are VOC's
# settings):
#
#   python run_sample.py mctformer --preset published --data coco14 --root COCO \
#       --aff.weights RES38_CLS --seg.weights RES38_CLS
#
# The authors' weights, used without training: add one of these to the command (no such file was at hand; more:
# docs/results.md)
#
#   --cam.released checkpoint.pth --steps 1-2                train: see the table
#   --seg.released model_29.pth --steps train_seg infer_seg  val 71.9 (v2)
set -euo pipefail
. "$(dirname "$0")/system.sh" version= root classifier -- "$@"
[ "$version" = v2 ] || preset=published_$version
launch mctformer --data voc12 --root "$root" --aff.weights "$classifier" --seg.weights "$classifier"

#!/usr/bin/env bash
# GETAM as published (Sun et al., 2021) on PASCAL VOC 2012: a CAM network that is its own segmentation network. NOT RUN
# by this project yet: no VOC, weights or GPU were at hand. Expected scores are the published ones.
#
#   command    scripts/getam.sh BACKBONE VOC_ROOT SALIENCY [flags of run_sample.py]
#              BACKBONE   the authors' names: vitb_hybrid (their default), vitb, deit, deit_distilled
#              VOC_ROOT   VOCdevkit/VOC2012 with JPEGImages, Annotations, SegmentationClass(Aug) and
#                         ImageSets/Segmentation/{train,train_aug,val}.txt
#              SALIENCY   folder of saliency maps ID.png: one 8-bit channel, sizes of the images, any value above 0 is
#                         salient (the authors link theirs in the README of their repository)
#              Without such maps, by a rule of this project: run_sample.py getam --preset published --data voc12 --root
#              VOC_ROOT --cam.network.label.no-saliency (nothing was published for that)
#   weights    timm's ImageNet weights are fetched; without a way to the internet: --cam.weights FILE, one of
#              jx_vit_base_resnet50_384-9fd3c705.pth (vitb_hybrid), jx_vit_base_p16_384-83fb41ba.pth (vitb),
#              deit_base_patch16_384-8de9b5d1.pth (deit), deit_base_distilled_patch16_384-d0272ac0.pth (deit_distilled).
#              To go on training from a released checkpoint, give it to --cam.weights
#   hardware   published: one GPU, batch 4 of 256 x 256 in float32, as the recipe says (several GPUs: say
#              GPUS=N before the command; the batch stays the recipe's, and gradients are
#              averaged in both phases)
#
#   command                                          expected at 7 infer_seg: val  test   source
#   scripts/getam.sh vitb_hybrid VOC_ROOT SALIENCY                            71.7 72.3   published
#   scripts/getam.sh vitb VOC_ROOT SALIENCY                                   68.1 68.8   published
#   scripts/getam.sh deit VOC_ROOT SALIENCY                                   66.0 68.9   published
#   scripts/getam.sh deit_distilled VOC_ROOT SALIENCY                         70.7 71.1   published
#
# Scores of the CAMs (step 2) were not published. Each command needs a run folder of its own (--out).
#
# Steps 3 to 6 are not needed. The second command sends the same maps through a refiner and a segmentation network of
# its own (nothing was published for that; IMAGENET_PARAMS: see scripts/seam.sh):
#
#   scripts/getam.sh vitb_hybrid VOC_ROOT SALIENCY --out runs/getam
#   scripts/getam.sh vitb_hybrid VOC_ROOT SALIENCY --out runs/getam-deeplabv1 --cams runs/getam --segmenter deeplabv1 \
#       --aff.weights IMAGENET_PARAMS --seg.weights IMAGENET_PARAMS
#
# On the sample set: python run_sample.py getam --out runs/one, and
# python run_sample.py getam --out runs/many --cams runs/one --segmenter deeplabv1.
#
# The authors' weights, used without training: add one of these to the command (no such file was at hand; more:
# docs/results.md)
#
#   --cam.released weight/NAME_last.pth --steps 1-2 infer_seg  val: see the table
set -euo pipefail
. "$(dirname "$0")/system.sh" backbone= root saliency -- "$@"
launch getam --data voc12 --root "$root" --saliency "$saliency" --cam.network.dpt.backbone "${backbone/#deit/deitb}"

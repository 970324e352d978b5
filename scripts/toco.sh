#!/usr/bin/env bash
# ToCo as published (Ru et al., CVPR 2023) on PASCAL VOC 2012: a CAM network that is its own segmentation network. NOT RUN
# by this project yet: no VOC, weights or GPU were at hand. Expected scores are the paper's and the public logs'.
#
#   command    scripts/toco.sh VOC_ROOT [flags of run_sample.py]
#              VOC_ROOT   VOCdevkit/VOC2012 with JPEGImages, Annotations, SegmentationClass(Aug) and
#                         ImageSets/Segmentation/{train,train_aug,val}.txt
#   weights    timm's vit_base_patch16_224.orig_in21k_ft_in1k is fetched; without a way to the internet: --cam.weights
#              jx_vit_base_p16_224-80ecf9dd.pth. From DeiT-B (deit_base_patch16_224-b5f2ef4d.pth): preset=published_deit
#              before the command
#   hardware   published: 2 GPUs, 2 images each; here the global batch of 4 is divided over the processes there are (say
#              GPUS=N before the command). Means over pairs and pixels are those of the whole
#              batch, published those of each GPU's 2 images
#   mended     --cam.network.mirrored-box, --cam.network.token-box, --cam.network.shared-mirror: three places where the
#              published augmentation and its labels don't fit together; published is the default
#
#   step          list   expected: ViT-B  DeiT-B     source
#   2 make_cam    val              72.3   70.5       public logs, at the constant background 0.5
#                 train            73.6   72.2       commonly quoted, not confirmed
#   7 infer_seg   val              71.1   69.8       paper (69.2, 68.1 at one scale without CRF: logs)
#                 test             72.2   70.5       paper
#
# COCO 2014 (42.2 and 41.3 on val): run_sample.py toco --preset published_coco (or published_coco_deit) --data coco14
# --root COCO. Steps 3 to 6 are not needed. The second command sends the same maps through a refiner and a segmentation
# network of its own (nothing was published for that; IMAGENET_PARAMS: see scripts/seam.sh):
#
#   scripts/toco.sh VOC_ROOT --out runs/toco
#   scripts/toco.sh VOC_ROOT --out runs/toco-deeplabv1 --cams runs/toco --segmenter deeplabv1 \
#       --aff.weights IMAGENET_PARAMS --seg.weights IMAGENET_PARAMS
#
# On the sample set: python run_sample.py toco.
#
# The authors' weights, used without training: add one of these to the command (no such file was at hand; more:
# docs/results.md)
#
#   --cam.released checkpoints/model_iter_N.pth --steps 1-2 infer_seg  val 71.1 (name unverified: what the code writes)
set -euo pipefail
. "$(dirname "$0")/system.sh" root -- "$@"
launch toco --data voc12 --root "$root"

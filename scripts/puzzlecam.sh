#!/usr/bin/env bash
# Puzzle-CAM as published (Jo and Yu, ICIP 2021) on PASCAL VOC 2012, on ResNeSt-101. NOT RUN by this project yet: no
# VOC, weights or GPU were at hand. Expected scores are the published ones.
#
#   command    scripts/puzzlecam.sh VOC_ROOT [resnest101e | resnest269e | resnet50] AFF_WEIGHTS [flags of run_sample.py]
#              VOC_ROOT         VOCdevkit/VOC2012 with JPEGImages, Annotations, SegmentationClass(Aug) and
#                               ImageSets/Segmentation/{train,train_aug,val}.txt
#              resnest...       the backbone; its ImageNet weights, and those of the segmentation network (ResNet-101),
#                               are fetched through timm (or say --cam.weights FILE, --seg.weights FILE)
#              AFF_WEIGHTS      weights of the refiner's backbone, as its recipe wants them
#   hardware   the authors' is not stated; batch 32 of 512 x 512, each image twice (whole and in tiles). With N GPUs put
#              "torchrun --nproc-per-node N" before run_sample.py; --cam.fit.micro-batch limits what one holds at a time.
#
#   step           list        expected                                                      source
#   2 make_cam     train       about 61.9 mIoU, ResNeSt-101 (best background score)          from memory, not checked
#   7 infer_seg    val         66.9, ResNeSt-101; 71.9, ResNeSt-269                          from memory, not checked
#                  test        67.7, ResNeSt-101; 72.2, ResNeSt-269                          README of the repository
#
# Differences from the published pipeline: its segmentation network is a DeepLab v3+ on ResNeSt, here it is DeepLab v2 on
# ResNet-101; it keeps the epoch that scores best against the pixel labels of train, here the last one is kept.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,/^set/p' "$0" | sed '$d'
    exit 2
fi
root=$(realpath "$1")
backbone=$2
affinity=$(realpath "$3")
shift 3
case $backbone in
    resnest*) network=(--cam.network.backbone resnest --cam.network.resnest.name "$backbone") ;;
    resnet50) network=(--cam.network.backbone resnet) ;;
    *)
        echo "error: no backbone $backbone; there are resnest101e, resnest269e, resnet50 and timm's other ResNeSts" >&2
        exit 2
        ;;
esac
. "$(dirname "$0")/env.sh" requirements.txt
exec .venv/bin/python run_sample.py puzzlecam --preset published --data voc12 --root "$root" "${network[@]}" \
    --aff.weights "$affinity" "$@"

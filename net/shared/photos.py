"""What the recipes photos share, those for people's own pictures on a small network that has seen ImageNet."""

from __future__ import annotations

from misc.config import Augment, CamInference, Fit, SegInference
from misc.crf.dense import CRFSettings
from net.backbone.timm_cnn import TimmOptions
from net.contract import Options, Recipe, SeedRecipe, SegmentRecipe
from net.shared.edge import EdgeLabel
from net.start_weights import CAM, PRETRAINED

# some hundred photographs teach the first stages little, whose maps take most of the memory
PHOTOS_TIMM = TimmOptions(frozen="layer2")
# where only means of the last map are trained, by which a training takes little more than half the time
PHOTOS_TIMM_OF_MEANS = TimmOptions(frozen="layer2", training_stride=32)
PHOTOS_CAMS = CamInference(scales=(0.5, 1.0, 1.5), flip=True, normalise="max", search_to=0.79)
# the refiners irn and edge
PHOTOS_EDGE_FIT = Fit(epochs=4, batch_size=16, optimiser="adamw", lr=1e-3, weight_decay=1e-4)
PHOTOS_EDGE_AUGMENT = Augment(
    order=("long_side", "flip", "jitter", "normalize", "crop"), long_side=(320, 512), crop=352
)
PHOTOS_EDGE_LABEL = EdgeLabel(
    threshold_fg=0.55, threshold_bg=0.30, crf=CRFSettings(iterations=5, bilateral_sxy=50.0, bilateral_srgb=5.0)
)


def make_photos_recipe(network: Options, infer: CamInference = PHOTOS_CAMS) -> Recipe:
    """The recipe photos of a seed: masks by a walk across learnt edges, and DeepLab v1 trained on them."""
    return Recipe(
        cam=SeedRecipe(
            amp="fast",
            network=network,
            fit=Fit(epochs=8, batch_size=16, optimiser="adamw", lr=2e-4, weight_decay=0.01),
            augment=Augment(
                order=("long_side", "flip", "jitter", "normalize", "crop"),
                long_side=(320, 512),
                jitter=(0.3, 0.3, 0.3, 0.05),
                crop=352,
            ),
            weights=PRETRAINED,
            init="imagenet",
            infer=infer,
        ),
        refiner="edge",
        segmenter="deeplabv1",
        long_side=1024,
        data="folder",
    )


def make_photos_segment_recipe(network: Options) -> SegmentRecipe:
    """The recipe photos of a segmentation network, which starts as the CAM network of the same backbone."""
    return SegmentRecipe(
        amp="fast",
        network=network,
        fit=Fit(epochs=8, batch_size=16, optimiser="adamw", lr=2e-4, weight_decay=0.01),
        augment=Augment(
            order=("hsv", "flip", "scale", "normalize", "crop"), scale=(0.6, 1.4), scale_filter="linear", crop=320
        ),
        weights=CAM,
        infer=SegInference(
            scales=(0.75, 1.0, 1.25),
            flip=True,
            resize="bicubic",
            align_corners=False,
            crf=CRFSettings(
                iterations=5, gauss_sxy=1, gauss_weight=3, bilateral_sxy=67, bilateral_srgb=3, bilateral_weight=4
            ),
        ),
    )

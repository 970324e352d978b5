"""The edge-only affinity network of SemFormer and Puzzle-CAM (semformer.md sections 8 and 9, puzzlecam.md section 5).

IRNet's boundary branch without its displacements; what it computes is explained in net/shared/edge.py; the settings are
here. The published recipe is SemFormer's. Puzzle-CAM's differs from it in these fields: ``network.backbone`` resnest,
``network.align_corners`` off, ``label.threshold_fg`` and ``label.threshold_bg`` 0.40 and 0.10 (its script's defaults:
0.30 and 0.05), no ``jitter`` in ``augment.order``, ``walk.threshold`` 0.35 and one iteration of ``walk.crf`` (defaults:
0.25 and ten).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated

from misc.checked import Names, When
from misc.config import Augment, Fit
from misc.crf.dense import CRFSettings
from net.backbone.resnest import ResNeStOptions
from net.backbone.resnet import SAMPLE_RESNET
from net.backbone.timm_cnn import PHOTOS, PREFIX
from net.contract import Network, RefineRecipe
from net.registry import refiner
from net.shared.edge import EdgeLabel, EdgeNetwork, EdgeOptions, EdgeWalk
from net.shared.photos import PHOTOS_EDGE_AUGMENT, PHOTOS_EDGE_FIT, PHOTOS_EDGE_LABEL
from net.start_weights import CAM, PRETRAINED


@refiner("edge")
class EdgeOnly(EdgeNetwork):
    """The refiner ``edge``; labels, training and walk are those of ``EdgeNetwork``."""


@dataclass(frozen=True)
class EdgeOnlyOptions(EdgeOptions):
    """Edge network; the defaults are SemFormer's."""

    align_corners: bool = True
    """align_corners of the bilinear upsampling inside the network. Puzzle-CAM: off."""

    backbone: Annotated[str, Names(("resnet", "resnest"), PREFIX)] = "resnet"
    """Backbone under the boundary head; only the section with this name is used. Puzzle-CAM: resnest. timm/NAME: a CNN
    of timm."""
    resnest: Annotated[ResNeStOptions, When("backbone", "resnest")] = field(
        default_factory=lambda: ResNeStOptions(norm="fixed", frozen="layer4")
    )
    """ResNeSt. Published: completely frozen; only the layers on its stages are trained."""

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> EdgeOnly:
        """The affinity network; it depends neither on the classes nor on earlier networks."""
        return EdgeOnly(self)


@dataclass(frozen=True)
class EdgeRecipe(RefineRecipe):
    """Recipe of the edge network."""

    network: EdgeOnlyOptions = field(default_factory=EdgeOnlyOptions)
    """Options of the network itself."""
    label: EdgeLabel = field(default_factory=EdgeLabel)
    """How affinity labels are made from CAMs."""
    walk: EdgeWalk = field(default_factory=EdgeWalk)
    """The random walk."""


_CRF = CRFSettings(iterations=1, bilateral_sxy=50.0, bilateral_srgb=5.0)

EdgeOnly.recipes = {
    # The momentum is the published poly-SGD's, which passes its weight decay there (semformer.md section 7).
    "published": EdgeRecipe(
        fit=Fit(epochs=3, batch_size=32, lr=0.1, momentum=1e-4, nesterov=True, weight_decay=1e-4),
        augment=Augment(
            order=("long_side", "flip", "jitter", "normalize", "crop"),
            long_side=(320, 640),
            jitter=(0.3, 0.3, 0.3, 0.1),
            crop=512,
        ),
        weights=PRETRAINED,
        # published, although the names suggest the opposite: the sure foreground is larger than the possible one,
        # so that hardly any pixel is ignored (semformer.md section 8)
        label=EdgeLabel(threshold_fg=0.11, threshold_bg=0.15),
        walk=EdgeWalk(crf=_CRF),
    ),
    # from random weights, so nothing is frozen
    "sample": EdgeRecipe(
        amp="fast",
        network=EdgeOnlyOptions(resnet=SAMPLE_RESNET, radius=5),
        fit=Fit(epochs=10, batch_size=16, optimiser="adamw", lr=0.002, weight_decay=1e-4),
        augment=Augment(order=("long_side", "flip", "jitter", "normalize", "crop"), long_side=(112, 160), crop=112),
        # maps of networks trained from random weights are sharp: they are small away from the marks
        label=EdgeLabel(
            threshold_fg=0.03, threshold_bg=0.006, crf=CRFSettings(bilateral_sxy=30.0, bilateral_srgb=8.0)
        ),
        walk=EdgeWalk(logt=6, canvas=112, threshold=0.03, crf=_CRF),
    ),
    "photos": EdgeRecipe(
        amp="fast",
        network=EdgeOnlyOptions(backbone=PHOTOS, align_corners=False),
        fit=PHOTOS_EDGE_FIT,
        augment=PHOTOS_EDGE_AUGMENT,
        weights=CAM,
        label=PHOTOS_EDGE_LABEL,
        walk=EdgeWalk(background="otsu", logt=8, crf=replace(_CRF, iterations=5)),
    ),
}

"""A run's networks, with random initial weights or with trained ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from misc.precision import place
from net.contract import AffinityNetwork, Network, Phase, Refiner, SeedNetwork, Segmenter, SingleStage
from net.model import load_state
from net.released import load_released
from net.start_weights import PRETRAINED
from step.lib.config import Job


def build_network(job: Job, phase: Phase, earlier: Mapping[str, Network] | None = None) -> Network:
    """The network of a phase with random initial weights, which depend only on the run's seed."""
    torch.manual_seed(job.cfg.seed)
    network = phase.network.build(job.catalog.num_classes, earlier or {})
    network.set_class_texts(job.catalog.classes, job.texts())
    return network


def load_network(
    job: Job, name: str, phase: Phase, device: torch.device, earlier: Mapping[str, Network] | None = None
) -> Network:
    """The network of a phase with its trained weights, in evaluation mode on ``device``, ready to infer at the
    machine's precision.

    Raises FileNotFoundError if its step has not run, and ValueError if the file belongs to another network.
    """
    network = build_network(job, phase, earlier)
    load_state(network, job.run.weights(name))
    place(network, job.machine(phase, device), device)
    return network.eval()


def load_cam_network(job: Job, device: torch.device, kind: str = "") -> SeedNetwork:
    """The trained CAM network (the last phase), in evaluation mode; earlier phases have random weights. ``kind``: one
    of ``Job.further_weights`` instead. Raises as ``load_network``."""
    *before, (name, phase) = job.cfg.cam.phases()
    network = load_network(job, f"{name}.{kind}" if kind else name, phase, device, build_earlier(job, before))
    assert isinstance(network, SeedNetwork)
    return network


def build_earlier(job: Job, phases: Sequence[tuple[str, Phase]]) -> dict[str, Network]:
    """The networks of earlier phases by name, with random weights; needed to build the network for inference."""
    earlier: dict[str, Network] = {}
    for name, phase in phases:
        earlier[name] = build_network(job, phase, earlier)
    return earlier


def try_weights(job: Job, name: str, phase: Phase) -> None:
    """Load the files that a phase starts from or adopts into a network that is discarded. Weights of the name 'cam'
    are left out: the CAM network may not be trained yet.

    Raises ValueError or FileNotFoundError if they are damaged, do not fit or can't be fetched.
    """
    if not (phase.released or phase.start.files or phase.start.word == PRETRAINED):
        return
    phases = job.cfg.cam.phases()
    before = [n for n, _ in phases].index(name) if name in dict(phases) else 0
    network = build_network(job, phase, build_earlier(job, phases[:before]))
    if phase.released:
        load_released(network, phase.released_files)
    else:
        phase.start.load(network, job.run.weights("cam"))


def load_refiner(job: Job, device: torch.device) -> Refiner:
    """The refiner: trained, in evaluation mode, or one that needs no training. Raises as ``load_network``."""
    method = job.refine_method()
    if not issubclass(method, AffinityNetwork):
        return method()
    assert isinstance(job.cfg.aff, Phase)
    network = load_network(job, "aff", job.cfg.aff, device)
    assert isinstance(network, AffinityNetwork)
    return network


def load_segmentation_network(job: Job, device: torch.device) -> Segmenter | SingleStage:
    """The trained network that predicts masks, in evaluation mode; in a single-stage run the CAM network. Raises as
    ``load_network``."""
    network = load_cam_network(job, device) if job.single_stage else load_network(job, "seg", job.cfg.seg, device)
    assert isinstance(network, Segmenter | SingleStage)
    return network

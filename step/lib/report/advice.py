"""What the page tells to try, as flags that the run's configuration has and that act there."""

from __future__ import annotations

from typing import Any

from misc import commandline
from net.contract import Phase
from net.start_weights import NONE
from step.lib.config import Config


def train_longer(phase: Any, section: str) -> str:
    """"train longer (--cam.fit.epochs)", by what sets the length of the phase's training; empty if it has none.
    ``section``: cam or seg."""
    if not isinstance(phase, Phase) or not phase.is_trained:
        return ""
    return f"train longer (--{section}.fit.{'epochs' if phase.fit.steps is None else 'steps'})"


def mend_cams(cfg: Config) -> str:
    """What makes better CAMs; never empty."""
    told = [train_longer(cfg.cam, "cam")]
    if not cfg.cam.released and cfg.cam.start.word == NONE:
        told.append("start from trained weights (--cam.weights)")
    if not any(told) and cfg.cam.network.reads_class_texts:
        told.append("call the classes by other words (--texts)")
    return " or ".join(filter(None, told)) or "take another method, the first word of the command"


def mend_own_masks(cfg: Config) -> str:
    """What makes better masks of a CAM network that labels its own training images; never empty."""
    network = cfg.cam.network
    effective = {name for name, *_ in commandline.leaves(network, effective=True)} if cfg.cam.is_trained else set()
    flags = [commandline.flag(f"cam.network.{name}") for name in network.label_limits if name in effective]
    limited = f"change the limits of these labels ({', '.join(flags)})" if flags else ""
    return ", or ".join(filter(None, (mend_cams(cfg), limited)))

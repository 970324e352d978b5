"""Entropy of the layers of a trained AReAM network: ``python -m scripts.layer_entropy METHOD --run DIR [flags]``.

Takes the flags of run_sample.py, and a run folder in which train_cam has run, best with --cam.network.pair-weight 0
(classification only). Prints the flags for training a second run, in another run folder, with layers weighted by their
entropy (aream.md section 3).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from misc import commandline, distributed
from step import plan
from step.lib import entropy, parsing
from step.lib.config import open_job


def main(argv: Sequence[str]) -> None:
    """Print the entropies as a flag for run_sample.py."""
    cfg = parsing.parse(argv)
    measured = entropy.measure_entropy(open_job(cfg), distributed.start(cfg.machine.device))
    distributed.say("--cam.network.entropy", " ".join(f"{value:.9g}" for value in measured))
    distributed.stop()


if __name__ == "__main__":
    commandline.end(commandline.command(lambda: main(sys.argv[1:]), plan.PROBLEMS))

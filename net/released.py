"""Released checkpoints used without training: every tensor of the network must be in the file."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from net.contract import Network


@torch.no_grad()
def load_released(network: Network, files: Sequence[str]) -> str:
    """Load all tensors of a network from a released checkpoint in any known format with the official names, or from
    several files if its parts were released separately.

    The network's own loader reads the file. It is an error if a tensor is left unloaded, such as a classifier that
    training would start from random weights.

    Returns:
        A one-line report.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not fit, has only a part of the network, or has values that are not finite.
    """
    told = ", ".join(files)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.fill_(torch.nan)
    try:
        report = "; ".join(network.load_weights(file) for file in files)
        state = {name: value for name, value in network.state_dict().items() if value.is_floating_point()}
        lacking = [name for name, value in state.items() if bool(value.isnan().all()) and value.numel()]
        if lacking:
            shown = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
            raise ValueError(
                f"{told} does not contain a whole {type(network).__name__}: it lacks {shown}. To train from such a "
                "file, give it as the start weights."
            )
        bad = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
        if bad:
            raise ValueError(f"{told}: {bad[0]} holds values that are not finite. Download it again.")
    except Exception:
        network.load_state_dict(before)
        raise
    return report

"""Seconds an image that CLIP-ES' maps take: one by one, several images at once, and in the published form.

    python -m scripts.clip_seconds --size 375 500 --classes 2 --threads 2

ViT-B/16 with random weights, which take as long as trained ones. The published form keeps the attention of every block
and head, runs the last block anew for each class, and squares the transition matrix. Prints a line of JSON a form; the
rounds of all forms alternate, so that a busy machine slows all alike.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from misc.propagate.caa import doubly_stochastic, rectangle_mask, scale_to_unit
from net.backbone.transformer import QueryKey
from net.seed.clipes import Clipes, ClipesOptions


@dataclass(frozen=True)
class Timing:
    """What is timed."""

    size: tuple[int, int] = (375, 500)
    """Height and width of the images, rounded up to multiples of 16. Pixels."""
    classes: int = 2
    """Present classes of an image."""
    images: int = 4
    """Images that go through the network at once in the second form."""
    rounds: int = 3
    """Times that each form runs; the median is told."""
    threads: int = 2
    """Threads of PyTorch."""
    device: str = "cpu"
    """cpu or cuda."""


def plain_maps(network: Clipes, image: Tensor, present: Sequence[int]) -> Tensor:
    """The published form for one image (3, H, W), without what makes ours quick: (K, h, w), of the classes ``present``
    in their order."""
    clip, options = network.encoder, network.options
    kept: list[Tensor] = []

    def weights(seen: QueryKey) -> Tensor:
        return ((seen.query @ seen.key.transpose(2, 3)) / seen.query.shape[3] ** 0.5).softmax(-1)[0]  # (n, T, T)

    with torch.no_grad():
        tokens, grid = clip.visual.forward_features(image[None], lambda _, seen: kept.append(weights(seen)))
    block = clip.visual.transformer.resblocks[-1]
    raw = []
    for place in range(len(present)):
        last: list[Tensor] = []
        normalised = block.ln_1(tokens).detach().requires_grad_()
        output = block.after_norm(tokens.detach(), normalised, lambda seen, to=last: to.append(weights(seen)))
        feature = F.normalize((clip.visual.ln_post(output[0, 1:]).mean(0) @ clip.visual.proj)[None])[0]
        texts = torch.cat([clip.class_features[list(present)], clip.background_features])
        probability = (clip.logit_scale.exp() * texts @ feature).softmax(0)[place]
        gradient = torch.autograd.grad(probability, normalised)[0][0, 1:].mean(0)
        raw.append((normalised.detach()[0, 1:] @ gradient).clamp(min=0).view(grid))
    matrix = doubly_stochastic(torch.stack([*kept, *last][-options.blocks :]).mean((0, 1))[1:, 1:])
    matrix = matrix @ matrix
    spread = []
    for scores in map(scale_to_unit, map(scale_to_unit, raw)):
        inside = scores * torch.from_numpy(rectangle_mask(scores.cpu().numpy(), options.cut)).to(scores.device)
        spread.append(scale_to_unit((matrix @ inside.flatten()).view(grid)))
    return torch.stack(spread)


def main(timing: Timing) -> None:
    """Print the seconds of every form."""
    torch.set_num_threads(timing.threads)
    torch.manual_seed(0)
    network = Clipes(ClipesOptions(), timing.classes).to(timing.device).eval()
    network.set_class_texts([f"class {number}" for number in range(timing.classes)], {})
    network.to(timing.device)
    height, width = (-(-side // 16) * 16 for side in timing.size)
    images = torch.randn(timing.images, 3, height, width, device=timing.device)
    tags = torch.ones(timing.images, timing.classes, device=timing.device)
    forms: dict[str, Callable[[], object]] = {
        "one by one": lambda: [network.cam(images[n : n + 1], tags[n : n + 1]) for n in range(timing.images)],
        f"{timing.images} at once": lambda: network.cam(images, tags),
        "published form": lambda: [plain_maps(network, image, range(timing.classes)) for image in images],
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(timing.rounds + 1):
        for name, form in forms.items():
            begin = time.perf_counter()
            form()
            if timing.device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - begin) / timing.images)
    for name, found in seconds.items():
        told = {"form": name, "seconds an image": round(statistics.median(found[1:]), 3), "size": [height, width]}
        print(json.dumps({**told, "classes": timing.classes, "threads": timing.threads, "device": timing.device}))


if __name__ == "__main__":
    main(tyro.cli(Timing, description=__doc__))

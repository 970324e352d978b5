"""Golden cases of ToCo's updates and augmentation (toco.md sections 6 and 7). MoRe's (more.py) use ``Training``."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from misc.config import Fit
from misc.image.pixels import box_mask
from misc.infer.online import region_of_interest
from misc.loop.fit import make_rules, move_copies, set_lr
from net.losses import count_label_kinds
from net.seed.toco import Toco, crop_candidates
from net.shared.self_training import Term
from voc12.transforms import TrainSample, blur_sample, crop_sample, flip_sample, scale_sample

from .toco import close, drawn, given_draws, made, sampled_as, tags_of, toco, wrapping


class Training:
    """A case's updates by the loop's own parts; ``step`` runs one and compares what the case holds of it."""

    def __init__(self, case: Any, network: Any, groups: int) -> None:
        self.case, self.network, self.settings = case, network.train(), case.meta["settings"]
        s = self.settings
        self.fit = Fit(
            steps=s["max_iters"], optimiser="adamw", lr=s["lr"], weight_decay=s["weight_decay"], power=s["power"],
            schedule="warmup_poly", warmup_steps=s["warmup_iters"], warmup_ratio=s["warmup_ratio"],
        )  # fmt: skip
        self.groups = network.param_groups()
        assert len(self.groups) == groups
        names = {id(p): n for n, p in network.named_parameters()}
        self.names = [{names[id(p)] for p in group.params} for group in self.groups]
        self.rules = make_rules(self.groups, self.fit, torch.device("cpu"))
        (optimiser, _), = self.rules
        assert list(optimiser.defaults["betas"]) == s["betas"] and optimiser.defaults["eps"] == s["eps"]
        self.before = {name: value.clone() for name, value in network.state_dict().items()}

    def prepare(self, number: int, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        """What the loop does before the forward pass."""
        for optimiser, rule in self.rules:
            set_lr(optimiser, rule, number, self.settings["max_iters"])
        move_copies(self.network)
        batch.update(self.network.prepare(batch, progress))
        batch.update({f"counts/{name}": count for name, count in self.network.counts(batch).items()})
        return batch

    def step(self, number: int, terms: dict[str, Tensor], energy: Tensor) -> None:
        """Backward pass and update; compares total, energy, rates, gradients."""
        case, (optimiser, _) = self.case, self.rules[0]
        total = sum(terms.values())
        close(case, f"total{number}", total)
        close(case, f"energy{number}", energy)
        optimiser.zero_grad(set_to_none=True)
        total.backward()
        if f"lr{number}" in case.names:
            case.compare(f"lr{number}", np.array([g["lr"] for g in optimiser.param_groups]), relative=1e-6)
        norms = [torch.stack([p.grad.norm() for p in group.params]).norm() for group in self.groups]
        tolerance = case.meta["tolerance"]
        case.compare(f"grad_norms{number}", torch.stack(norms), relative=max(tolerance["rtol"], 0.002))
        parameters = dict(self.network.named_parameters())
        for name in case.names:
            head, _, parameter = name.partition(".")
            if head == f"grad{number}":
                grad = sampled_as(name, parameters[parameter].grad, case.stored(name))
                loose = tolerance.get("grad_decoder", {}).get("atol_relative_to_max_abs")
                close(case, name, grad, of_largest=loose if loose and parameter.startswith("decoder.") else None)
        optimiser.step()

    def finish(self) -> None:
        """Compares what the weights have changed by, and that every parameter that is trained was."""
        case, state = self.case, self.network.state_dict()
        delta = case.meta["tolerance"]["delta"]
        for name in case.names:
            head, _, parameter = name.partition(".")
            if head == "delta":
                change = 1e4 * (state[parameter] - self.before[parameter])
                case.compare(
                    name, sampled_as(name, change, case.stored(name)), of_largest=delta["atol_relative_to_max_abs"],
                    share=1 - delta["fraction_outside"],
                )  # fmt: skip
        stated = case.meta["groups"]
        frozen = [*stated.get("frozen", []), *stated["no_gradient"]]
        patterns = [re.compile(name.replace(".", r"\.").replace("*", ".*")) for name in frozen]
        for name, _ in self.network.named_parameters():
            assert any(name in group for group in self.names) != any(p.fullmatch(name) for p in patterns), name


@wrapping()
def check_toco_train_step(case: Any) -> None:
    """Updates from given pictures, boxes and draws."""
    s, tags, boxes = case.meta["settings"], tags_of(case), torch.tensor(case.meta["boxes"])
    weights = s["weights"]
    start = 2000 / 20000
    network = toco(
        case, high=s["high"], low=s["low"], temperature=s["temperature"], scales=tuple(s["scales"]),
        crop_side=s["local_crop"], crops=s["views"] - 2, ptc=Term(weights["ptc"]), ctc=Term(weights["ctc"]),
        seg=Term(weights["seg"], start), reg=Term(weights["reg"], start),
    )  # fmt: skip
    training = Training(case, network, 4)
    permutation = drawn(case, case.name + ".perm{}")
    for number, step in enumerate(s["n_iter"]):
        images, second, local = (made(case, f"{name}{{k}}", number) for name in ("image", "global", "local"))
        batch = {"image": images, "view/global": second, "view/local": local, "tags": tags, "box": boxes}
        progress = step / 20000
        maps, keys, real = network.online_maps(batch)
        with given_draws("net.seed.toco", permutation, len(images)):
            batch = training.prepare(number, batch, progress)
        region = region_of_interest(maps[1], s["high"], s["low"])
        picked = [
            [next(list(at) for at in crop_candidates(mask, s["local_crop"], 1).tolist()
                  if torch.equal(local[i, :, at[0] : at[0] + s["local_crop"], at[1] : at[1] + s["local_crop"]], one))
             for one in batch["crops"][i]]
            for i, mask in enumerate(region)
        ]  # fmt: skip
        case.compare(f"positions{number}", np.array(picked))
        close(case, f"flags{number}", batch["flags"].byte())
        close(case, f"grid{number}", batch["token_label"])
        label = network.decoder_labels(images, maps[0], keys, real)
        label = label.masked_fill(~box_mask(boxes, label.shape[-2:]), 255)
        close(case, f"label{number}", label)
        if "label" in batch:
            assert torch.equal(batch["label"], label)

        terms = network(batch, progress)
        # every term as if it had begun, and without its weight
        full = {**batch, "label": label, **{f"counts/{k}": v for k, v in count_label_kinds(label).items()}}
        with torch.no_grad():
            bare = network(full, 0.5)
        losses = [bare["cls"], bare["cls_aux"], *(bare[n] / weights[n] for n in ("ptc", "ctc", "seg"))]
        close(case, f"losses{number}", torch.stack(losses))
        training.step(number, terms, 1e7 * bare["reg"] / weights["reg"])
    training.finish()
    name = "after.proj_head_t.mlp.2.weight"
    close(case, name, sampled_as(name, network.proj_head_t.mlp[2].weight.detach(), case.stored(name)))


def check_toco_augment(case: Any) -> None:
    """Scaling, mirror, canvas, crop and box of given draws; blur."""
    side = int(re.search(r"crop (\d+)", case.meta["constructor"])[1])
    radius = float(re.search(r"radius ([\d.]+)", case.meta["outputs"]["blur0"]["meaning"])[1])
    for number, draws in enumerate(case.meta["draws"]):
        given = case.meta["input"][f"image{number}"]
        picture = (55 * case.fill.image(given["name"], *given["shape"]) + 120).round().clamp(0, 255)
        sample = TrainSample(picture[0].permute(1, 2, 0).byte().numpy())
        scale_sample(sample, draws["ratio"], Toco.recipes["published"].cam.augment.scale_filter)
        assert list(sample.image.shape[:2]) == draws["scaled"]
        if draws["flip_draw"] > 0.5:
            flip_sample(sample)
        crop_sample(sample, side, GivenPlaces(sample, draws, side))
        case.compare(f"crop{number}", sample.image, absolute=case.meta["tolerance"]["atol"], share=0.99)
        case.compare(f"box{number}", np.array(sample.box))
        blur_sample(sample, radius)
        close_pixels = sample.image[::2, ::2]
        case.compare(f"blur{number}", close_pixels, absolute=case.meta["tolerance"]["atol"], share=0.99)


class GivenPlaces:
    """Stands for the random stream of ``crop``: the case's offsets, rows first."""

    def __init__(self, sample: TrainSample, draws: dict[str, Any], side: int) -> None:
        starts = zip(sample.image.shape[:2], draws["start"], draws["pad"], strict=True)
        self.left = [start if length > side else pad for length, start, pad in starts]

    def integers(self, end: int) -> int:
        place = self.left.pop(0)
        assert 0 <= place < end
        return place

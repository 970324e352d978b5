"""Parameter groups for the optimiser, with the learning rates and weight decay of the published trainings."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from misc.loop.trainable import Group


def decay_groups(
    network: nn.Module, no_decay: Collection[str], heads: Collection[str] = (), head_lr: float = 10.0
) -> list[Group]:
    """The groups of timm's AdamW trainings (mctformer.md section 6, aream.md section 8).

    First the parameters without decay: one-dimensional ones, biases and those whose name is in ``no_decay``; then the
        rest; both at the base rate. Then the same two groups for the layers ``heads``, if any, at ``head_lr`` times
        that. Only trained parameters are included.
    """
    groups = [Group([], decay=False), Group([])]
    if heads:
        groups += [Group([], head_lr, False), Group([], head_lr)]
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim > 1 and not name.endswith(".bias") and name not in no_decay
            groups[plain + 2 * (name.rpartition(".")[0] in heads)].params.append(parameter)
    return groups


def conv_groups(network: nn.Module, new: Collection[str], head_lr: float = 10.0) -> list[Group]:
    """The four groups of the published ResNet38 and VGG16 trainings (seam.md section 4.2, psa.md section 2.3).

    In this order: weights of the pre-trained layers (base rate, decayed), their biases (twice the rate, not decayed),
    weights of the new layers (``head_lr`` times, decayed), their biases (twice that, not decayed); a group may be
    empty. Only trained parameters are included. Batch normalisation is frozen in the published trainings; if it is
    trained, its parameters are a fifth group (base rate, not decayed).

    Args:
        network: its layers are assigned in the order of its modules.
        new: names of the layers (or of modules that hold them) that are not pre-trained.
        head_lr: their learning rate relative to the base rate.
    """
    slow = [Group([]), Group([], 2.0, False)]
    groups = [*slow, Group([], head_lr), Group([], 2 * head_lr, False), Group([], 1.0, False)]
    for name, module in network.named_modules():
        is_new = any(name == n or name.startswith(f"{n}.") for n in new)
        for kind, parameter in module.named_parameters(recurse=False):
            place = 4 if isinstance(module, nn.BatchNorm2d) else 2 * is_new + (kind == "bias")
            if parameter.requires_grad:
                groups[place].params.append(parameter)
    return groups if groups[4].params else groups[:4]


def name_groups(network: nn.Module, pretrained: Collection[str], head_lr: float = 10.0) -> list[Group]:
    """The four groups of the published SemFormer and Puzzle-CAM trainings, assigned by name (semformer.md section 7).

    In this order: pre-trained parameters whose name contains "weight" (base rate, decayed), the other pre-trained ones
    (twice the rate, not decayed: biases, tokens and positions too), and the same two for the rest at ``head_lr`` times
    that. Only trained parameters are included; a group may be empty.

    Args:
        network: its parameters are assigned to groups.
        pretrained: a parameter is pre-trained if its name contains one of these.
        head_lr: learning rate of the rest relative to the base rate.
    """
    groups = [Group([]), Group([], 2.0, False), Group([], head_lr), Group([], 2 * head_lr, False)]
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            is_new = not any(part in name for part in pretrained)
            groups[2 * is_new + ("weight" not in name)].params.append(parameter)
    return groups

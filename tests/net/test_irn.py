"""IRNet: geometry and losses against plain forms, the walk on any grid, objects, and the published code's traps."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import plain
import pytest
import torch
from plain import picture_of
from torch import Tensor

from misc.config import override
from misc.crf.dense import CRFSettings
from misc.files import store
from misc.files.camfiles import read_cam, write_cam
from misc.image.cam import Cam
from misc.propagate import walk
from misc.propagate.walk import by_path_length, half_circle, pair_cells, pair_labels, path, path_affinity
from net.backbone.resnet import ResNetOptions
from net.refine import irn
from net.refine.irn import IRN, IRNOptions, IRNWalk, displacement_losses, find_centroids, find_clusters, make_instances
from net.seed.irn_cam import IRNCam, IRNCamOptions
from net.shared import edge
from net.shared.edge import EdgeLabel, enlarge_cells, hard_label, propagate_scores
from step.lib import parsing

TINY = ResNetOptions(width=0.125, depth=(1, 1, 1, 1), frozen="layer4")


def network(seed: int = 0, **options: object) -> IRN:
    torch.manual_seed(seed)
    return IRNOptions(**{"resnet": TINY, **options}).build(3, {}).eval()


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def soft_cam(height: int, width: int, keys: tuple[int, ...] = (0, 2)) -> Cam:
    maps = np.random.default_rng(0).random((len(keys), height, width), np.float32)
    return Cam.of_maps(np.array(keys, np.int64), maps)


# ------------------------------------------------------------------------------------------------ pairs


def test_paths_are_thick_lines_from_target_to_source() -> None:
    assert path((0, 2)) == [(0, 2), (0, 1), (0, 0)]
    assert sorted(path((1, 1))) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for displacement in half_circle(10):
        cells = path(displacement)
        assert cells[0] == displacement and cells[-1] == (0, 0) and len(set(cells)) == len(cells)
    lengths = [len(path(d)) for d in by_path_length(half_circle(10))]
    assert lengths == sorted(lengths) and len(lengths) == 152


@pytest.mark.slow
@pytest.mark.parametrize(("radius", "form"), [(None, "_PathMaximum"), (4, "_PathMaximum"), (4, "_GatheredPathMaximum")])
def test_affinities_and_their_gradient_are_the_plain_ones(
    radius: int | None, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "_PathMaximum", getattr(walk, form))  # the gathered form is for GPUs
    boundary = torch.rand(2, 8, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    displacements = by_path_length(half_circle(4))
    weights = torch.rand(10_000)
    results = []
    for function in (path_affinity, plain.path_affinity):
        affinity = function(boundary, displacements, radius).flatten(1)
        (affinity.pow(3) * weights[: affinity.shape[1]]).sum().backward()
        results.append((affinity.detach(), boundary.grad))
        boundary.grad = None
    (ours, gradient), (expected, wanted) = results
    assert torch.equal(ours, expected)
    torch.testing.assert_close(gradient, wanted)
    if radius is not None:
        assert path_affinity(boundary, displacements, radius).shape == (2, len(displacements), 5 * 3)


def test_a_boundary_between_two_cells_parts_them() -> None:
    boundary = torch.zeros(1, 5, 7)
    boundary[:, :, 3] = 0.9
    affinity = path_affinity(boundary, [(0, 2)])[0].view(5, 5)
    torch.testing.assert_close(affinity[0], torch.tensor([1.0, 0.1, 0.1, 0.1, 1.0]))


@pytest.mark.parametrize("together", [1, 5])
def test_displacement_losses_and_their_gradient_are_the_plain_ones(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(irn, "displacements_together", lambda kind: together)  # GPUs take many at a time
    torch.manual_seed(0)
    field = torch.randn(2, 2, 9, 11, requires_grad=True)
    target = torch.randint(0, 3, (2, 9, 11))
    target[:, :2] = 255
    displacements, radius = by_path_length(half_circle(4)), 4
    labels = pair_labels(target, radius, displacements)
    counts = {name: pairs.sum() for name, pairs in labels.items()}
    losses = displacement_losses(field, labels, counts, displacements, radius)
    (3 * losses["dp_fg"] + losses["dp_bg"]).backward()
    gradient, field.grad = field.grad, None

    source, goal = (cells.view(len(displacements), -1) for cells in pair_cells(displacements, 9, 11, radius=radius))
    flat = field.flatten(2)
    pairs = flat[:, :, source] - flat[:, :, goal]  # (B, 2, D, P)
    wanted = torch.tensor(displacements, dtype=torch.float32).T[:, :, None]
    fg = ((pairs - wanted).abs().sum(1) * labels["fg"]).sum() / (2 * counts["fg"] + 1e-5) / 2
    bg = (pairs.abs().sum(1) * labels["bg"]).sum() / (2 * counts["bg"] + 1e-5) / 2
    torch.testing.assert_close(losses["dp_fg"], fg)
    torch.testing.assert_close(losses["dp_bg"], bg)
    (3 * fg + bg).backward()
    torch.testing.assert_close(gradient, field.grad)


def test_losses_do_not_depend_on_how_the_batch_is_divided() -> None:
    """Their denominators are sums over the whole batch (irnet.md section 12, several GPUs)."""
    net = network().train()
    image, target = pictures(4, 48, 48), torch.randint(0, 3, (4, 12, 12), generator=torch.Generator().manual_seed(3))
    target[:2, :8] = 255
    counts = {f"counts/{name}": value.float() for name, value in net.counts({"target": target}).items()}
    whole = net({"image": image, "target": target, **counts}, 0.0)
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        shared = {name: value / 2 for name, value in counts.items()}  # what the loop hands back: the mean
        halves.append(net({"image": image[part], "target": target[part], **shared}, 0.0))
    for name, value in whole.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, value, rtol=1e-4, atol=1e-6)


def test_the_backbone_is_frozen_and_the_branches_are_two_groups() -> None:
    net = network(displacement_lr=10.0).train()
    assert not any(p.requires_grad for p in net.resnet50.parameters())
    boundary, displacement = net.param_groups()
    named = {p: name for name, p in net.named_parameters()}
    assert {named[p].split(".")[0][:7] for p in boundary.params} == {"fc_edge"} and boundary.lr_scale == 1
    assert {named[p].split(".")[0][:5] for p in displacement.params} == {"fc_dp"} and displacement.lr_scale == 10
    assert boundary.decay and displacement.decay


# ------------------------------------------------------------------------------------------------ labels


def test_foreground_wins_and_doubt_is_ignored() -> None:
    maps = np.zeros((2, 6, 8), np.float32)
    maps[0, :, :2], maps[1, :, 2:4], maps[0, :, 4:6] = 0.9, 0.4, 0.2
    options = EdgeLabel(crf=CRFSettings(0))
    picture, planes = IRN.make_label(np.zeros((6, 8, 3), np.uint8), Cam.of_maps(np.array([1, 4]), maps), options)
    assert picture[0].tolist() == [2, 2, 5, 5, 255, 255, 0, 0] and np.array_equal(planes[0], picture)
    assert hard_label(np.full((1, 1, 1), 0.3, np.float32), 0.3).item() == 0  # a tie is background
    nothing = Cam.of_maps(np.zeros(0, np.int64), np.zeros((0, 6, 8), np.float32))
    assert not IRN.make_label(np.zeros((6, 8, 3), np.uint8), nothing, options)[0].any()


def test_a_cell_takes_the_pixel_right_below_its_centre() -> None:
    planes = np.arange(64, dtype=np.uint8).reshape(1, 8, 8)
    assert IRN.make_target(planes).tolist() == [[18, 22], [50, 54]]
    with pytest.raises(ValueError, match="set augment.crop to a multiple of 4"):
        IRN.make_target(planes[:, :7])


# ------------------------------------------------------------------------------------------------ walk


@pytest.mark.parametrize("size", [(13, 17), (1, 9), (4, 3), (2, 2), (1, 1)])
def test_propagation_is_the_dense_one_on_any_grid(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    boundary, scores = torch.rand(size, generator=generator), torch.rand(3, *size, generator=generator)
    cells = boundary.numel()
    displacements = half_circle(5)
    source, target = pair_cells(displacements, *size)
    dense = torch.eye(cells)
    if len(source):
        affinity = plain.path_affinity(boundary[None], displacements, None)[0]
        dense = plain.dense_affinity(source, target, affinity, cells)
    expected = (scores * (1 - boundary)).flatten(1) @ plain.dense_transition(dense, 10, 8)
    walked = propagate_scores(scores, boundary, 5, 10, 256)
    torch.testing.assert_close(walked, expected.view_as(scores), rtol=1e-4, atol=1e-5)


def test_scores_stop_at_a_boundary() -> None:
    boundary = torch.full((12, 20), 0.01)
    boundary[:, 10] = 0.99
    scores = torch.zeros(1, 12, 20)
    scores[0, 5, 4] = 1
    walked = propagate_scores(scores, boundary, 5, 10, 256)[0]
    assert walked[:, :10].min() > 1e-3 and walked[:, 11:].max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("size", [(530, 40), (33, 517), (7, 5), (64, 64)])
def test_no_size_of_image_is_too_large_or_odd(size: tuple[int, int]) -> None:
    """Published cuts what is longer than 512 pixels and then fails (irnet.md section 12)."""
    net, cam = network(), soft_cam(*size)
    options = IRNWalk(logt=2, canvas=64)
    taps = net.forward_pair(pictures(1, *size)[0], options.canvas)
    canvas = [max(side, 64) for side in size]
    assert taps["stem"].shape[-2:] == tuple(-(-side // 4) for side in canvas)
    assert net.pair_boundary(taps, size).shape == tuple(-(-side // 4) for side in size)
    scores, found = net.find_instances(picture_of(pictures(1, *size)[0]), cam, options)
    assert scores.shape == (3, *size) and np.isfinite(scores).all() and scores[1:].max() == 1
    assert found.masks.shape[1:] == size and (scores[0] == 0.25).all()
    np.testing.assert_array_equal(net.refine(picture_of(pictures(1, *size)[0]), cam, options), scores)


def test_coarse_cams_go_before_those_at_image_size() -> None:
    maps = np.zeros((1, 8, 12), np.float32)
    coarse = np.random.default_rng(0).random((1, 2, 3), np.float32)
    cam = Cam.of_maps(np.array([0]), maps, coarse)
    assert cam.on_grid((2, 3)) is coarse and not cam.on_grid((3, 3)).any()
    assert Cam.of_maps(np.zeros(0, np.int64), np.zeros((0, 8, 12), np.float32)).on_grid((2, 3)).shape == (0, 2, 3)


def test_an_empty_cam_gives_finite_background() -> None:
    net = network()
    cam = Cam.of_maps(np.array([1]), np.zeros((1, 40, 40), np.float32))
    scores, found = net.find_instances(picture_of(pictures(1, 40, 40)[0]), cam, IRNWalk(logt=2, canvas=0))
    assert np.isfinite(scores).all() and (scores.argmax(0) == 0).all()
    assert len(found.masks) == 0  # published fails without a detection


def test_a_cam_of_another_image_is_refused() -> None:
    with pytest.raises(ValueError, match="make the CAM again"):
        network().refine(picture_of(pictures(1, 40, 40)[0]), soft_cam(40, 44), IRNWalk())


def test_the_crf_after_the_walk_is_an_option() -> None:
    net, cam, image = network(), soft_cam(40, 48), picture_of(pictures(1, 40, 48)[0])
    plainly = net.refine(image, cam, IRNWalk(logt=2, canvas=0))
    sharpened = net.refine(image, cam, IRNWalk(logt=2, canvas=0, crf=CRFSettings(1)))
    assert sharpened.shape == plainly.shape
    np.testing.assert_allclose(sharpened.sum(0), 1, atol=1e-5)


# ------------------------------------------------------------------------------------------------ objects


def two_middles(height: int, width: int, left: int, right: int) -> Tensor:
    """A displacement field that points to the nearer of two cells in the middle row."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    middle = torch.where(x < (left + right) // 2, left, right)
    return 0.5 * torch.stack([height // 2 - y, middle - x]).float()


def test_objects_of_one_class_are_separated() -> None:
    field = two_middles(11, 30, 6, 22)
    ends = find_centroids(field)
    assert ends[:, :, :14].unique(dim=1).shape[1] <= 3 and abs(int(ends[1, 5, 0]) - 6) <= 1
    numbers = find_clusters(field.numpy(), ends.numpy())
    assert len(np.unique(numbers)) == 2 and numbers[0, 2] != numbers[0, 27]
    maps = torch.zeros(1, 44, 120)
    maps[:, 8:36, 8:52] = maps[:, 8:36, 60:108] = 1  # one class, two objects
    cam = Cam.of_maps(np.array([4]), maps.numpy())
    boundary = torch.full((11, 30), 0.5)
    found = IRN.find_objects(field, boundary, cam, (44, 120), IRNWalk(logt=2))
    assert found.classes.tolist() == [4, 4] and (found.scores > 0.5).all()
    assert not (found.masks[0] & found.masks[1]).any()
    assert {bool(mask[20, 30]) for mask in found.masks} == {True, False}
    assert found.picture().max() == 2


def test_centroids_stay_inside_and_integer_places_are_exact() -> None:
    outwards = torch.full((2, 5, 7), 3.0)
    assert find_centroids(outwards)[0].unique().tolist() == [4] and find_centroids(outwards)[1].unique().tolist() == [6]
    still = torch.zeros(2, 5, 7)
    y, x = torch.meshgrid(torch.arange(5), torch.arange(7), indexing="ij")
    assert torch.equal(find_centroids(still), torch.stack([y, x]))


def test_small_pieces_stay_with_score_zero() -> None:
    scores = torch.zeros(2, 20, 20)
    scores[0, :10, :10], scores[1, 15, 15] = 1, 0.9
    found = make_instances(scores, np.array([3, 5]), (80, 80), 0.25)
    assert found.classes.tolist() == [3, 5]
    assert found.scores[0] == 1 and found.scores[1] == 0 and found.masks[1].sum() < 64
    assert enlarge_cells(scores, (77, 79)).shape == (2, 77, 79)


# ------------------------------------------------------------------------------------------------ traps


def test_the_mean_displacement_needs_no_whole_batch() -> None:
    """Fewer images than a batch leave the published code without a mean (and fewer than 20 stop it)."""
    net = network()
    net.mean_shift.running_mean.fill_(7)
    images = pictures(3, 48, 48)
    with torch.no_grad():
        net.train()
        wanted = net.displacement_field(net.resnet50.forward_stages(images)).mean((0, 2, 3))
        net.eval()
    net.calibrate([images[:2], images[2:]])
    torch.testing.assert_close(net.mean_shift.running_mean, wanted)
    shifted = net.displacement_field(net.resnet50.forward_stages(images))
    torch.testing.assert_close(shifted.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-5)
    net.calibrate([])
    assert net.mean_shift.running_mean.tolist() == [0, 0]


def test_published_numbers_that_are_easily_lost() -> None:
    """irnet.md sections 3, 5, 6, 9.4, 10 and 12."""
    cam, aff = IRNCam.recipes["published"].cam, IRN.recipes["published"]
    assert cam.fit.momentum == aff.fit.momentum == cam.fit.weight_decay == 1e-4
    assert cam.network.resnet.strides == (2, 2, 2, 1) and cam.network.resnet.dilations == (1, 1, 1, 1)
    assert cam.network.resnet.norm == "fixed" and cam.network.resnet.frozen == "layer2"
    assert (cam.infer.round_up, cam.infer.coarse, cam.infer.normalise, cam.infer.flip) == (16, 4, "max", True)
    assert (aff.network.radius, aff.walk.radius, aff.walk.canvas, aff.walk.logt) == (10, 5, 512, 8)
    assert (aff.label.threshold_fg, aff.label.threshold_bg, aff.walk.crf.iterations) == (0.30, 0.05, 0)
    assert aff.augment.scale_filter == "bicubic" and aff.augment.crop == 512 and aff.walk.instances


@pytest.mark.slow
def test_switches_are_switches_and_numbers_are_numbers() -> None:
    flags = ["irn_cam", "--preset", "published", "--data", "voc12"]
    changed = parsing.parse([*flags, "--aff.walk.no-instances", "--aff.walk.beta", "7", "--aff.walk.logt", "3",
                                "--cam.augment.crop", "256", "--cam.infer.scales", "1", "0.5"])  # fmt: skip
    walk = changed.aff.walk
    assert (walk.instances, walk.beta, walk.logt) == (False, 7.0, 3)
    assert changed.cam.augment.crop == 256 and changed.cam.infer.scales == (1.0, 0.5)
    assert parsing.parse([*flags, "--aff.walk.instances"]).aff.walk.instances is True


def test_crts_settings_are_overrides() -> None:
    recipe = override(
        IRN.recipes["published"],
        {"label.threshold_fg": 0.35, "label.threshold_bg": 0.15, "walk.instances": False},
    )
    assert not IRN.finds_instances(recipe.walk) and recipe.label.crf == IRN.recipes["published"].label.crf


def test_published_cam_files_with_tensors_are_read(tmp_path: Path) -> None:
    full = np.random.default_rng(0).random((2, 9, 12)).astype(np.float32)
    coarse = torch.rand(2, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy asks a tensor for its array
        np.save(tmp_path / "2007_000032.npy", {"keys": torch.tensor([2, 14]), "cam": coarse, "high_res": full})
    cam = read_cam(tmp_path / "2007_000032.npy")
    assert cam.keys.tolist() == [2, 14] and cam.size == (9, 12)
    np.testing.assert_array_equal(cam.maps, full)
    np.testing.assert_array_equal(cam.coarse, coarse.numpy())


def test_coarse_cams_survive_their_file(tmp_path: Path) -> None:
    maps, coarse = np.random.default_rng(0).random((2, 1, 8, 12), np.float32)[:, :, :, :]
    write_cam(tmp_path / "a.npz", Cam(np.array([3]), maps, (8, 12), coarse[:, :2, :3]))
    cam = read_cam(tmp_path / "a.npz")
    np.testing.assert_allclose(cam.coarse, coarse[:, :2, :3], atol=1e-3)
    write_cam(tmp_path / "b.npz", Cam(np.array([3]), maps, (8, 12)))
    assert read_cam(tmp_path / "b.npz").coarse is None
    with pytest.raises(ValueError, match="not finite"):
        write_cam(tmp_path / "c.npz", Cam(np.array([3]), maps, (8, 12), np.full((1, 2, 3), np.nan)))


# ------------------------------------------------------------------------------------------------ networks


def test_the_cam_network_trains_what_the_recipe_says() -> None:
    torch.manual_seed(0)
    net = IRNCamOptions(resnet=ResNetOptions(width=0.125, depth=(1, 1, 1, 1), frozen="layer2")).build(3, {}).train()
    statistics = net.resnet50.bn1.running_mean.clone(), net.resnet50.layer4[0].bn1.running_mean.clone()
    losses = net({"image": pictures(2, 48, 48), "tags": torch.eye(3)[:2]}, 0.0)
    losses["cls"].backward()
    moved = {name.split(".")[1] for name, p in net.named_parameters() if p.grad is not None and "resnet" in name}
    assert moved == {"layer3", "layer4"} and net.resnet50.layer4[0].bn3.weight.grad is not None
    assert torch.equal(net.resnet50.bn1.running_mean, statistics[0])
    assert torch.equal(net.resnet50.layer4[0].bn1.running_mean, statistics[1])
    backbone, head = net.param_groups()
    assert head.lr_scale == 10 and head.params == [net.classifier.weight] and head.decay and backbone.decay
    maps = net.eval().cam(pictures(1, 49, 33), torch.ones(1, 3))
    assert maps.shape == (1, 3, 4, 3) and maps.min() >= 0


def test_a_refiner_starts_from_the_cam_networks_backbone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cam = IRNCamOptions(resnet=TINY).build(3, {})
    store.write_weights(tmp_path / "cam.pt", cam.state_dict())
    net = network(seed=1)
    head = net.fc_edge1[0].weight.clone()
    whole = network(seed=2).state_dict()
    store.write_weights(tmp_path / "part.pt", {k: v for k, v in whole.items() if k != "fc_edge6.bias"})
    with pytest.raises(ValueError, match="a part of fc_edge., but not fc_edge6.bias"):
        net.load_weights(str(tmp_path / "part.pt"))
    net.load_weights(str(tmp_path / "cam.pt"))
    assert torch.equal(net.resnet50.layer2[0].conv1.weight, cam.resnet50.layer2[0].conv1.weight)
    assert torch.equal(net.fc_edge1[0].weight, head)


def test_the_convention_of_enlarging_is_an_option() -> None:
    nets = [edge.EdgeNetwork(IRNOptions(resnet=TINY, align_corners=aligned)).eval() for aligned in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    taps = nets[0].resnet50.forward_stages(pictures(1, 64, 64))
    with torch.no_grad():
        assert not torch.allclose(nets[0].edge_logits(taps), nets[1].edge_logits(taps))


@pytest.mark.parametrize("wrong", [{"radius": 1}, {"backbone": "resnest"}])
def test_options_refuse_impossible_values(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        IRNOptions(**wrong)


@pytest.mark.parametrize("wrong", [{"logt": 17}, {"beta": 0}, {"threshold": 2}, {"radius": 1}, {"canvas": -1},
                                   {"instance_threshold": -0.1}])  # fmt: skip
def test_walk_options_refuse_impossible_values(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        IRNWalk(**wrong)  # type: ignore[arg-type]


def test_label_options_refuse_what_is_no_score() -> None:
    with pytest.raises(ValueError, match="threshold_bg = 1.5"):
        EdgeLabel(threshold_bg=1.5)

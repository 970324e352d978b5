"""evaluation.py as a user runs it: options in, text, JSON and exit status out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation import main
from misc.files.images import write_mask
from misc.files.store import write_arrays
from misc.image.cam import Cam
from misc.score.erosion import erode
from misc.score.metrics import BoundaryConfusion, Confusion, mask_at

N = 4
IDS = [f"2007_{i:06d}" for i in range(12)]


class Data:
    """A small data set on disk: masks, maps at half size, ground truth."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.truth: dict[str, np.ndarray] = {}
        self.mask: dict[str, np.ndarray] = {}
        self.cam: dict[str, Cam] = {}
        (root / "train.txt").write_text("\n".join(f"/JPEGImages/{i}.jpg /SegmentationClass/{i}.png" for i in IDS))
        for number, name in enumerate(IDS):
            rng, size = np.random.default_rng(number), (20 + number, 31)
            truth = rng.choice(np.array([0, 0, 1, 2, 3, 255], np.uint8), size)
            mask = np.where(rng.random(size) < 0.7, truth, 1).astype(np.uint8)  # 255 in the prediction where in truth
            mask[0, 0] = 255
            half = rng.random((2, size[0] // 2, 15)).astype(np.float16)
            self.truth[name], self.mask[name] = truth, mask
            self.cam[name] = Cam(np.array([0, 2]), half.astype(np.float32), size)
            write_mask(root / "gt" / f"{name}.png", truth)
            write_mask(root / "png" / f"{name}.png", mask)
            write_arrays(root / "npz" / f"{name}.npz", keys=np.array([0, 2]), maps=half, size=np.array(size))
            (root / "npy").mkdir(exist_ok=True)
            full = {key: values for key, values in zip((0, 2), self.cam[name].full_maps(), strict=True)}
            np.save(root / "npy" / f"{name}.npy", full)

    def arguments(self, kind: str, *more: str) -> list[str]:
        paths = ["--list", f"{self.root}/train.txt", "--predict_dir", f"{self.root}/{kind}", "--gt_dir"]
        return [*paths, f"{self.root}/gt", "--type", kind, "--num_classes", str(N), *more]

    def confusion(self, masks: dict[str, np.ndarray]) -> Confusion:
        result = Confusion(N)
        for name, mask in masks.items():
            result.add(self.truth[name], mask)
        return result

    def cut(self, threshold: float) -> dict[str, np.ndarray]:
        return {name: mask_at((cam.keys, cam.full_maps()), threshold) for name, cam in self.cam.items()}

    def run(self, *arguments: str) -> dict:
        """The JSON of a run that must succeed."""
        assert main([*arguments, "--json", f"{self.root}/out.json"]) == 0
        return json.loads((self.root / "out.json").read_text())


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path)


def refuse(data: Data, capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    """The message of a run that must be refused before any work (status 2), or fail in it (1), and write nothing."""
    assert main([*arguments, "--json", f"{data.root}/out.json"]) == status
    assert not (data.root / "out.json").exists()
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("\nerror: ")
    return captured.err.removeprefix("\n")


def test_masks(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    (data.root / "names.txt").write_text("aeroplane\nbicycle\nbird\n")
    result = data.run(*data.arguments("png", "--classes", f"{data.root}/names.txt", "--split", "val"))
    confusion, boundary = data.confusion(data.mask), BoundaryConfusion(N)
    for name in IDS:
        boundary.add(data.truth[name], data.mask[name])
    assert result["confusion"] == confusion.matrix.tolist()
    assert result["predicted_void"] == confusion.counts[:N, N].tolist() and sum(result["predicted_void"]) > 0
    assert result["miou"] == pytest.approx(100 * confusion.miou())
    assert result["boundary_miou"] == pytest.approx(100 * boundary.miou())
    assert [c["name"] for c in result["classes"]] == ["background", "aeroplane", "bicycle", "bird"]
    assert (result["images"], result["split"], result["type"], result["threshold"]) == (12, "val", "png", None)
    out = capsys.readouterr().out
    table = out.split("\n\n")[0].splitlines()
    assert table[0].split() == ["class", "IoU", "precision", "recall", "boundary", "IoU"]
    values = [confusion.iou(), confusion.precision, confusion.recall, boundary.iou()]
    assert table[2].split() == ["aeroplane", *(f"{100 * v[1]:.2f}" for v in values)]
    assert len(set(map(len, table))) == 1  # aligned
    assert f"mIoU                         {100 * confusion.miou():.2f}\n" in out
    assert f"true class, a false positive of none ({sum(result['predicted_void'])} pixels)" in out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_curve_of_maps(data: Data, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    result = data.run(*data.arguments(kind, "--curve", "--no-boundary"))
    grid = [i / 100 for i in range(60)]
    mious = [100 * data.confusion(data.cut(t)).miou() for t in grid]
    assert [point["threshold"] for point in result["curve"]] == grid
    assert [point["miou"] for point in result["curve"]] == mious
    best = int(np.argmax(mious))
    assert (result["threshold"], result["miou"]) == (grid[best], mious[best])
    assert result["threshold_choice"] == "searched on train"
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "best" in line] == [f"{grid[best]:<6g}  {mious[best]:>6.2f}  <- best"]
    assert f"{grid[best]:g}, searched on train\n" in out


@pytest.mark.slow
def test_curve_limits_and_split(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ("--start", "0.1", "--end", "0.3", "--step", "0.1")
    result = data.run(*data.arguments("npz", "--curve", *limits, "--split", "dev", "--convention", "nanmean"))
    assert [point["threshold"] for point in result["curve"]] == [0.1, 0.2, 0.3]
    assert result["threshold_choice"] == "searched on dev" and result["convention"] == "nanmean"
    assert result["boundary_miou"] is not None
    assert "searched on dev" in capsys.readouterr().out


@pytest.mark.slow
def test_fixed_threshold(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    result = data.run(*data.arguments("npz", "--threshold", "0.4"))
    assert result["confusion"] == data.confusion(data.cut(0.4)).matrix.tolist()
    assert result["threshold_choice"] == "fixed" and "curve" not in result
    out = capsys.readouterr().out
    assert "0.4, fixed\n" in out and "searched" not in out
    assert "counting (0 of 4 classes occur nowhere)" in out
    arguments = data.arguments("npz", "--threshold", "0.4", "--num-classes", "9")
    data.run(*arguments)
    assert "counting (5 of 9 classes occur nowhere)" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_give_the_same(data: Data) -> None:
    one = data.run(*data.arguments("npz", "--curve", "--no-boundary"))
    assert data.run(*data.arguments("npz", "--curve", "--no-boundary", "--workers", "2")) == one


def test_missing_predictions(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    for name in IDS[1:]:
        (data.root / "png" / f"{name}.png").unlink()
    message = refuse(data, capsys, *data.arguments("png"))
    assert "11 of 12 predictions" in message and IDS[10] in message and IDS[11] not in message
    assert "--missing-as-background" in message
    result = data.run(*data.arguments("png", "--missing-as-background"))
    masks = {name: data.mask[name] if name == IDS[0] else np.zeros_like(data.truth[name]) for name in IDS}
    assert result["confusion"] == data.confusion(masks).matrix.tolist()
    assert result["missing_as_background"] == 11
    assert "11 images counted as background" in capsys.readouterr().out


@pytest.mark.slow
def test_missing_maps_are_background_at_every_threshold(data: Data) -> None:
    (data.root / "npz" / f"{IDS[3]}.npz").unlink()
    result = data.run(*data.arguments("npz", "--curve", "--missing-as-background"))
    cut = data.cut(result["threshold"]) | {IDS[3]: np.zeros_like(data.truth[IDS[3]])}
    assert result["confusion"] == data.confusion(cut).matrix.tolist()


@pytest.mark.slow
def test_erosion_is_asked_for_and_named(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    plain = data.run(*data.arguments("npz", "--threshold", "0.4"))
    assert plain["erosion"] == 0 and "eroded" not in capsys.readouterr().out
    for choice in (["--threshold", "0.4"], ["--curve", "--start", "0.4", "--end", "0.5", "--step", "0.1"]):
        result = data.run(*data.arguments("npz", *choice, "--erosion", "3"))
        cut = {name: erode(mask, 3) for name, mask in data.cut(result["threshold"]).items()}
        assert result["confusion"] == data.confusion(cut).matrix.tolist() != plain["confusion"]
        assert result["erosion"] == 3 and "regions eroded by 3 x 3 pixels" in capsys.readouterr().out


def test_missing_truth_is_never_background(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    (data.root / "gt" / f"{IDS[2]}.png").unlink()
    message = refuse(data, capsys, *data.arguments("png", "--missing-as-background"))
    assert "1 of 12 ground truths" in message and IDS[2] in message and "--gt-dir" in message


def test_faulty_images_are_reported_together(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    write_mask(data.root / "png" / f"{IDS[1]}.png", data.mask[IDS[1]][:, :-1])
    write_mask(data.root / "gt" / f"{IDS[4]}.png", data.truth[IDS[4]] | 4)
    write_mask(data.root / "png" / f"{IDS[5]}.png", np.full_like(data.mask[IDS[5]], 9))
    (data.root / "png" / f"{IDS[6]}.png").write_bytes(b"no image")
    Image.new("RGB", (31, 27), (1, 2, 3)).save(data.root / "png" / f"{IDS[7]}.png")
    message = refuse(data, capsys, *data.arguments("png"), status=1)
    lines = message.strip().splitlines()
    assert len(lines) == 6 and "5 images" in lines[0]
    assert f"png/{IDS[1]}.png" in lines[1] and "21 x 30" in lines[1] and "21 x 31" in lines[1]
    assert f"gt/{IDS[4]}.png" in lines[2] and "[4, 5, 6, 7]" in lines[2] and "number of classes" in lines[2]
    assert f"png/{IDS[5]}.png" in lines[3] and "[9]" in lines[3]
    assert IDS[6] in lines[4] and IDS[7] in lines[5]


@pytest.mark.slow
def test_size_of_maps_is_checked(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    write_arrays(
        data.root / "npz" / f"{IDS[0]}.npz", keys=np.array([0]), maps=np.zeros((1, 5, 5)), size=np.array([5, 5])
    )
    for choice in (["--curve"], ["--threshold", "0.3"]):
        assert "5 x 5" in refuse(data, capsys, *data.arguments("npz", *choice), status=1)


def test_number_of_classes_counts_the_background(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = data.arguments("npz", "--threshold", "0.2")
    arguments[arguments.index("--num_classes") + 1] = "3"
    message = refuse(data, capsys, *arguments, status=1)
    assert "12 images" in message and "counts the background" in message and "2 more" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "more", "text"),
    [
        ("png", ["--curve"], "no background score"),
        ("png", ["--threshold", "0.2"], "no background score"),
        ("npz", [], "--threshold T or --curve"),
        ("npz", ["--curve", "--threshold", "0.2"], "--threshold T or --curve"),
        ("npz", ["--curve", "--step", "0"], "--step"),
        ("npz", ["--curve", "--step", "nan"], "positive --step"),
        ("npz", ["--curve", "--end", "inf"], "--end above --start"),
        ("npz", ["--curve", "--step", "1e-9"], "5.9e+08 background scores, 10000 are the most"),
        ("npz", ["--threshold", "nan"], "--threshold nan must be a finite number"),
        ("png", ["--num-classes", "1"], "--num-classes"),
        ("png", ["--erosion", "7"], "--erosion 7"),
        ("npz", ["--curve", "--erosion", "4"], "must be odd"),
        ("png", ["--list", "nowhere.txt"], "nowhere.txt"),
        ("png", ["--classes", "{root}/train.txt"], "12 names"),
    ],
)
def test_impossible_options(
    data: Data, capsys: pytest.CaptureFixture[str], kind: str, more: list[str], text: str
) -> None:
    arguments = [*data.arguments(kind), *(part.format(root=data.root) for part in more)]  # the last of an option counts
    assert text in refuse(data, capsys, *arguments)


def test_wrong_names_of_classes_and_a_folder_for_the_results(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    path, arguments = data.root / "names.txt", data.arguments("png")
    several = [f"class {n}" for n in range(1, N)]
    for names, told in (([*several, "background"], "must be the first"), (["cat", *several[1:], "cat"], "twice")):
        path.write_text("\n".join(names))
        message = refuse(data, capsys, *arguments, "--classes", str(path))
        assert told in message and str(path) in message
    assert main([*arguments, "--json", str(data.root)]) == 2
    assert "is a folder: give the file to write" in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    shown = capsys.readouterr().out
    paths = ["list", "predict-dir", "gt-dir", "classes", "json"]
    maps = ["type", "curve", "threshold", "start", "end", "step"]
    rest = ["num-classes", "no-boundary", "missing-as-background", "convention", "split", "workers"]
    for option in [*paths, *maps, *rest]:
        assert f"--{option} " in shown or f"--{option}," in shown or f"--{option}\n" in shown
    assert "INCLUDING the background" in shown
    assert caught.value.code == 0


@pytest.mark.slow
def test_failure_has_a_non_zero_exit_status() -> None:
    script = Path(__file__).parents[1] / "evaluation.py"
    bad = [sys.executable, script, "--list", "no.txt", "--predict-dir", ".", "--gt-dir", ".", "--num-classes", "3"]
    failed = subprocess.run(bad, capture_output=True, text=True)
    assert failed.returncode == 2 and "no.txt" in failed.stderr and "Traceback" not in failed.stderr

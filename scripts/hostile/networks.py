"""Hostile weights files, resume points and start weights of this project's own form."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

from scripts.hostile.cases import ONE, Bench, Data, HostileFile, Must
from scripts.hostile.formats import Evil, directory, later, pickled_code, pipe, saved

Tensors = dict[str, torch.Tensor]


def _read(bench: Bench, name: str) -> dict[str, Any]:
    return torch.load(io.BytesIO(bench.made(f"weights/{name}.pt")), weights_only=True)


def spoiled(state: Tensors, value: float, one: bool = False) -> Tensors:
    """A state dict with a value in all of its numbers, or in one."""
    if not one:
        return {k: torch.full_like(v, value) if v.is_floating_point() else v for k, v in state.items()}
    out = {k: v.clone() for k, v in state.items()}
    next(v for v in out.values() if v.ndim == 4).view(-1)[0] = value
    return out


def _deflated_bomb(file: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(file)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            new.writestr(item.filename, bytes(1 << 30) if item.filename.endswith("/data/0") else old.read(item))
    return out.getvalue()


def _predict(bench: Bench, name: str, data: Data, must: Must = "refuse") -> HostileFile:
    argv = [word for word in bench.predict if word != "--fast"] if "scale" in name else bench.predict
    build = bench.in_predict(f"{ONE}.jpg", bench.photo, data)
    return HostileFile("weights", f"{name} (predict)", "predict.py", argv, build, must, "seg.pt", heavy="GB" in name)


def weight_cases(bench: Bench) -> Iterator[HostileFile]:
    """Weights of the segmentation network, read by predict.py: their tensors and the file."""
    seg = _read(bench, "seg")
    state, text, file = seg["model"], seg["description"], bench.made("weights/seg.pt")
    first = next(k for k, v in state.items() if v.ndim == 4)

    def model(tensors: Any) -> bytes:
        return saved({"model": tensors, "description": text})

    buffers = {k: torch.full_like(v, float("nan")) if "running_var" in k else v for k, v in state.items()}
    rows: list[tuple[str, Data, Must]] = [
        ("code", saved({"model": Evil(), "description": "{}"}), "refuse"),
        ("code, old format", saved({"model": Evil(), "description": "{}"}, legacy=True), "refuse"),
        ("bare pickle with code", pickled_code(), "refuse"),
        ("all NaN", model(spoiled(state, float("nan"))), "refuse"),
        ("one NaN", model(spoiled(state, float("nan"), one=True)), "refuse"),
        ("one infinite", model(spoiled(state, float("inf"), one=True)), "refuse"),
        ("NaN in the buffers", model(buffers), "refuse" if any("running_var" in k for k in state) else "any"),
        ("no description", saved({"model": state}), "refuse"),
        ("bare state dict", saved(state), "refuse"),
        ("a list", saved([1, 2]), "refuse"),
        ("a tensor", saved(torch.zeros(3)), "refuse"),
        ("model is a number", model(3), "refuse"),
        ("model is a list", model([1]), "refuse"),
        ("values are numbers", model(dict.fromkeys(state, 1.0)), "refuse"),
        ("names are numbers", model(dict(enumerate(state.values()))), "refuse"),
        ("complex tensors", model({k: v.to(torch.complex64) for k, v in state.items()}), "refuse"),
        ("integer tensors", model({k: v.to(torch.int8) for k, v in state.items()}), "any"),
        ("sparse tensors", model({k: v.to_sparse() if v.ndim else v for k, v in state.items()}), "any"),
        ("meta tensors", model({k: v.to("meta") for k, v in state.items()}), "refuse"),
        ("one tensor of another shape", model({**state, first: torch.zeros(3)}), "refuse"),
        ("one tensor missing", model({k: v for k, v in state.items() if k != first}), "refuse"),
        ("one tensor more", model({**state, "evil": torch.zeros(3)}), "refuse"),
        ("stretched from one value", model({k: torch.zeros(()).expand(v.shape) for k, v in state.items()}), "any"),
        ("half-precision", model({k: v.half() if v.is_floating_point() else v for k, v in state.items()}), "any"),
        ("a deflated bomb of 1 GB", later(lambda: _deflated_bomb(file)), "refuse"),
        ("cut", file[: len(file) // 2], "refuse"),
        ("a CAM network", bench.made("weights/cam.pt"), "refuse"),
        ("a web page", b"<html>404</html>", "refuse"),
        ("empty", b"", "refuse"),
        ("a named pipe", pipe, "refuse"),
        ("a folder", directory, "refuse"),
    ]
    for name, data, must in rows:
        yield _predict(bench, name, data, must)


def description_cases(bench: Bench) -> Iterator[HostileFile]:
    """Descriptions in weights files: classes, method and recipe."""
    seg = _read(bench, "seg")
    about = json.loads(seg["description"])

    def described(text: Any) -> bytes:
        return saved({"model": seg["model"], "description": text})

    for name, text in {
        "no JSON": "{", "a list": "[1]", "a number": 3, "5000 brackets deep": "[" * 5000 + "]" * 5000,
        "200000 brackets": "[" * 200000,
    }.items():  # fmt: skip
        yield _predict(bench, f"description: {name}", described(text))

    width = next((k for k in about["recipe"] if k.endswith("width") and "late" not in k), "network.resnet38.width")
    fields: list[tuple[str, Any, Must]] = [
        ("classes", [], "refuse"), ("classes", 7, "refuse"), ("classes", [1, 2], "any"),
        ("classes", ["a", "b", "c"], "refuse"), ("classes", ["a"] * 1_000_000, "refuse"), ("classes", "ab", "any"),
        ("classes", None, "refuse"), ("classes", ["a", "a"], "any"), ("method", "evil", "refuse"),
        ("method", ["evil"], "refuse"), ("preset", "evil", "any"), ("preset", [], "refuse"),
        ("recipe", {}, "refuse"),
        ("recipe", "x", "refuse"), ("part", "evil", "refuse"), ("part", ["seg"], "refuse"),
        ("normalisation", {"name": "x"}, "refuse"), ("normalisation", "DELETE", "refuse"),
    ]  # fmt: skip
    for key, value, must in fields:
        changed = {**about, key: value}
        if value == "DELETE":
            del changed[key]
        yield _predict(bench, f"{key} = {str(value)[:20]}", described(json.dumps(changed)), must)
    settings: list[tuple[str, Any, Must]] = [
        ("evil", 1, "any"), (width, 200.0, "refuse"), (width, float("nan"), "refuse"), (width, "1", "refuse"),
        ("infer.scales", [], "refuse"), ("infer.scales", [1e6], "refuse"), ("infer.scales", [0.0], "refuse"),
        ("infer.scales", [-1.0], "refuse"), ("infer.scales", [float("nan")], "refuse"), ("augment.crop", 0, "refuse"),
        ("augment.crop", "x", "refuse"),
    ]  # fmt: skip
    for key, value, must in settings:
        changed = {**about, "recipe": {**about["recipe"], key: value}}
        yield _predict(bench, f"recipe: {key} = {str(value)[:20]}", described(json.dumps(changed)), must)


def cam_cases(bench: Bench) -> Iterator[HostileFile]:
    """Weights of the CAM network: of predict.py --tags, of make_cam, and as start weights."""
    cam = _read(bench, "cam")
    file, about = bench.made("weights/cam.pt"), json.loads(cam["description"])

    def classes(*names: str) -> bytes:
        return saved({"model": cam["model"], "description": json.dumps({**about, "classes": names})})

    climbing, letters = "../../../../EXECUTED/x", "y" * 300
    for name, tag, data in (
        ("climbs", climbing, classes(climbing, "b\0\x1b[31m")),
        ("has control characters", bench.tag, classes(bench.tag, "b\n\x1b[31m")),
        ("of 300 letters", letters, classes(letters, "b")),
    ):
        argv = [*bench.predict_tags, "--tags", tag]
        yield HostileFile("weights", f"class name {name} (predict --tags)", "predict.py", argv, bench.in_tagged(data))
    for text, must in {
        '{"CAM": {"threshold": "x"}}': "refuse", '{"CAM": {"threshold": NaN}}': "refuse", "[]": "refuse",
        '{"CAM": {"threshold": null}}': "any", '{"CAM": 3}': "refuse", '{"CAM": {"thr': "refuse",
        '{"CAM": {"threshold": 7}}': "refuse",
    }.items():  # fmt: skip
        build = bench.in_tagged(file, lambda cwd, text=text: (cwd / "run/scores.json").write_text(text))  # type: ignore[misc]
        argv = [*bench.predict_tags, "--tags", bench.tag]
        yield HostileFile("scores.json", f"{text} (predict --tags)", "predict.py", argv, build, must, "scores.json")  # type: ignore[arg-type]

    rows: list[tuple[str, bytes, Must, Must]] = [
        ("cut", file[:5000], "refuse", "any"),
        ("code", saved({"model": Evil(), "description": "{}"}), "refuse", "refuse"),
        ("all NaN", saved({**cam, "model": spoiled(cam["model"], float("nan"))}), "refuse", "refuse"),
        ("a segmentation network", bench.made("weights/seg.pt"), "refuse", "any"),
        ("a list", saved([1]), "refuse", "refuse"),
        ("description empty", saved({**cam, "description": "{}"}), "any", "any"),
        ("values are numbers", saved({**cam, "model": dict.fromkeys(cam["model"], 1)}), "refuse", "refuse"),
    ]
    for name, data, in_run, at_start in rows:
        yield HostileFile("weights", f"cam.pt: {name} (run, make_cam)", "run_sample.py", [*bench.run, "--steps", "2"],
                   bench.in_run("weights/cam.pt", data, "make_cam"), in_run, "cam.pt")  # fmt: skip
        yield HostileFile("weights", f"start weights: {name}", "run_sample.py", [*bench.start, "--cam.weights", "w.pt"],
                   bench.in_start("w.pt", data), at_start, "w.pt")  # fmt: skip


def resume_cases(bench: Bench) -> Iterator[HostileFile]:
    """Resume points, as a killed training leaves them (none where BASE/resume.pt is absent)."""
    path = bench.base / "resume.pt"
    if not path.exists():
        return
    point = torch.load(path, weights_only=True)
    changes: list[tuple[str, dict[str, Any]]] = [
        *((f"step {value}", {"step": value}) for value in (-5, 10**9, "x", float("nan"))),
        ("identity no JSON", {"identity": "{"}), ("identity a list", {"identity": "[]"}),
        ("no optimisers", {"optimisers": []}), ("optimisers a number", {"optimisers": 3}),
        ("optimiser empty", {"optimisers": [{}]}), ("network empty", {"network": {}}),
        ("network NaN", {"network": spoiled(point["network"], float("nan"))}), ("scaler a text", {"scaler": "x"}),
    ]  # fmt: skip
    rows: list[tuple[str, bytes]] = [(name, saved({**point, **change})) for name, change in changes]
    rows += [
        ("network gone", saved({k: v for k, v in point.items() if k != "network"})), ("code", saved({"a": Evil()})),
        ("cut", path.read_bytes()[:9000]), ("a list", saved([1])), ("empty", b""),
    ]  # fmt: skip
    for name, data in rows:
        must: Must = "any" if name.startswith("scaler") else "refuse"
        build = bench.in_run("weights/cam.resume.pt", data, "train_cam")
        argv = [*bench.run, "--steps", "1"]
        yield HostileFile("resume point", name, "run_sample.py", argv, build, must, "cam.resume.pt")


def all_network_cases(bench: Bench) -> Iterator[HostileFile]:
    """Weights files, their descriptions, CAM networks and resume points."""
    for make in (weight_cases, description_cases, cam_cases, resume_cases):
        yield from make(bench)

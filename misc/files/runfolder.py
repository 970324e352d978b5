"""The run folder: paths of every step's files, their configuration and their scores (docs/design.md section 5)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from misc import distributed
from misc.files import atomic, store
from misc.files.ids import result_path
from misc.files.schema import Each, Number, Usual, fill

_OCCUPIED: dict[Path, IO[str]] = {}
"""Open lock files of the run folders in which this process works."""
_BUSY = "another process"


class OtherConfiguration(ValueError):
    """The run folder was made by another configuration."""


class RunFolder:
    """Paths and records of one run.

    ``run.json``: configuration, command, seed, versions, git commit, fingerprint of the lists, time and peak memory of
    every step. ``scores.json``: every score with its provenance.
    """

    def __init__(self, root: Path):
        self.root = Path(root)
        self._step: str | None = None

    def weights(self, name: str) -> Path:
        """State dict of a trained network: cam, aff, seg, or a phase of a method; cam.KIND for further ones of the same
        training, such as cam.last."""
        return self.root / "weights" / f"{name}.pt"

    def cam(self, image_id: str, kind: str = "") -> Path:
        """CAMs of an image (write_cam); of the network cam.KIND where a kind is named."""
        return self._file(f"cam_{kind}" if kind else "cam", image_id, ".npz")

    def aff_label(self, image_id: str) -> Path:
        """Affinity label of an image, as a picture."""
        return self._file("aff_label", image_id, ".png")

    def aff_planes(self, image_id: str) -> Path:
        """Label planes of an image for the affinity network's training."""
        return self._file("aff_label", image_id, ".npz")

    def label(self, image_id: str) -> Path:
        """Pseudo mask of an image."""
        return self._file("label", image_id, ".png")

    def instance(self, image_id: str) -> Path:
        """Objects of an image (instances.write_instances)."""
        return self._file("instance", image_id, ".npz")

    def instance_picture(self, image_id: str) -> Path:
        """Objects of an image, as a picture."""
        return self._file("instance", image_id, ".png")

    def seg(self, image_id: str) -> Path:
        """Predicted mask of an image."""
        return self._file("seg", image_id, ".png")

    def seg_before_crf(self, image_id: str) -> Path:
        """Predicted mask of an image before the CRF."""
        return self._file("seg_before_crf", image_id, ".png")

    def box(self, image_id: str, kind: str = "") -> Path:
        """Boxes found in an image, and their scores; of the network cam.KIND where a kind is named."""
        return self._file(f"box_{kind}" if kind else "box", image_id, ".npz")

    def overlay(self, mask: Path) -> Path:
        """Overlay of a mask of this folder on its image: the same path in label_overlay or seg_overlay, a JPEG."""
        kind, *rest = mask.relative_to(self.root).parts
        return self.root.joinpath(f"{kind}_overlay", *rest).with_name(mask.stem + ".jpg")

    def full(self, mask: Path) -> Path:
        """A mask of this folder at the size of a large image's file: the same path in label_full or seg_full."""
        kind, *rest = mask.relative_to(self.root).parts
        return self.root.joinpath(f"{kind}_full", *rest)

    @property
    def log(self) -> Path:
        """TensorBoard folder."""
        return self.root / "log"

    @property
    def checked_images(self) -> Path:
        """Images that were found whole before a training, so that they are not looked at again."""
        return self.root / "checked_images.json"

    @property
    def report(self) -> Path:
        """The report page."""
        return self.root / "report.html"

    def _file(self, folder: str, image_id: str, suffix: str) -> Path:
        return result_path(self.root / folder, image_id, suffix)

    # --- run.json -------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """Content of run.json ({} for a new folder); what it lacks is empty."""
        path = self.root / "run.json"
        return fill(store.read_json(path, _RECORD), _RECORD) if path.exists() else {}

    def begin(
        self, config: dict[str, Any], machine: dict[str, Any], data: dict[str, Any], force: bool,
        data_root: Path | None = None, free: Sequence[str] = (), shared: bool = False,
    ) -> bool:
        """Record what this run is, and lock the folder for this process; called once before any work, by every process.

        Args:
            config: flat resolved configuration, of the settings that have an effect; it must equal the recorded one.
            machine: flat settings that may differ between calls.
            data: what the lists hold: name of list -> fingerprint; under 'texts' the words for classes, if any are
                read. Must equal the recorded one too.
            force: record the present configuration over a differing one.
            data_root: folder of the data set, recorded for scripts that look at the run later.
            free: beginnings of names of settings that may differ, because nothing was made with them yet.
            shared: other processes that share the folder may run at the same time (parts of the images), all with the
                recorded configuration.

        Returns:
            Whether a differing configuration was overwritten.

        Raises:
            OtherConfiguration: the folder holds a run of another configuration (the differing fields are listed), or
                another process is at work in it.
        """
        config = json.loads(json.dumps(config))
        self.record()  # a damaged one is an error in every process
        refused: list[str] = []
        if distributed.is_main():
            busy = not self._occupy(shared)
            with self._locked():
                record = self.record()
                refused = self._differing(record, config, data, free)
                if refused and force and shared:  # not while others work with the recorded one
                    busy = busy or not (self._occupy(False) and self._occupy(True))
                if not busy and (not refused or force):
                    record.update(
                        config=config, data=data, machine=json.loads(json.dumps(machine)),
                        world_size=distributed.world(),
                        command=[*record.get("command", []), shlex.join(sys.argv)],
                        versions=_versions(), git_commit=_git_commit(),
                    )
                    if data_root is not None:
                        record["data_root"] = str(data_root.resolve())
                    record.setdefault("steps", {})
                    store.write_json(self.root / "run.json", record)
            refused = [*refused, *([_BUSY] if busy else [])]
        refused = distributed.joined(refused)
        if _BUSY in refused:
            raise OtherConfiguration(
                f"{self.root}: another process is at work in this run folder. Wait until it has ended, or use another "
                "--out folder. (Parts of the images can be made at the same time: --shard.)"
            )
        if refused and not force:
            raise OtherConfiguration(
                f"{self.root} holds a run of another configuration (its run.json):\n{_shortened(refused)}\n"
                "Use another --out folder, give the recorded settings, or say --force to go on in it (finished steps "
                "are kept as they are)."
            )
        return bool(refused)

    def _occupy(self, shared: bool) -> bool:
        """Lock the folder until this process ends; whether that was possible. Several processes may share it."""
        if fcntl is None:  # Windows
            return True
        self.root.mkdir(parents=True, exist_ok=True)
        place = self.root.resolve()
        if place not in _OCCUPIED:
            _OCCUPIED[place] = (self.root / ".running").open("a+")
        try:  # belongs to this process alone: worker processes that outlive it do not hold it
            fcntl.lockf(_OCCUPIED[place], (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EAGAIN)  # others: a file system without locks
        return True

    @staticmethod
    def _differing(
        record: dict[str, Any], config: dict[str, Any], data: dict[str, Any], free: Sequence[str]
    ) -> list[str]:
        """A line for each setting in which a record and the present configuration differ; none for a new folder."""
        if not record:
            return []
        wanted = {**config, **{f"data.{k}": v for k, v in data.items()}}
        there = {**record["config"], **{f"data.{k}": v for k, v in record["data"].items()}}
        # settings that are only there have no effect here; if they had one there, another setting differs too
        names = sorted({*wanted, *(k for k in there if k.startswith("data."))})
        differing = [k for k in names if wanted.get(k) != there.get(k) and not k.startswith(tuple(free))]
        return [f"  {k}: {there.get(k)!r} there, {wanted.get(k)!r} now" for k in differing]

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        """Lock held while run.json or scores.json is read and rewritten: parallel jobs (--shard) share them."""
        return atomic.locked(self.root / ".lock")

    def check_cams(self, config: dict[str, Any], data: dict[str, Any]) -> None:
        """Check that another run can use the CAMs of this one.

        Args:
            config, data: of that run, as for ``begin``.

        Its list may be longer than that run's: what is needed is checked by the caller.

        Raises:
            FileNotFoundError: there is no run here, or it has no CAMs yet.
            OtherConfiguration: it has other settings of the CAM network, or other data.
        """
        if not all(self.finished(step) for step in ("train_cam", "make_cam")):
            raise FileNotFoundError(f"--cams {self.root}: no run with finished steps train_cam and make_cam is there.")
        record, wanted = self.record(), json.loads(json.dumps(config))
        there = {**record["config"], **{f"data.{k}": v for k, v in record["data"].items()}}
        wanted |= {f"data.{k}": data.get(k) for k in {*record["data"], "texts"} & {*data, "texts"}}
        decisive = [k for k in wanted if k in ("method", "seed") or k.startswith(("cam.", "data."))]
        differing = [k for k in decisive if there.get(k) != wanted[k]]
        if differing:
            lines = _shortened([f"  {k}: {there.get(k)!r} there, {wanted[k]!r} now" for k in differing])
            raise OtherConfiguration(
                f"--cams {self.root}: its CAMs have other settings or data:\n{lines}\nGive the settings that they were "
                "made with, or make CAMs of this run's own: leave --cams out."
            )

    def adopt_cams(self, source: RunFolder, networks: Iterable[str]) -> None:
        """Take the CAM networks of these names and the CAMs from another run, as links (or copies if links are
        impossible); existing files stay."""
        pairs = [(source.weights(name), self.weights(name)) for name in networks]
        maps = [path for folder in ("cam", "cam_last") for path in sorted((source.root / folder).glob("*.npz"))]
        pairs += [(path, self.root / path.relative_to(source.root)) for path in maps]
        for path, target in pairs:
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(path, target)  # safe: files are replaced, never changed
                except OSError:
                    store.write_bytes(target, path.read_bytes())

    def finished(self, step: str) -> bool:
        """Whether a step is recorded as done."""
        return bool(self.record().get("steps", {}).get(step, {}).get("done"))

    def forget(self, step: str) -> None:
        """Remove a step's record and its scores."""
        with self._locked():
            record = self.record()
            if record.get("steps", {}).pop(step, None):
                store.write_json(self.root / "run.json", record)
            scores = self._stored_scores()
            kept = {name: score for name, score in scores.items() if score.get("step") != step}
            if len(kept) < len(scores):
                store.write_json(self.root / "scores.json", kept)

    @contextlib.contextmanager
    def step(
        self, step: str, done: bool = True, makes: Sequence[str] = (), made_on: Mapping[str, str] | None = None
    ) -> Iterator[None]:
        """Time a step and record it when the block ends without an error: as done, or (one shard of it) not yet, and
        ``made_on``, which device and precision it had.

        Half-written files of killed processes in what the step ``makes`` (folders and files of the run folder) are
        removed first. Parallel parts of a step may end in any order: their times add up, the highest peak counts.
        """
        if distributed.is_main():
            atomic.remove_leftovers(self.root / made for made in makes)
        begin = time.perf_counter()
        _reset_peak()
        self._step = step
        yield
        seconds = time.perf_counter() - begin
        if distributed.is_main():
            with self._locked():
                record = self.record()
                before = record["steps"].get(step, {})
                peaks = {name: max(value, before.get(name, 0.0)) for name, value in _peak().items()}
                record["steps"][step] = {
                    "done": done or before.get("done", False),
                    "seconds": round(before.get("seconds", 0.0) + seconds, 2),
                    **peaks,
                    **(made_on or {}),
                }
                store.write_json(self.root / "run.json", record)
        distributed.barrier()

    # --- scores.json ----------------------------------------------------------------------------------------------

    def scores(self) -> dict[str, dict[str, Any]]:
        """Every recorded score by name. What a score lacks is empty, or "?". ValueError for a damaged file."""
        return fill(self._stored_scores(), _SCORES)

    def _stored_scores(self) -> dict[str, dict[str, Any]]:
        path = self.root / "scores.json"
        scores = store.read_json(path, _SCORES) if path.exists() else {}
        for name, score in scores.items():
            tables = score.get("confusion", []), score.get("predicted_void", [])
            sizes = {len(table) for table in (*tables, *tables[0]) if table}
            if sizes - {len(score.get("classes", []))}:
                raise ValueError(
                    f"{path} cannot be read (the confusion of {name!r} is not one of its classes): delete it and run "
                    "again."
                )
        return scores

    def add_score(self, name: str, score: dict[str, Any]) -> None:
        """Record a score with its provenance, and the step that runs, under a name (replacing one of the same name)."""
        made_by = {} if self._step is None else {"step": self._step}
        with self._locked():
            store.write_json(self.root / "scores.json", {**self._stored_scores(), name: {**score, **made_by}})


def _shortened(lines: Sequence[str], most: int = 10) -> str:
    """The first lines, and how many more there are."""
    more = [f"  and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join([*lines[:most], *more])


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def _git_commit() -> str:
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def _reset_peak() -> None:
    if torch.cuda.is_initialized():  # asking further would open a context on a GPU that this run may not use
        torch.cuda.reset_peak_memory_stats()
    try:  # Linux: start the high-water mark of this process anew
        Path(f"/proc/{os.getpid()}/clear_refs").write_text("5")
    except OSError:
        pass


def _peak() -> dict[str, float]:
    peak: dict[str, float] = {}
    if used := distributed.used_memory(largest=True):
        peak["peak_memory_mb"] = round(used / 2**20, 1)
    if torch.cuda.is_initialized():
        peak["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peak


_STEP = {"?done": bool, "seconds": Number(0), "?peak_memory_mb": Number(0), "?peak_gpu_memory_mb": Number(0)}
_RECORD = {
    "config": dict, "data": dict, "?machine": dict, "steps": Usual(Each(_STEP), {}), "command": Usual([str], []),
    "versions": Usual(Each(str), {}), "git_commit": Usual(str, "unknown"), "?data_root": str,
    "world_size": Usual(Number(1, whole=True), 1),
}  # fmt: skip
_PERCENT = Number(0, 100, none=True)
_CLASS = {
    "name": str, "iou": Usual(_PERCENT, None), "?precision": _PERCENT, "?recall": _PERCENT, "?boundary_iou": _PERCENT
}
_COUNT = Number(0, whole=True)
_SCORES = Each(
    {
        "?step": str, "split": Usual(str, "?"), "images": Usual(_COUNT, "?"), "tags": Usual(str, "?"),
        "threshold": Usual(Number(0, 1, none=True), None), "threshold_choice": Usual(str | None, "?"),
        "?miou": _PERCENT, "?boundary_miou": _PERCENT, "?ap50": _PERCENT, "?value": _PERCENT,
        "classes": Usual([_CLASS], []), "confusion": Usual([[_COUNT]], []), "predicted_void": Usual([_COUNT], []),
        "?curve": [{"threshold": Number(0, 1), "miou": _PERCENT}],
        "?texts": {"source": str, "classes": Each(str), "background": [str], "templates": [str]},
    }
)  # fmt: skip

"""The scripts of the published systems: their arguments become flags that the driver knows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from running import ROOM, make_set, start

from misc.files.images import write_mask
from misc.files.runfolder import RunFolder
from misc.files.store import write_json
from net.contract import Phase
from net.names import OWN
from net.registry import SEEDS, SEGMENTERS, load_methods
from net.seed.weclip import SWITCH
from net.shared.self_training import Term
from net.start_weights import REQUIRED
from scripts import one_step, study, voc_server
from step import plan, select
from step.lib import parsing
from step.lib.config import default_config, open_job
from voc12.catalog import open_catalog

load_methods()
SYSTEMS = sorted(p.stem for p in (ROOM / "scripts").glob("*.sh") if "\nlaunch " in p.read_text())
WORDS = {"VERSION": "plus", "METHOD": "crt", "BACKBONE": "resnest101e"}
BACKBONES = {"getam": "deit_distilled"}
PRESETS = {"mctformer": "published_plus", "crt_cub": "published_cub", "psa_vgg16": "published_vgg16"}
"""Arguments that are no paths."""

PYTHON = """#!/usr/bin/env bash
if [ "$1" != -m ] || [ "$2" = torch.distributed.run ]; then for word in "$@"; do echo "$word"; done; fi
"""


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A checkout whose Python prints its arguments, a line each, beside the folders that the commands name."""
    for name in ("VOC_ROOT", "CUB_ROOT", "SALIENCY"):
        (tmp_path / name).mkdir()
        (tmp_path / "some folder" / name).mkdir(parents=True)
    shutil.copytree(ROOM / "scripts", tmp_path / "room" / "scripts")
    for name in ("requirements.txt", "requirements-clip.txt"):
        shutil.copy(ROOM / name, tmp_path / "room")
    python = tmp_path / "room" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path / "room"


def call(room: Path, system: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(room / "scripts" / f"{system}.sh"), *arguments], cwd=room.parent, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_script_runs_its_published_recipe(system: str, room: Path) -> None:
    text = (room / "scripts" / f"{system}.sh").read_text()
    names = re.search(rf"command +scripts/{system}\.sh ([A-Z0-9_ ]+) \[flags", text)[1].split()
    short = call(room, system, *["x"] * (len(names) - 1))
    assert short.returncode == 2 and all(name in short.stdout for name in names) and "set -e" not in short.stdout

    words = {**WORDS, "BACKBONE": BACKBONES.get(system, WORDS["BACKBONE"])}
    given = [words.get(name, f"some folder/{name}") for name in names]  # relative to where it is called
    told = call(room, system, *given, "--seed", "7", "--run", "a b")
    assert told.returncode == 0, told.stderr
    driver, *flags = told.stdout[told.stdout.index("run_sample.py") :].splitlines()
    cfg = parsing.parse(flags)
    assert (driver, cfg.seed, cfg.run) == ("run_sample.py", 7, Path("a b"))
    assert cfg.preset == PRESETS.get(system, "published")
    assert cfg.method.startswith(system.split("_")[0])
    places = {str(room.parent / word) for word in given if "/" in word}
    phases = [phase for _, phase in cfg.cam.phases()]
    if cfg.data != "cub200" and cfg.segmenter != OWN:  # these take the CAM network alone
        phases += [phase for phase in (cfg.aff, cfg.seg) if isinstance(phase, Phase)]
    weights = {phase.weights for phase in phases}
    assert places <= {str(cfg.root), str(cfg.saliency), *weights} and REQUIRED not in weights


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_script_names_the_commands_of_the_released_weights(system: str, room: Path) -> None:
    text = (room / "scripts" / f"{system}.sh").read_text()
    method = {"irn": "irn_cam", "crt_cub": "crt", "psa_vgg16": "psa"}.get(system, system)
    lines = re.findall(r"^#   (--(?:cam|seg)\.released .*?)(?:  +| *\n#       -> )(\S.*)$", text, re.M)
    assert lines or method in ("clipes", "weclip")  # nothing is trained; no weights were released
    for flags, expected in lines:
        cfg = parsing.parse([method, "--preset", PRESETS.get(system, "published"), *flags.split()])
        assert (cfg.cam.released or cfg.seg.released) and cfg.steps and expected


def test_a_data_set_that_is_not_there_is_refused_before_anything_is_installed(room: Path) -> None:
    shutil.rmtree(room / ".venv")
    told = call(room, "seam", "VOC_ROTO", "pretrained")
    assert told.returncode == 2 and told.stderr == "error: VOC_ROTO: there is no such folder.\n" and not told.stdout
    assert not (room / ".venv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vitb_hybrid", "vitb", "deit", "deit_distilled"])
def test_getam_takes_the_authors_names_of_its_backbones(name: str, room: Path) -> None:
    told = call(room, "getam", name, "VOC_ROOT", "SALIENCY").stdout
    cfg = parsing.parse(told[told.index("run_sample.py") :].splitlines()[1:])
    assert cfg.cam.network.dpt.backbone == name.replace("deit", "deitb")


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_further_commands_in_a_header_are_understood(system: str, room: Path) -> None:
    text = (room / "scripts" / f"{system}.sh").read_text()
    commands = re.findall(r"^#   ((?:scripts/\w+\.sh|python run_sample\.py) (?:.*\\\n#)*.*)$", text, re.M)
    expected = {"crt_cub": 2, "mctformer": 1, "aream_conformer": 1, "seam": 1, "getam": 4}
    assert len(commands) >= expected.get(system, 0)
    for command in commands:
        words = command.replace("\\\n#", " ").split("    expected")[0]
        program, *arguments = re.split(r" {20,}", words)[0].split()
        if program == "python":
            flags = arguments[1:]
        else:
            told = call(room, Path(program).stem, *arguments)
            flags = told.stdout[told.stdout.index("run_sample.py") :].splitlines()[1:]
        assert parsing.parse(flags).preset.startswith("published")


def test_every_script_is_parsed_by_bash() -> None:
    scripts = [*(ROOM / "scripts").glob("*.sh"), ROOM / "scripts" / "slurm.sbatch"]
    assert len(scripts) > 20
    for script in scripts:
        told = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert (told.returncode, told.stderr) == (0, ""), script


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_runs_on_several_gpus(system: str, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUS", "2")
    text = (room / "scripts" / f"{system}.sh").read_text()
    names = re.search(rf"command +scripts/{system}\.sh ([A-Z0-9_ ]+) \[flags", text)
    words = call(room, system, *(WORDS.get(name, name) for name in names[1].split())).stdout.splitlines()
    at = words.index("run_sample.py")
    assert words[at - 5 : at] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_several_gpus_are_named_before_the_command(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUS", "4")
    words = call(room, "seam", "VOC_ROOT", "params", "--seed", "7").stdout.splitlines()
    at = words.index("run_sample.py")
    assert words[at - 5 : at] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    assert words[at + 1 : at + 4] == ["seam", "--preset", "published"] and words[-2:] == ["--seed", "7"]


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("train", "torchrun --nnodes 2 --nproc-per-node 3 --rdzv-backend c10d --rdzv-id 5 --rdzv-endpoint node1:29500 "
                  "run_sample.py seam --steps train_cam"),
        ("images", "python run_sample.py seam --steps train_cam --shard 2/8"),
    ],
)  # fmt: skip
def test_slurm_runs_a_training_on_all_nodes_and_images_in_parts(kind: str, wanted: str, tmp_path: Path) -> None:
    for name, does in (("srun", '"$@"'), ("scontrol", "echo node1; echo node2"), ("torchrun", "echo torchrun $*"),
                       ("python", "echo python $*")):  # fmt: skip
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"NNODES": 2, "GPUS_ON_NODE": 3, "JOB_ID": 5, "JOB_NODELIST": "node[1-2]", "ARRAY_TASK_ID": 2,
             "ARRAY_TASK_COUNT": 8, "SUBMIT_DIR": tmp_path}  # fmt: skip
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    command = ["bash", str(ROOM / "scripts" / "slurm.sbatch"), kind, "seam", "--steps", "train_cam"]
    told = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip() == wanted


def test_every_script_of_a_system_uses_the_launcher() -> None:
    texts = {p.stem: p.read_text() for p in (ROOM / "scripts").glob("*.sh")}
    others = set(texts) - set(SYSTEMS) - {"env", "sample", "step", "system", "test"}
    assert all(name[0].isdigit() for name in others)  # those of the steps
    launched = {re.search(r"\nlaunch \"?(\$?\w+)", texts[system])[1] for system in SYSTEMS}
    assert len(launched) > 10 and launched <= {*SEEDS, "$method"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*one_step.METHODS, *one_step.SEGMENTER_NAMES])
def test_a_step_of_every_published_recipe_is_asked_for_at_full_size(name: str, data: Path, tmp_path: Path) -> None:
    cfg = parsing.parse(one_step.step_flags(name, data, tmp_path, batch=2))
    job = open_job(cfg)
    plan.check_inputs(job, select(cfg.steps, job.aim))
    if name in one_step.SEGMENTER_NAMES:
        whole = SEGMENTERS[name].recipes["published"]
        assert cfg.seg.network == whole.network and (cfg.seg.fit.steps, cfg.seg.fit.batch_size) == (1, 2)
        return
    published = default_config(cfg.method, cfg.preset)
    for (_, phase), (_, whole) in zip(cfg.cam.phases(), published.cam.phases(), strict=True):
        assert phase.weights == "none" and phase.fit.batch_size == 2 and phase.fit.steps in (0, 1, 2, 3)
        assert name.count(":") == 2 or phase.augment == whole.augment
        assert name != cfg.method or phase.network == whole.network
    if cfg.cam.fit.steps == 0:
        assert published.cam.fit.steps == 0
        return
    last = 1 - 1 / cfg.cam.fit.steps  # progress of the last step
    late = {"getam": "cls_share", "aream_mctformer": "warmup", "aream_conformer": "warmup"}
    assert cfg.method not in late or last > getattr(cfg.cam.network, late[cfg.method])
    assert cfg.method != "weclip" or last >= SWITCH[cfg.cam.network.switch]
    assert cfg.method != "crt" or cfg.cam.network.agrees(last)


def test_no_published_recipe_is_left_out_and_every_special_case_is_one() -> None:
    recipes = {(name, preset) for name, cls in SEEDS.items() for preset in cls.recipes}
    taken = {tuple([*name.split(":"), "published"][:2]) for name in one_step.METHODS}
    assert taken == {(name, preset) for name, preset in recipes if preset.startswith("published")}


FAKE = """
import json, pathlib, sys, time
words = sys.argv[1:]
out = pathlib.Path(words[words.index("--out") + 1])
if "irn_cam" in words:
    sys.exit(3)
if "transcam" in words:
    time.sleep(60)
out.mkdir(parents=True)
step = {"done": True, "seconds": 12.34, "peak_memory_mb": 2048.0, "peak_gpu_memory_mb": 512.0}
(out / "run.json").write_text(json.dumps({"config": {}, "data": {}, "steps": {"train_cam": step}}))
"""


@pytest.mark.slow
def test_one_step_goes_on_after_a_failure_and_leaves_out_what_has_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run_sample.py").write_text(FAKE)
    monkeypatch.setattr(one_step, "ROOT", tmp_path)
    options = one_step.OneStepOptions(
        methods=("irn_cam", "transcam", "psa"), out=tmp_path / "out", json=tmp_path / "results.json", limit=2
    )
    assert one_step.main(options) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(name, result["ran"]) for name, result in results.items()] == [
        ("irn_cam", False), ("transcam", False), ("psa", True)
    ]  # fmt: skip
    assert (results["irn_cam"]["why"], results["transcam"]["why"]) == ("exit status 3", "ended after 2 s")
    assert results["psa"] == {"batch": 2, "device": "cpu", "ran": True, "seconds": 12.34, "peak_memory_mb": 2048.0,
                              "peak_gpu_memory_mb": 512.0}  # fmt: skip
    told = capsys.readouterr().out
    assert "12.3 s" in told and "2.0 GiB" in told and "0.5 GiB" in told and "exit status 3" in told
    assert (tmp_path / "out" / "set" / "JPEGImages").is_dir()
    assert one_step.main(replace(options, methods=("psa",))) == 0
    again = capsys.readouterr().out
    assert "psa: has run already" in again and "== python" not in again
    assert one_step.main(replace(options, methods=("psa",), device="cuda")) == 0
    assert "--machine.device cuda" in capsys.readouterr().out


def test_one_step_wants_known_names(tmp_path: Path) -> None:
    assert one_step.OneStepOptions(all=True).names() == (*one_step.METHODS, *one_step.SEGMENTER_NAMES)
    for methods in ((), ("nothing",)):
        with pytest.raises(ValueError, match="There are: "):
            one_step.main(one_step.OneStepOptions(methods=methods, out=tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(study.PLAIN))
def test_plain_maps_are_of_the_same_network_and_training(method: str) -> None:
    plain = parsing.parse([method, *study.PLAIN[method].split()]).cam
    usual = default_config(method, "sample").cam
    assert plain.network != usual.network
    assert (plain.fit, plain.augment, plain.infer) == (usual.fit, usual.augment, usual.infer)
    if method in ("toco", "more"):  # classification alone is left
        terms = {name: value.weight for name, value in vars(plain.network).items() if isinstance(value, Term)}
        assert len(terms) >= 4 and not any(terms.values())
        assert plain.network.backbone == usual.network.backbone


def test_a_study_of_the_maps_tells_score_and_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def drive(*flags: str) -> None:
        asked.append(flags)
        run = RunFolder(Path(flags[flags.index("--run") + 1]))
        steps = {"train_cam": {"seconds": 120.0}, "make_cam": {"seconds": 30.0}}
        write_json(run.root / "run.json", {"config": {}, "data": {}, "steps": steps})
        run.add_score("CAM", {"miou": 51.234, "threshold": 0.2})

    monkeypatch.setattr(study, "drive", drive)
    told = json.loads(study.study_cams("toco", 2, tmp_path, True, ("--cam.fit.epochs", "1")))
    assert (told["miou"], told["minutes"], told["minutes_training"]) == (51.23, 2.5, 2.0)
    assert (told["method"], told["plain"], told["seed"], told["threshold"]) == ("toco", True, 2, 0.2)
    (flags,) = asked
    assert " ".join(flags).endswith(f"--steps 1-2 {study.PLAIN['toco']} --cam.fit.epochs 1")


def test_predictions_are_packed_as_the_server_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_set(tmp_path / "voc", images=2, val=2)
    ids = open_catalog("voc12", root).ids("val")
    out = tmp_path / "results.tgz"
    assert voc_server.main(tmp_path / "run", root, "val", out) == 1
    assert "2 of 2 predictions" in capsys.readouterr().err and not out.exists()
    for image_id in ids:
        write_mask(tmp_path / "run" / "seg" / f"{image_id}.png", np.full((4, 5), 2, np.uint8))
    assert voc_server.main(tmp_path / "run", root, "val", out) == 0
    with tarfile.open(out) as archive:
        names = archive.getnames()
    assert names == [f"results/VOC2012/Segmentation/comp6_test_cls/{i}.png" for i in ids]


@pytest.mark.slow
def test_a_study_of_a_method_that_is_not_there_ends_with_one_line() -> None:
    ended = start(["-m", "scripts.study", "nosuch"])
    assert ended.returncode == 2 and "There is no method 'nosuch'." in ended.stderr and "Traceback" not in ended.stderr


def test_scripts_that_are_named_as_files_take_the_path_from_one_place() -> None:
    texts = [p.read_text() for p in [ROOM / "README.md", *(ROOM / "docs").glob("*.md"), *ROOM.glob("scripts/*.py")]]
    named = set(re.findall(r"python\s+scripts/(\w+)\.py", "\n".join(texts)))
    scripts = {path.stem: path.read_text() for path in (ROOM / "scripts").glob("*.py")}
    assert named == {name for name, text in scripts.items() if "import as_file" in text} >= {"compare", "look"}
    assert [name for name, text in scripts.items() if "sys.path" in text] == ["as_file"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compare", "look", "torture"])
def test_a_script_is_called_as_a_file(name: str) -> None:
    told = start([f"scripts/{name}.py", "--help"], PYTHONPATH="")
    assert told.returncode == 0 and "usage" in told.stdout, told.stderr

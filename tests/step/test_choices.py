"""Help and wrong words are answered from the sources, without importing PyTorch."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from running import ROOM, start

import run_sample
from net import registry
from net.names import OWN
from step.lib import choices
from voc12.catalog import load_data_sets


@pytest.mark.parametrize("flag, told", [
    ("--nosuch-word", "seam has no flag --nosuch-word. All: python run_sample.py seam --help-all"),
    ("--cam.fit.lrr", "Did you mean --cam.fit.lr"), ("--lr", "Did you mean --cam.fit.lr"),
    ("--refnier=psa", "Did you mean --refiner"),
    ("--cam.presett", "Did you mean --preset?"),
])  # fmt: skip
def test_a_wrong_flag_is_reported_with_the_nearest(flag: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_sample.main(["seam", flag, "1"]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("argv", [
    ["run_sample", "--help"], ["run_sample", "clipes", "--help"], ["run_sample", "nosuch"],
    ["run_sample", "seam", "--preset", "big"], ["run_sample", "seam", "--nosuch", "1"],
    ["predict", "--help"], ["evaluation", "--help"], ["predict", "--nosuch"], ["evaluation", "--nosuch"],
], ids=" ".join)  # fmt: skip
def test_help_and_wrong_words_need_no_torch(argv: list[str]) -> None:
    choices.known_flags("seam")  # the list of flags is made where it is not there
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{argv[0] + '.py'!r}, *{argv[1:]!r}]\n"
        f"try: runpy.run_path({argv[0] + '.py'!r}, run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    ended = start(["-c", code])
    assert ended.stdout.splitlines()[-1] == "False" and ("--help" in argv) == (ended.returncode == 0)


@pytest.mark.slow
def test_names_read_from_the_sources_are_those_that_are_registered() -> None:
    registry.load_methods()
    assert {name: set(presets) for name, presets in choices.methods().items()} == {
        name: set(method.recipes) for name, method in registry.SEEDS.items()
    }
    assert set(choices.refiners()) == set(registry.REFINERS)
    assert set(choices.segmenters()) == {*registry.SEGMENTERS, OWN}
    assert set(choices.data_sets()) == set(load_data_sets())


def test_help_of_a_method_tells_idea_paper_and_what_its_presets_train(capsys: pytest.CaptureFixture[str]) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", (ROOM / "README.md").read_text(), re.M))
    for name, presets in choices.methods().items():
        idea = choices.idea_of(name)
        assert idea.endswith(").") and ".md" not in idea and ": " in idea, name
        year = re.search(r"(?:CVPR|ICCV|ICIP|AAAI|JVCIR|arXiv) 20\d\d", rows[name])  # "the same" has none
        assert re.search(r"20\d\d\)", idea) and (year is None or year[0] in idea), name
        assert choices.told_presets(name).keys() == set(presets)
    assert run_sample.main(["clipes", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"clipes: {choices.idea_of('clipes')}" in told and "frozen CLIP" in told
    assert "sample cam not trained (frozen), seg 2 epochs; refiner crf, segmenter deeplabv2" in told
    assert choices.told_presets("psa")["sample"].count(" epochs") == 3  # cam, aff, seg
    assert choices.told_presets("getam")["published"].endswith("; segmenter own (cam predicts the masks itself)")
    assert choices.told_presets("tscam")["sample"].endswith("; draws boxes")
    assert run_sample.main(["clippy", "--help"]) == 2 and "There is no method 'clippy'" in capsys.readouterr().err


def test_help_tells_which_preset_a_method_takes(capsys: pytest.CaptureFixture[str]) -> None:
    for name, presets in choices.methods().items():
        assert run_sample.main([name, "--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        told = " ".join(" ".join(lines).split())
        assert max(map(len, lines)) <= 100 and f"default: {choices.preset_of((), presets)}" in told
        assert ("with --data folder: photos" in told) == ("photos" in presets), name


def test_every_option_of_the_short_help_exists() -> None:
    known = choices.known_flags("seam")
    assert all(form.split()[0] in known for form, _ in choices.OPTIONS)


def test_flags_are_listed_anew_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tmp_path / "cache" / "flags.json"
    monkeypatch.setattr(choices, "INDEX", index)
    flags = choices.known_flags("seam")
    assert "--cam.infer.no-flip" in flags and "--out" in flags and "--aff.walk.logt" in flags
    index.write_text(json.dumps({**json.loads(index.read_text()), "flags": {"seam": ["--stale"]}}))
    assert choices.known_flags("seam") == ["--stale"]  # it is read
    monkeypatch.setattr(choices, "_sources_key", lambda: "another")
    assert choices.known_flags("seam") == flags
    index.write_text("{")
    assert choices.known_flags("seam") == flags

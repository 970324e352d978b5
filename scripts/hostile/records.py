"""Hostile run.json, scores.json and predict.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from scripts.hostile.cases import ONE, Bench, HostileFile, Must
from scripts.hostile.formats import HOSTILE_VALUES, json_paths, json_with

_SCRIPT = "<script>alert(1)</script>"


def _no_script(cwd: Path) -> str:
    found = "<script>alert" in (cwd / "run/report.html").read_text()
    return "a script of scores.json is in report.html as it is" if found else ""


def record_cases(bench: Bench) -> Iterator[HostileFile]:
    """run.json and scores.json of a run whose report is to be made."""
    rng = bench.rng
    for file in ("run.json", "scores.json"):
        data = bench.made(file)
        content = json.loads(data)
        top = [p for p in json_paths(content) if len(p) <= 3 and p[:1] != ("config",)]
        rows: list[tuple[str, bytes]] = []
        for _ in range(22):
            path = rng.choice(top)
            new = rng.choice(["DELETE", *HOSTILE_VALUES] if path else HOSTILE_VALUES)
            rows.append((f"{'/'.join(map(str, path))} = {str(new)[:20]!r}", json_with(content, path, new)))
        rows += [
            ("empty", b""), ("[]", b"[]"), ("null", b"null"), ("a text", b'"x"'), ("{}", b"{}"), ("cut", data[:300]),
            ("not UTF-8", b"\xff\xfe"), ("100000 brackets", b"[" * 100000), ("zeros", bytes(4000)),
            ("html in a name", data.replace(b"train", _SCRIPT.encode())),
        ]  # fmt: skip
        for name, changed in rows:
            must: Must = _no_script if (file, name) == ("scores.json", "html in a name") else "any"
            build = bench.in_run(file, changed, "report")
            yield HostileFile(file, name, "run_sample.py", bench.run, build, must, file)


def predict_record_cases(bench: Bench) -> Iterator[HostileFile]:
    """predict.json of a folder of results."""
    for name, data in {
        "empty": b"", "[]": b"[]", "settings a number": b'{"settings": 7}', "values a list": b'{"mask values": [1]}',
        "100000 brackets": b"[" * 100000, "not UTF-8": b"\xff\xfe", "cut": b'{"settings": {',
    }.items():  # fmt: skip

        def build(cwd: Path, data: bytes = data) -> None:
            bench.in_predict(f"{ONE}.jpg", bench.photo)(cwd)
            (cwd / "out").mkdir()
            (cwd / "out/predict.json").write_bytes(data)

        yield HostileFile("predict.json", name, "predict.py", bench.predict, build, "refuse", "out")

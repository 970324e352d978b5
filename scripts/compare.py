"""Runs side by side: ``python scripts/compare.py RUN...`` (also ``python -m scripts.compare``).

Writes one self-contained page, compare.html, and beside it the table in Markdown: method x refiner x segmenter, mean
and standard deviation over the seeds, time, memory, and the published figures in a column of their own; then the same
images through all runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    import as_file  # noqa: F401

import numpy as np
import tyro

from misc import commandline
from misc.files import store
from misc.files.runfolder import RunFolder
from misc.image import draw
from misc.tables import ResultTable
from net import registry
from net.names import OWN
from step import plan
from step.lib.report import charts, findings, gallery, judge, page, side_by_side, story
from step.lib.sizes import use_copies
from voc12.catalog import open_catalog

SEED_SETTINGS = ("seed", "sample.seed")
"""Settings in which runs of one row may differ."""
PUBLISHED = "published on VOC 2012"
PUBLISHED_MEANS = (
    f"{PUBLISHED}: what the papers report of their own recipe, CAM / pseudo mask / segmentation; † not confirmed by "
    "its source. It is no figure of this code, and can't be compared with figures on other data."
)


@dataclass(frozen=True)
class Run:
    """A run to be compared."""

    name: str
    folder: RunFolder
    record: dict[str, Any]
    scores: dict[str, dict[str, Any]]

    @property
    def kind(self) -> tuple[str, ...]:
        """Data set, preset, method, refiner, segmenter and what masks it trains on, "own" or "-" for parts that the
        run has not."""
        config = self.record["config"]
        names = ("data", "preset", "method", "refiner", "segmenter")
        data, preset, method, refiner, segmenter = (str(config.get(name, "?")) for name in names)
        if any("value" in s for s in self.scores.values()):
            refiner = segmenter = "-"
        refiner = "-" if segmenter == OWN else refiner
        truth = " (true masks)" if config.get("masks") == "truth" else ""
        return data, preset, method, refiner, segmenter + truth

    @property
    def seeds(self) -> str:
        """Seed of the run, and of a generated data set."""
        config = self.record["config"]
        return "/".join(str(config[key]) for key in SEED_SETTINGS if key in config)

    @property
    def figures(self) -> dict[str, float]:
        """Column -> score in percent."""
        found = {title: self.scores[name]["miou"] for title, name in findings.mask_scores(self.scores).items()}
        found |= {h.title: self.scores[h.path[0]][h.path[1]] for h in findings.find_headlines(self.scores)}
        return {title: figure for title, figure in found.items() if figure is not None}

    @property
    def seconds(self) -> float:
        """Time of all steps."""
        return sum(step.get("seconds", 0.0) for step in self.record.get("steps", {}).values())

    @property
    def megabytes(self) -> float:
        """Highest peak of the main process."""
        return max((s.get("peak_memory_mb", 0.0) for s in self.record.get("steps", {}).values()), default=0.0)


def read_run(folder: Path) -> Run:
    """Raises ValueError for a folder without a run."""
    run = RunFolder(folder)
    record = run.record()
    if not record:
        raise ValueError(f"{folder} is no run folder: it has no run.json.")
    return Run(folder.name, run, record, run.scores())


def group_runs(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Rows of the table: runs that differ in nothing but seeds, each with the settings, besides its kind, in which it
    differs from other rows of the same kind."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = {k: v for k, v in run.record["config"].items() if k not in SEED_SETTINGS}
        groups.setdefault(str(settings), []).append(run)
    rows = []
    for group in groups.values():
        config = group[0].record["config"]
        others = [o[0].record["config"] for o in groups.values() if o is not group and o[0].kind == group[0].kind]
        keys = [k for k in config if k not in SEED_SETTINGS and any(other.get(k) != config[k] for other in others)]
        told = ", ".join(f"{k} {config[k]}" for k in keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        rows.append((told, group))
    return rows


def tell_mean(values: Sequence[float]) -> str:
    """Mean, and with several values the standard deviation (of the sample)."""
    if not values:
        return "–"
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def make_table(runs: Sequence[Run]) -> ResultTable:
    """The rows of ``group_runs`` with their scores, time, memory, and what was published for the method."""
    registry.load_methods()
    rows = group_runs(runs)
    columns = list(dict.fromkeys(title for run in runs for title in run.figures))
    cells = []
    for told, group in rows:
        data, preset, method, refiner, segmenter = group[0].kind
        seeds = ", ".join(run.seeds for run in group)
        scores = [tell_mean([r.figures[c] for r in group if c in r.figures]) for c in columns]
        published = registry.SEEDS[method].published_scores if method in registry.SEEDS else ""
        time = story.tell_time(float(np.mean([r.seconds for r in group])))
        memory = f"{max(r.megabytes for r in group) / 1024:.1f} GB"
        cells.append((method, refiner, segmenter, *scores, told or "–", seeds, data, preset, time, memory,
                      published or "–"))  # fmt: skip
    head = ("method", "refiner", "segmenter", *columns, "other settings", "seeds", "data", "preset", "time",
            "peak memory", PUBLISHED)  # fmt: skip
    return ResultTable(head, cells, numbers=range(3, 3 + len(columns)))


def find_warnings(runs: Sequence[Run]) -> list[str]:
    """Why figures of these runs may not be compared."""
    told = []
    lists: dict[str, set[str]] = {}
    for run in runs:
        for split, fingerprint in run.record.get("data", {}).items():
            lists.setdefault(split, set()).add(str(fingerprint))
    told += [
        f"The list {split} is not the same in all runs: their figures on it are not of the same images or tags."
        for split, prints in lists.items() if len(prints) > 1
    ]  # fmt: skip
    missing = [run.name for run in runs if not run.scores]
    return told + ([f"Without scores: {', '.join(missing)}."] if missing else [])


def open_images(run: Run, root: Path | None) -> judge.RunImages:
    """The images of a run. Raises ValueError if its data set is not where it was and no ``root`` is given."""
    place = root or run.record.get("data_root")
    if place is None:
        raise ValueError(f"{run.folder.root} does not say where its data set is: give --root DIR.")
    config = run.record["config"]
    catalog = open_catalog(str(config.get("data")), Path(place))
    if long_side := config.get("long_side", 0):
        use_copies(catalog, run.folder, long_side)
    return judge.RunImages.of(catalog, run.folder)


def make_comparison(runs: Sequence[Run], root: Path | None, with_pictures: bool = True) -> str:
    """The page compare.html; ``root``: folder of the data set of all runs, None: the recorded ones."""
    drawn, classes = page.Charts(), {}
    for run in runs:
        stages = {t: n for t, n in findings.mask_scores(run.scores).items() if run.scores[n]["classes"]}
        if stages:
            title, name = list(stages.items())[-1]
            classes[f"{run.name}: {title}"] = {c["name"]: c["iou"] for c in run.scores[name]["classes"]}
    images = [(run.name, open_images(run, root)) for run in runs] if with_pictures else []
    return page.render(
        "compare.html.jinja", {run.name: run.scores for run in runs},
        title=f"{len(runs)} runs side by side", table=make_table(runs), warnings=find_warnings(runs),
        class_chart=drawn.add(charts.class_chart(classes)) if classes else None,
        miou_means=findings.MIOU_MEANS, published_means=PUBLISHED_MEANS,
        runs=[(run.name, run.folder.root, [(h, (run.name, *h.path)) for h in findings.find_headlines(run.scores)])
              for run in runs],
        galleries=side_by_side.make_galleries(images) if images else [],
        mistakes=gallery.css_legend(draw.mistake_entries()), charts=drawn,
    )  # fmt: skip


def distinct_names(runs: Sequence[Run]) -> list[Run]:
    """The runs with names of their own: of folders of the same name the whole path."""
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else Run(str(run.folder.root), run.folder, run.record, run.scores)
        for run in runs
    ]


def compare_arguments(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    out: Path = Path("."),
    root: Path | None = None,
    pictures: bool = True,
) -> tuple[tuple[Path, ...], Path, Path | None, bool]:
    """Compare runs: one page and one Markdown table.

    Args:
        runs: Run folders.
        out: Folder for compare.html and the table in Markdown.
        root: Folder of the data set of all runs, if it is no longer where it was.
        pictures: Show the same images through all runs, which needs the data set.
    """
    return runs, out, root, pictures


def main(argv: Sequence[str]) -> int:
    """Command line. Returns the exit status."""
    return commandline.command(lambda: compare_runs(argv), plan.PROBLEMS)


def compare_runs(argv: Sequence[str]) -> None:
    """Write the comparison and print its table."""
    told = {"prog": "python scripts/compare.py", "description": __doc__}
    folders, out, root, pictures = commandline.parse_options(compare_arguments, argv, **told)
    if not folders:
        raise commandline.WrongCall("Name one run folder or more.")
    runs = distinct_names([read_run(folder) for folder in folders])
    table = make_table(runs).markdown()
    notes, page_file = [f"- {told}" for told in (*find_warnings(runs), PUBLISHED_MEANS)], out / "compare.html"
    store.write_bytes(page_file.with_suffix(".md"), "\n".join([table, "", *notes]).strip().encode() + b"\n")
    store.write_bytes(page_file, make_comparison(runs, root, pictures).encode())
    print(table)
    for line in notes:
        print(line)
    print(f"files: {page_file}, {page_file.with_suffix('.md')}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""One self-contained HTML page: templates of this folder, charts drawn by Vega-Lite, which is embedded once."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from misc.files import store
from step.lib.report.charts import Spec


def render(template: str, numbers: Mapping[str, Any], **values: Any) -> str:
    """A page from a template of this folder, which escapes all text.

    ``numbers``: scores.json of the run, or of several by name: the template's ``number(path)`` shows the value at a
    path of keys with two decimals, and marks it with the path, so that a test can compare it with scores.json.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["flags"] = keep_flags
    environment.globals.update(number=functools.partial(number, numbers), library=lambda: Markup(load_library()),
                               no_charts="" if load_library() else NO_CHARTS, not_drawn=NOT_DRAWN)  # fmt: skip
    return environment.get_template(template).render(**values)


def keep_flags(text: str) -> Markup:
    """Text, escaped, whose flags (--NAME) are not broken at the end of a line."""
    parts = re.split(r"(--\w[\w.-]*)", text)
    kept = [Markup("<span class=flag>{}</span>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts)]
    return Markup("").join(kept)


def number(scores: Any, path: tuple[str | int, ...], digits: int = 2) -> Markup:
    """The number at a path of keys in scores.json, or a dash, marked with the path."""
    value = scores
    for key in path:
        inside = range(len(value)) if isinstance(value, list) else value
        value = value[key] if key in inside else None
        if value is None:
            return Markup("–")
    return Markup('<span data-score="{}">{:.{}f}</span>').format(json.dumps(path), value, digits)


NOT_DRAWN = "not drawn: see the top of the page"
"""What stands in the place of a chart that is left out."""
NO_CHARTS = (
    "Charts are left out: the package vl-convert-python was not installed where this page was made. Install it (python "
    "-m pip install -r requirements.txt), then make the page again: --steps report --redo."
)


class Charts:
    """Numbers the charts of a page and keeps their specifications."""

    def __init__(self) -> None:
        self.specs: dict[str, Spec] = {}

    def add(self, spec: Spec) -> str:
        """The id of the element in which the chart is drawn."""
        name = f"chart{len(self.specs) + 1}"
        self.specs[name] = spec
        return name


@functools.cache
def load_library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script without other files, which defines ``vegaEmbed``.

    The package puts it together, which takes seconds, so it is kept in the user's cache folder. Empty where the package
    is missing: a run must not fail for it at its end, and the page says in place of each chart what is missing.
    """
    try:
        import vl_convert
    except ImportError:
        return ""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tag2mask"
    kept = cache / f"vega-{vl_convert.get_vegalite_versions()[-1]}-{vl_convert.__version__}.js"
    try:
        return kept.read_text(encoding="utf-8")
    except OSError:
        script = vl_convert.javascript_bundle()
    try:
        store.write_bytes(kept, script.encode())
    except OSError:
        pass  # a folder that can't be written costs time, nothing else
    return script

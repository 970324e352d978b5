"""Charts as Vega-Lite specifications (JSON values), drawn by the library that ``page`` embeds. Their texts take the
colour of the page (``currentColor``), so that they can be read on light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from step.lib.report.curves import TrainingCurve

Spec = dict[str, Any]

SERIES = ("#0077BB", "#EE8866", "#009988", "#CC3377", "#AAAA00", "#882255", "#33BBEE", "#999999")
"""Colours of lines and bars, safe for the colour-blind (Paul Tol)."""
_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # a name, nothing is fetched
_AXIS = {"labelColor": "currentColor", "titleColor": "currentColor", "domainColor": "currentColor",
         "tickColor": "currentColor", "gridColor": "currentColor", "gridOpacity": 0.15, "labelFontSize": 12,
         "titleFontSize": 12, "titleFontWeight": "normal", "labelLimit": 130}  # fmt: skip
_CONFIG = {
    "background": None, "font": "system-ui, sans-serif", "view": {"stroke": None}, "axis": _AXIS,
    "legend": {"labelColor": "currentColor", "titleColor": "currentColor", "labelFontSize": 12, "orient": "top",
               "labelLimit": 260, "columns": 2},
    "text": {"color": "currentColor"}, "range": {"category": list(SERIES)},
}  # fmt: skip
_LABELLED = 12
"""Classes up to which every field of a confusion matrix shows its number."""


def _spec(rows: Sequence[Mapping[str, Any]], **parts: Any) -> Spec:
    autosize = {"type": "fit-x", "contains": "padding"}
    return {"$schema": _SCHEMA, "config": _CONFIG, "width": "container", "autosize": autosize,
            "data": {"values": list(rows)}, **parts}  # fmt: skip


def threshold_chart(curve: Sequence[Mapping[str, float]], chosen: float) -> Spec:
    """mIoU over the background score, with the chosen point; ``curve`` as in scores.json."""
    x = {"field": "threshold", "type": "quantitative", "title": "background score (threshold of the CAM)"}
    y = {"field": "miou", "type": "quantitative", "title": "mIoU, %", "scale": {"zero": False}}
    at = {"test": f"abs(datum.threshold - {chosen!r}) < 1e-9"}
    return _spec(
        [{"threshold": p["threshold"], "miou": p["miou"]} for p in curve], height=220,
        encoding={"x": x, "y": y, "tooltip": [{"field": "threshold"}, {"field": "miou", "format": ".2f"}]},
        layer=[
            {"mark": {"type": "line", "color": SERIES[0], "strokeWidth": 2}},
            {"mark": {"type": "point", "filled": True, "opacity": 1},
             "encoding": {"size": {"condition": {**at, "value": 110}, "value": 12},
                          "color": {"condition": {**at, "value": SERIES[1]}, "value": SERIES[0]}}},
            {"transform": [{"filter": at["test"]}],
             "mark": {"type": "text", "dy": -14, "fontSize": 12},
             "encoding": {"text": {"field": "miou", "format": ".2f"}}},
        ],
    )  # fmt: skip


def class_chart(ious: Mapping[str, Mapping[str, float | None]], unit: str = "IoU, %") -> Spec:
    """Bars of each class, the worst of the last stage first; ``ious``: stage -> class -> percent, None: undefined."""
    stages = list(ious)
    last = ious[stages[-1]]
    order = sorted(last, key=lambda name: (last[name] is None, last[name]))
    rows = [
        {"stage": stage, "class": name, "iou": values[name]}
        for stage, values in ious.items() for name in order if values.get(name) is not None
    ]  # fmt: skip
    colours = {"domain": stages, "range": [SERIES[i % len(SERIES)] for i in range(len(stages))]}
    legend = {"columns": 1} if max(map(len, stages)) > 15 else {}
    bar = 11 if len(order) <= 30 else 6
    return _spec(
        rows, height=round(len(order) * len(stages) * bar / 0.75),
        mark={"type": "bar"},
        encoding={
            "y": {"field": "class", "type": "nominal", "sort": order, "title": None,
                  "scale": {"paddingInner": 0.25}},
            "yOffset": {"field": "stage", "sort": stages},
            "x": {"field": "iou", "type": "quantitative", "title": unit, "scale": {"domain": [0, 100]}},
            "color": {"field": "stage", "type": "nominal", "sort": stages, "title": None, "scale": colours,
                      "legend": legend},
            "tooltip": [{"field": "class"}, {"field": "stage"}, {"field": "iou", "format": ".2f", "title": unit}],
        },
    )  # fmt: skip


def confusion_chart(names: Sequence[str], shares: Sequence[Sequence[float]], columns: Sequence[str]) -> Spec:
    """Heat map of a confusion matrix whose rows are in percent of the true pixels of a class: ``shares`` of the true
    class ``names`` taken for the class ``columns``."""
    rows = [
        {"true": true, "taken for": taken, "share": share}
        for true, line in zip(names, shares, strict=True) for taken, share in zip(columns, line, strict=True)
    ]  # fmt: skip
    axis = {"type": "nominal", "sort": None}
    encoding = {
        "x": {"field": "taken for", **axis, "sort": list(columns), "axis": {"orient": "top", "labelAngle": -40}},
        "y": {"field": "true", **axis, "sort": list(names), "title": "true class"},
        "tooltip": [{"field": "true"}, {"field": "taken for"}, {"field": "share", "format": ".1f", "title": "%"}],
    }
    fill = {"field": "share", "type": "quantitative", "scale": {"domain": [0, 100], "range": [0, 1]}, "legend": None}
    layers: list[Spec] = [{"mark": {"type": "rect", "color": "#33BBEE"}, "encoding": {"fillOpacity": fill}}]
    if len(names) <= _LABELLED:
        ink = {"condition": {"test": "datum.share > 45", "value": "#000"}, "value": "currentColor"}
        text = {"field": "share", "format": ".0f"}
        layers.append({"mark": {"type": "text", "fontSize": 11}, "encoding": {"text": text, "color": ink}})
    return _spec(rows, height=len(names) * (26 if len(names) <= 30 else 12), encoding=encoding, layer=layers)


def training_chart(curves: Sequence[TrainingCurve], title: str) -> Spec:
    """Values of one training over its updates, a line each."""
    rows = [
        {"update": update, "term": curve.term, "value": value}
        for curve in curves for update, value in zip(curve.updates, curve.values, strict=True)
    ]  # fmt: skip
    return _spec(
        rows, height=170, mark={"type": "line", "strokeWidth": 1.6, "clip": True},
        encoding={
            "x": {"field": "update", "type": "quantitative", "title": "update"},
            "y": {"field": "value", "type": "quantitative", "title": title},
            "color": {"field": "term", "type": "nominal", "title": None},
            "tooltip": [{"field": "term"}, {"field": "update", "format": ".0f"}, {"field": "value", "format": ".4f"}],
        },
    )


def rating_chart(curve: TrainingCurve, title: str) -> Spec:
    """Rating of each epoch over the updates, with the highest, whose weights were kept; a fraction as it is logged."""
    best = max(range(len(curve.values)), key=lambda i: curve.values[i])
    rows = [
        {"update": update, "rating": value, "best": i == best}
        for i, (update, value) in enumerate(zip(curve.updates, curve.values, strict=True))
    ]  # fmt: skip
    chosen = {"test": "datum.best"}
    return _spec(
        rows, height=170,
        encoding={
            "x": {"field": "update", "type": "quantitative", "title": "update"},
            "y": {"field": "rating", "type": "quantitative", "title": title, "scale": {"zero": False}},
            "tooltip": [{"field": "update", "format": ".0f"}, {"field": "rating", "format": ".4f", "title": title}],
        },
        layer=[
            {"mark": {"type": "line", "color": SERIES[0], "strokeWidth": 1.6}},
            {"mark": {"type": "point", "filled": True, "opacity": 1},
             "encoding": {"size": {"condition": {**chosen, "value": 110}, "value": 16},
                          "color": {"condition": {**chosen, "value": SERIES[1]}, "value": SERIES[0]}}},
            {"transform": [{"filter": chosen["test"]}], "mark": {"type": "text", "dy": -14, "fontSize": 12},
             "encoding": {"text": {"field": "rating", "format": ".3f"}}},
        ],
    )  # fmt: skip


def share_chart(shares: Mapping[str, Sequence[float]], title: str) -> Spec:
    """Histogram of fractions in [0, 1] over images, a bar for each stage of ``shares``."""
    bins = [f"{10 * i}–{10 * i + 10}" for i in range(10)]
    rows = [
        {"stage": stage, "bin": name, "images": sum(min(9, int(10 * value)) == i for value in values)}
        for stage, values in shares.items() for i, name in enumerate(bins)
    ]  # fmt: skip
    stages = list(shares)
    return _spec(
        rows, height=150, mark={"type": "bar"},
        encoding={
            "x": {"field": "bin", "type": "ordinal", "sort": bins, "title": title,
                  "axis": {"labelAngle": 0, "labelOverlap": "greedy"}},
            "y": {"field": "images", "type": "quantitative", "title": "images"},
            "xOffset": {"field": "stage", "sort": stages},
            "color": {"field": "stage", "type": "nominal", "sort": stages, "title": None},
            "tooltip": [{"field": "stage"}, {"field": "bin", "title": title}, {"field": "images"}],
        },
    )

"""The charts of the page as Vega-Lite specifications, built by Altair; their colours come from the page's theme.

Charts of a pair are drawn from the data set "pair", which the page puts in for the pair that is chosen.
"""

from __future__ import annotations

import math
from typing import Any

from rmfast.audit.data import Audit, Bias
from rmfast.plots import needed

_SUBSETS = 60  # that can be read in one chart; the table has all
_LABEL = 180  # pixels of a name at most
_NAME = 120  # characters of it: a name may be a text
_HEIGHT = 260


def charts_of(audit: Audit) -> dict[str, dict[str, Any]]:
    """Specifications by the name of the place where the page has each.

    Raises:
        ImportError: Altair is not installed.
    """
    alt = altair()
    made = {
        "accuracy": _accuracy(alt, audit),
        "calibration": _calibration(alt, audit),
        "margins": _margins(alt, audit),
        "lengths": _lengths(alt, audit),
        "spearman": _spearman(alt, audit),
        "sides": _sides(alt, audit),
        "tokens": _tokens(alt),
        "lens": _lens(alt),
        "sweep": _sweep(alt),
    }
    specs = {name: chart.to_dict() for name, chart in made.items() if chart is not None}
    for spec in specs.values():
        del spec["config"]  # the theme's
    return specs


def altair() -> Any:
    """Altair; its ImportError names the extra."""
    try:
        return needed("altair", "the page of an audit")
    except ImportError as error:
        raise ImportError(f'audits need Altair (pip install "rmfast[audit]"): {error}') from error


def _accuracy(alt: Any, audit: Audit) -> Any:
    found = [row for row in audit.figures if row["measure"] == "accuracy"]
    most = sorted(found, key=lambda row: -row["n"])[:_SUBSETS]
    rows: list[dict[str, Any]] = []
    for row in found:
        if row in most:
            name = _cut(row["subset"])
            if any(other["name"] == name for other in rows):  # a line each, also where they begin alike
                name = f"{name} ({len(rows)})"
            rows.append({**row, "subset": name, "name": name})
    base = alt.Chart(alt.InlineData(values=rows), width="container", height=24 * len(rows))
    y = alt.Y("name:N", sort=None, title=None, axis=alt.Axis(labelLimit=_LABEL, ticks=False, domain=False))
    x = alt.Scale(domain=[0, 1])
    tip = [
        alt.Tooltip("name:N", title="subset"), alt.Tooltip("value:Q", format=".1%", title="accuracy"),
        alt.Tooltip("low:Q", format=".1%"), alt.Tooltip("high:Q", format=".1%"), alt.Tooltip("n:Q", title="pairs"),
    ]  # fmt: skip
    half = alt.Chart(alt.InlineData(values=[{"half": 0.5}])).mark_rule(strokeDash=[3, 3]).encode(x="half:Q")
    lines = base.mark_rule(size=2).encode(x=alt.X("low:Q", scale=x), x2="high:Q", y=y)
    axis = alt.Axis(format="%", tickCount=5)
    points = base.mark_point(filled=True, size=70, opacity=1).encode(
        x=alt.X("value:Q", scale=x, title="accuracy", axis=axis), y=y, tooltip=tip
    )
    return alt.layer(half, lines, points)


def _cut(name: str) -> str:
    """As the page's table cuts it."""
    return name if len(name) <= _NAME else name[: _NAME - 3] + "..."


def _calibration(alt: Any, audit: Audit) -> Any:
    bins = audit.calibration["bins"]
    reach = max(each["margin"] for each in bins) * 1.1 or 1.0
    steps = [reach * i / 60 for i in range(61)]
    curve = alt.InlineData(values=[{"margin": m, "predicted": 1 / (1 + math.exp(-m))} for m in steps])
    y = alt.Scale(domain=[min(0.4, *(each["low"] or 0 for each in bins)), 1], nice=False)
    line = alt.Chart(curve, width="container", height=_HEIGHT).mark_line(strokeDash=[4, 3], color="gray")
    x = alt.X("margin:Q", title="|margin|", scale=alt.Scale(domain=[0, reach], nice=False))
    line = line.encode(x=x, y=alt.Y("predicted:Q", scale=y, title="accuracy"))
    base = alt.Chart(alt.InlineData(values=bins))
    tip = [
        alt.Tooltip("start:Q", format=".3g", title="|margin| from"), alt.Tooltip("end:Q", format=".3g", title="to"),
        alt.Tooltip("value:Q", format=".1%", title="accuracy"), alt.Tooltip("predicted:Q", format=".1%"),
        alt.Tooltip("n:Q", title="pairs"),
    ]  # fmt: skip
    rules = base.mark_rule(size=2).encode(x="margin:Q", y=alt.Y("low:Q", scale=y), y2="high:Q")
    axis = alt.Axis(format="%")
    points = base.mark_point(filled=True, size=70, opacity=1).encode(
        x="margin:Q", y=alt.Y("value:Q", scale=y, title="accuracy", axis=axis), tooltip=tip
    )
    return alt.layer(line, rules, points)


def _margins(alt: Any, audit: Audit) -> Any:
    values = [{**bar, "side": "right" if bar["start"] >= 0 else "wrong"} for bar in audit.calibration["bars"]]
    return (
        alt.Chart(alt.InlineData(values=values), width="container", height=_HEIGHT)
        .mark_bar(binSpacing=1)
        .encode(
            x=alt.X("start:Q", bin=alt.BinParams(binned=True), title="margin: chosen less rejected"),
            x2="end:Q",
            y=alt.Y("n:Q", title="pairs"),
            color=_two(alt, "right", "wrong"),
            tooltip=[alt.Tooltip("start:Q", format=".3g"), alt.Tooltip("end:Q", format=".3g"), "n:Q"],
        )
    )


def _lengths(alt: Any, audit: Audit) -> Any:
    dots = alt.Chart(alt.InlineData(values=audit.lengths["dots"]), width="container", height=300)
    dots = dots.mark_circle(size=14, opacity=0.45).encode(
        x=alt.X("characters:Q", title="characters of the response"),
        y=alt.Y("reward:Q", scale=alt.Scale(zero=False), title="reward"),
        color=_two(alt, "chosen", "rejected"),
        tooltip=["characters:Q", alt.Tooltip("reward:Q", format=".4g"), "side:N"],
    )
    trend = alt.Chart(alt.InlineData(values=audit.lengths["trend"]))
    x, y = "characters:Q", alt.Y("value:Q", title="reward")
    line = trend.mark_line(size=2.5, color="gray", point=alt.OverlayMarkDef(color="gray", filled=True, size=45))
    band = trend.mark_rule(size=2, color="gray").encode(x=x, y="low:Q", y2="high:Q")
    return alt.layer(dots, band, line.encode(x=x, y=y))


def _two(alt: Any, first: str, second: str, field: str = "side") -> Any:
    legend = alt.Legend(title=None, orient="top", symbolType="circle")
    return alt.Color(f"{field}:N", scale=alt.Scale(domain=[first, second]), legend=legend)


def _spearman(alt: Any, audit: Audit) -> Any:
    rows = _models([row for row in audit.biases["rows"] if row["measure"] == "spearman"], "{attribute}")
    return _bars(alt, rows, "Spearman's correlation with the reward", None, "+.3f", 0.0)


def _sides(alt: Any, audit: Audit) -> Any:
    rows = []
    for measure, name in (("accuracy_more", "chosen has more"), ("accuracy_less", "chosen has less")):
        rows += _models([row for row in audit.biases["rows"] if row["measure"] == measure], "{attribute}, " + name)
    order = {row["attribute"]: i for i, row in enumerate(audit.biases["rows"])}
    return _bars(alt, sorted(rows, key=lambda row: order[row["attribute"]]), "accuracy", [0, 1], ".1%", 0.5)


def _models(rows: list[Bias], name: str) -> list[dict[str, Any]]:
    """A row for each model, without those that have nothing to compare."""
    found = []
    for row in rows:
        for model, figure in (("before", row["before"]), ("after", row["after"])):
            if figure is not None and figure["value"] is not None:
                named = name.format(attribute=row["attribute"])
                found.append({**figure, "model": model, "name": named, "attribute": row["attribute"]})
    return found


def _bars(alt: Any, rows: list[dict[str, Any]], title: str, domain: Any, number: str, line: float) -> Any:
    """Points with intervals of both models, a line for each name."""
    if not rows:
        return None
    scale = alt.Scale(domain=domain) if domain else alt.Scale(nice=True)
    base = alt.Chart(alt.InlineData(values=rows), width="container", height=32 * len({row["name"] for row in rows}))
    y = alt.Y("name:N", sort=None, title=None, axis=alt.Axis(labelLimit=_LABEL, ticks=False, domain=False, grid=True))
    offset = alt.YOffset("model:N", sort=["before", "after"], scale=alt.Scale(paddingOuter=0.4))
    color = _two(alt, "before", "after", "model")
    tip = [
        alt.Tooltip("name:N", title="of"), "model:N", alt.Tooltip("value:Q", format=number, title=title),
        alt.Tooltip("low:Q", format=number), alt.Tooltip("high:Q", format=number), "n:Q",
    ]  # fmt: skip
    zero = alt.Chart(alt.InlineData(values=[{"at": line}])).mark_rule(strokeDash=[3, 3]).encode(x="at:Q")
    rules = base.mark_rule(size=2).encode(
        x=alt.X("low:Q", scale=scale), x2="high:Q", y=y, yOffset=offset, color=color
    )  # fmt: skip
    axis = alt.Axis(format="%" if "%" in number else ".2~f")
    points = base.mark_point(filled=True, size=60, opacity=1).encode(
        x=alt.X("value:Q", scale=scale, title=title, axis=axis), y=y, yOffset=offset, color=color, tooltip=tip
    )
    return alt.layer(zero, rules, points)


def _tokens(alt: Any) -> Any:
    at = {side: alt.param(name=side, value=-1) for side in ("chosen", "rejected")}
    base = alt.Chart(alt.NamedData("pair"), width="container", height=220)
    lines = base.mark_line(size=2).encode(
        x=alt.X("at:Q", title="token (0: the last shared one)", axis=alt.Axis(tickMinStep=1)),
        y=alt.Y("value:Q", scale=alt.Scale(zero=False), title="reward if the text ended here"),
        color=_two(alt, "chosen", "rejected"),
        tooltip=["side:N", "at:Q", "token:N", alt.Tooltip("value:Q", format=".4g")],
    )
    here = f"datum.at === {at['chosen'].name} && datum.side === 'chosen' || "
    here += f"datum.at === {at['rejected'].name} && datum.side === 'rejected'"
    point = base.mark_point(filled=True, size=110, opacity=1).transform_filter(here)
    point = point.encode(x="at:Q", y="value:Q", color=_two(alt, "chosen", "rejected"))
    return alt.layer(lines, point).add_params(*at.values())


def _lens(alt: Any) -> Any:
    base = alt.Chart(alt.NamedData("pair"), width="container", height=_HEIGHT)
    return base.mark_line(size=2, point=alt.OverlayMarkDef(size=24, filled=True)).encode(
        x=alt.X("layer:Q", title="layer (0: embedding)", axis=alt.Axis(tickMinStep=1)),
        y=alt.Y("reward:Q", scale=alt.Scale(zero=False), title="reward"),
        color=_two(alt, "chosen", "rejected"),
        tooltip=["side:N", "layer:Q", alt.Tooltip("reward:Q", format=".4g")],
    )


def _sweep(alt: Any) -> Any:
    base = alt.Chart(alt.NamedData("pair"), width="container", height=1)  # and the domain: the page's, by pair
    words = alt.Axis(labelExpr="split(datum.label, '\\u0000')[1]", labelAngle=-90, labelLimit=90, ticks=False)
    legend = alt.Legend(title="effect on the reward", orient="top", gradientLength=180)
    return base.mark_rect().encode(
        x=alt.X("column:O", sort=None, title="tokens", axis=words),
        y=alt.Y("layer:O", sort="descending", title="layer", axis=alt.Axis(labelOverlap=True, ticks=False)),
        color=alt.Color("effect:Q", scale=alt.Scale(range="diverging", interpolate="rgb"), legend=legend),
        tooltip=[
            alt.Tooltip("token:N"), "layer:O", alt.Tooltip("effect:Q", format="+.4g"),
            alt.Tooltip("recovered:Q", format="+.1%", title="of the gap"),
        ],
    )  # fmt: skip

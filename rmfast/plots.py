"""Heat maps that several results share, what notebooks show of a result, and the optional libraries that draw."""

from __future__ import annotations

import base64
import html
import importlib
import io
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from rmfast.arguments import instance

_MOST_TICKS = {"x": 64, "y": 40}  # labels that can still be read on the largest figure, 14 by 9 inches


def reach_of(values: np.ndarray) -> float:
    """The largest finite |value|, 0 for none."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max(initial=0))


def needed(module: str, by: str) -> Any:
    """An optional module; an ImportError says what needs it and how to install it."""
    try:
        package, _, _ = module.partition(".")
        importlib.import_module(package)
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{by} needs {package} (pip install {package}): {error}") from error


def expect_axes(ax: Any) -> Any:
    """The axes; TypeError for what is nothing to draw on."""
    return instance("ax", ax, needed("matplotlib.axes", "plot").Axes, " of matplotlib")


def axes(ax: Any, width: float, height: float) -> Any:
    """What was given to draw on, or the axes of a new figure."""
    if ax is None:
        return needed("matplotlib.pyplot", "plot").subplots(figsize=(width, height), layout="constrained")[1]
    return expect_axes(ax)


def figure_size(rows: int, columns: int) -> tuple[float, float]:
    """Inches in which a map's cells and names can be read."""
    return min(max(3.0 + 0.22 * columns, 5), 14), min(max(2.5 + 0.16 * rows, 3), 9)


def heat_map(
    axis: Any, grid: np.ndarray, layers: list[str], columns: list[str], name: str, *, reach: float | None = None,
    centre: float = 0.0, **options: Any,
) -> None:  # fmt: skip
    """Draws layers (rows, the first at the bottom) by columns; colours go from centre − reach to centre + reach."""
    reach = (reach_of(grid - centre) or 1.0) if reach is None else reach
    limits = {} if "norm" in options else {"vmin": centre - reach, "vmax": centre + reach}
    style = {"cmap": "RdBu_r", "aspect": "auto", "origin": "lower", "interpolation": "nearest"}
    image = axis.imshow(grid, **{**style, **limits, **options})
    axis.set_facecolor("0.8")
    axis.set_ylabel("layer")
    _ticks(axis, "x", columns)
    _ticks(axis, "y", layers)
    axis.figure.colorbar(image, ax=axis, label=name)


def _ticks(axis: Any, which: Literal["x", "y"], names: list[str]) -> None:
    """Name the ticks, every one or as many as can be read."""
    step = -(-len(names) // _MOST_TICKS[which])
    getattr(axis, f"set_{which}ticks")(range(0, len(names), step))
    labels = getattr(axis, f"set_{which}ticklabels")(names[::step], fontsize=8)
    for label in labels:
        label.set_parse_math(False)  # a "$" in a text is no formula
        if which == "x" and len("  ".join(names)) > 40:  # what fits side by side on the smallest figure
            label.set_rotation(90)


def shown_figure(plot: Callable[[], Any], text: str) -> str:
    """For notebooks, what `plot` draws as an image in HTML, an SVG; where there is no matplotlib, `text`.

    An image runs no script, whatever its tokens say, and its figure is closed, or the notebook would show it again.
    """
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return f"<pre>{html.escape(text)}</pre>"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of a language that the font lacks
        drawn = plot()
        figure, file = (drawn if hasattr(drawn, "figure") else drawn[0]).figure, io.BytesIO()
        try:
            figure.savefig(file, format="svg", metadata={"Date": None})
        finally:
            pyplot.close(figure)
    image = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/svg+xml;base64,{image}" style="max-width: 100%">'


def shown_table(names: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> str:
    """For notebooks, a table in HTML; floats have four significant digits, NaN is a dash."""

    def cell(value: Any) -> str:
        if not isinstance(value, float):
            return f"<td>{html.escape(str(value))}</td>"
        return f'<td style="text-align: right">{"–" if math.isnan(value) else f"{value:.4g}"}</td>'

    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

"""Heat maps that several results share, and the optional libraries that draw them."""

from __future__ import annotations

import importlib
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

"""`PatchSweep`: the rewards of a grid of patched runs, with named axes; to read, rank, draw and keep."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rmfast.arguments import sequence, whole, word
from rmfast.patching import stored
from rmfast.patching.sites import UNITS
from rmfast.plots import expect_axes, figure_size, heat_map, needed, reach_of, shown_figure

AXES = ("site", "layer", "position", "head", "neuron", "unit", "label")  # the order in any grid
Value = Literal["effect", "recovered", "rewards", "divergence"]
_TENSORS = ("rewards", "clean_reward", "corrupted_reward", "divergence")


@dataclass(eq=False, repr=False, kw_only=True)
class PatchSweep:
    """Rewards of one base run, patched at each site of a grid.

    Attributes:
        rewards: one dimension for each axis, CPU, fp32 (fp64 for an fp64 model); NaN where a position has no partner in
            the other run, a site was not screened, or a kind has fewer units than another.
        axes: names of the dimensions, in the order of `AXES`.
        coords: coordinates along each axis. site: kinds (`rmfast.patching.sites`); layer, head, neuron, unit, label:
            ints; position: lists of the base run's token positions that are patched together. A coordinate that is the
            same in all of the grid has one entry and need not be an axis.
        clean_reward: (), or (K,) where there is a label axis.
        corrupted_reward: the same; None where no corrupted text was run.
        base: "clean" or "corrupted", the run that was patched.
        mode: what was put in: "denoising", "noising", "zero", "mean", "resample" or "values".
        tokens, token_ids: of the base run.
        unpaired: positions of the base run without a partner in the other.
        run: edits that were run.
        without_effect: edits that provably change nothing; they carry the base reward.
        engine: "suffix" (layer and prefix reuse) or "layers" (layer reuse alone).
        method: "patching", or "attribution" for linear estimates of the same rewards.
        screen: what chose the sites that were run ({"method", "top", "spearman", "n"}), or None.
        divergence: as `rewards` without the label axis, where a reference was given (`rmfast.patching.divergence`): how
            far what is put in is from what the model makes there. Beyond 1 or below −1 it lies outside of what the
            reference holds. NaN where nothing was run, or the reference cannot tell.
        reference: of that reference {"level", "texts", "held_out"}, or None.
        patterns: "own", or "frozen": attention of all edited runs has the base run's probabilities.
    """

    rewards: Tensor
    axes: tuple[str, ...]
    coords: dict[str, list]
    clean_reward: Tensor
    corrupted_reward: Tensor | None = None
    base: str
    mode: str
    tokens: list[str]
    token_ids: list[int]
    unpaired: int = 0
    run: int = 0
    without_effect: int = 0
    engine: str
    method: str = "patching"
    screen: dict[str, Any] | None = None
    divergence: Tensor | None = None
    reference: dict[str, Any] | None = None
    patterns: str = "own"

    def __post_init__(self) -> None:
        if list(self.axes) != [axis for axis in AXES if axis in self.axes]:
            raise ValueError(f"Expected axes among {', '.join(AXES)}, in this order, got {self.axes}")
        shape = tuple(len(self.coords[axis]) for axis in self.axes)
        if tuple(self.rewards.shape) != shape:
            raise ValueError(f"Expected rewards of shape {shape} by the coordinates, got {tuple(self.rewards.shape)}")
        shape = shape[: -1 if "label" in self.axes else None]
        if self.divergence is not None and tuple(self.divergence.shape) != shape:
            raise ValueError(f"Expected divergence of shape {shape}, got {tuple(self.divergence.shape)}")
        if more := [axis for axis, entries in self.coords.items() if axis not in self.axes and len(entries) != 1]:
            raise ValueError(f"Expected one coordinate where there is no axis, got more for {', '.join(more)}")

    def __repr__(self) -> str:
        sizes = " × ".join(f"{axis} {size}" for axis, size in zip(self.axes, self.rewards.shape))
        kinds = self.coords.get("site", [])
        parts = [self._mode, *(kinds if len(kinds) == 1 else []), sizes or "one site"]
        gap = [_number(reward) for reward in (self.base_reward, self.other_reward) if reward is not None]
        parts.append(f"reward {' -> '.join(gap)}")
        for row in self.top(1):
            where = "".join(f"{axis} {getattr(row, axis)} " for axis in self.axes)
            parts.append(f"strongest {where}{row.token!r} {row.effect:+.4g}")
        return f"PatchSweep({', '.join(parts)})"

    def _repr_html_(self) -> str:
        """For notebooks: `plot`."""
        return shown_figure(self.plot, repr(self))

    @property
    def _mode(self) -> str:
        frozen = " with frozen patterns" if self.patterns == "frozen" else ""
        return self.mode + frozen + (" by attribution" if self.method == "attribution" else "")

    @property
    def base_reward(self) -> Tensor:
        """() or (K,): of the run that was patched, as it was."""
        reward = self.clean_reward if self.base == "clean" else self.corrupted_reward
        assert reward is not None
        return reward

    @property
    def other_reward(self) -> Tensor | None:
        """() or (K,): of the run that the activations came from; None where they came from none."""
        return self.corrupted_reward if self.base == "clean" else self.clean_reward

    @property
    def effect(self) -> Tensor:
        """`rewards` less the base reward."""
        return self.rewards - self.base_reward

    @property
    def recovered(self) -> Tensor:
        """The effect as a share of the whole gap, other less base reward: 1 is all of it.

        Raises:
            ValueError: there is no other run.
        """
        if self.other_reward is None:
            raise ValueError(f"Expected a sweep of two runs for recovered, got mode {self.mode!r}, which has one")
        return self.effect / (self.other_reward - self.base_reward)

    @property
    def divergent(self) -> Tensor:
        """Bool, as `rewards`: whether what is put in is outside of what the model makes there, |divergence| > 1.

        Raises:
            ValueError: the sweep was given no reference.
        """
        return self._divergences.abs() > 1

    @property
    def _divergences(self) -> Tensor:
        """As `rewards`."""
        if self.divergence is None:
            raise ValueError("Expected a sweep with a reference for divergence: patch_sweep(..., reference=)")
        return self.divergence[..., None].expand_as(self.rewards) if "label" in self.axes else self.divergence

    def select(self, **coords: Any) -> PatchSweep:
        """The part of the grid at these coordinates: `select(layer=3, head=[0, 2])`.

        A single coordinate removes its axis, a list keeps it. A position is an int (the entry that holds this token)
        or the text that `top` gives for a group ("3-5,7"). Counts (`run`, ...) stay those of the whole sweep.

        Raises:
            ValueError: the axis or the coordinate is not in the grid.
        """
        given: dict[str, Any] = {name: getattr(self, name) for name in _TENSORS}
        axes, kept = list(self.axes), dict(self.coords)
        for axis, wanted in coords.items():
            if axis not in self.axes:
                raise ValueError(f"Expected an axis of {', '.join(self.axes) or 'none'}, got {axis!r}")
            several = isinstance(wanted, Iterable) and not isinstance(wanted, str)
            places = [self._place(axis, value) for value in (sequence(axis, wanted) if several else [wanted])]
            kept[axis] = [self.coords[axis][place] for place in places]
            index: Any = torch.tensor(places, dtype=torch.int64) if several else places[0]
            at = (slice(None),) * axes.index(axis) + (index,)
            given["rewards"] = given["rewards"][at]
            if axis != "label" and given["divergence"] is not None:
                given["divergence"] = given["divergence"][at]
            if axis == "label":
                for name in ("clean_reward", "corrupted_reward"):
                    given[name] = None if given[name] is None else given[name][index]
            if not several:
                axes.remove(axis)
        return replace(self, axes=tuple(axes), coords=kept, **given)

    def _place(self, axis: str, wanted: Any) -> int:
        """Where a coordinate lies along its axis."""
        entries = self.coords[axis]
        names = [span(entry) for entry in entries] if axis == "position" else entries
        wanted = wanted if isinstance(wanted, str) else whole(axis, wanted)
        if wanted in names:
            return names.index(wanted)
        if axis == "position":
            holding = [place for place, entry in enumerate(entries) if wanted in entry]
            if len(holding) == 1:
                return holding[0]
        shown = ", ".join(map(str, names if len(names) <= 8 else [*names[:4], "...", *names[-3:]]))
        raise ValueError(f"Expected {axis} to be one of {shown}, got {wanted!r}")

    def top(self, n: int = 10, by: Value = "effect") -> list[Any]:
        """The n sites of largest |effect| (or of what `by` names), largest first; sites that are NaN are left out.

        Returns:
            Named tuples of every coordinate, then token, reward, effect and recovered (None without another run), and
            in a sweep with a reference divergence. A position is an int, or for a group the text "3-5,7"; token is the
            text there.

        Raises:
            ValueError: `by` is of another name, "recovered" without another run, or "divergence" without a reference.
        """
        whole("n", n, 0)
        size = self._values("by", by).abs().double().numpy().ravel()
        order = np.argsort(-size, kind="stable")  # NaN last
        return self._rows(order[~np.isnan(size[order])][:n])

    def rows(self) -> list[Any]:
        """All sites in grid order, NaN ones included, as the named tuples of `top`."""
        return self._rows(np.arange(self.rewards.numel()))

    def to_dataframe(self) -> Any:
        """A pandas DataFrame of all sites in grid order, NaN ones included, with the columns of `top`.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = needed("pandas", "to_dataframe")
        return pandas.DataFrame(self._columns(np.arange(self.rewards.numel()))).astype({"recovered": float})

    def _rows(self, flat: np.ndarray) -> list[Any]:
        columns = self._columns(flat)
        row = namedtuple("Site", columns)  # type: ignore[misc]
        return list(map(row._make, zip(*columns.values())))

    def _columns(self, flat: np.ndarray) -> dict[str, list]:
        """Coordinates and values of the sites at these places of the flattened grid."""
        shape = tuple(self.rewards.shape)
        at = dict(zip(self.axes, np.unravel_index(flat, shape) if shape else ()))
        names = {axis: self.coords[axis] for axis in AXES if axis in self.coords}
        columns = {}
        for axis, entries in names.items():
            places = at.get(axis, np.zeros(len(flat), np.int64)).tolist()
            if axis == "position":
                texts = [self._text(entry) for entry in entries]
                columns["token"] = [texts[place] for place in places]
                entries = [span(entry) for entry in entries]
            columns[axis] = [entries[place] for place in places]
        columns["token"] = columns.pop("token", [""] * len(flat))  # behind the coordinates
        columns["reward"] = self.rewards.reshape(-1)[flat].tolist()
        columns["effect"] = self.effect.reshape(-1)[flat].tolist()
        known = self.other_reward is not None
        columns["recovered"] = self.recovered.reshape(-1)[flat].tolist() if known else [None] * len(flat)
        if self.divergence is not None:
            columns["divergence"] = self._divergences.reshape(-1)[flat].tolist()
        return columns

    def _text(self, positions: Sequence[int]) -> str:
        """The tokens at some positions, the middle of a long group left out."""
        words = [self.tokens[position] for position in positions]
        return "".join(words) if len(words) <= 4 else f"{words[0]} … {words[-1]}"

    def _values(self, argument: str, name: str) -> Tensor:
        word(argument, name, ("effect", "recovered", "rewards", "divergence"))
        return self._divergences if name == "divergence" else getattr(self, name)

    def save(self, folder: str | Path) -> None:
        """Write `sweep.safetensors` and `sweep.json` to a folder, made where there is none. `load` gives all back."""
        stored.save(self, folder, "sweep", _TENSORS)

    @classmethod
    def load(cls, folder: str | Path) -> PatchSweep:
        """The sweep that `save` wrote to a folder, exactly.

        Raises:
            ValueError: the folder holds none, or one of another version.
        """
        return stored.load(cls, folder, "sweep", lambda rest: {**rest, "axes": tuple(rest["axes"])})

    def plot(self, value: Value = "effect", ax: Any = None, **options: Any) -> Any:
        """Heat map of layers (rows) by positions (columns), one for each site and label.

        Where there is a unit axis, a cell shows the unit of largest |value|; where all positions are patched jointly,
        or one is selected, columns are units, or else sites. Colours are centred at 0 (for rewards at the base reward)
        and share their scale among sites; sites that are NaN are grey. Where the sweep has a reference, crosses mark
        what is `divergent`, on all maps but that of the divergence, whose colours end at ±1 at the least.

        Args:
            value: what is drawn.
            ax: the matplotlib Axes to draw on, or a sequence of one for each map; default: a new figure.
            options: for `Axes.imshow`.

        Returns:
            The Axes, or an array of Axes where there are several maps.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: as many Axes as there are maps were not given; errors of `recovered`.
        """
        pyplot = needed("matplotlib.pyplot", "plot")
        marked = self.divergence is not None and value != "divergence"
        maps = self._maps(self._values("value", value), self.divergent if marked else torch.zeros_like(self.rewards))
        if ax is None:
            axes = _axes(pyplot, maps)
        else:
            several = isinstance(ax, Iterable)
            axes = np.array([expect_axes(each) for each in (np.ravel(sequence("ax", ax)) if several else [ax])])
            if len(axes) != len(maps):
                raise ValueError(f"Expected ax to be {len(maps)} Axes, one for each map, got {len(axes)}")
        base = np.atleast_1d(self.base_reward.double().numpy())
        for axis, drawn in zip(axes, maps):
            centre = base[drawn.label] if value == "rewards" else 0.0
            reach = max(reach_of(other.grid - centre) for other in maps if other.label == drawn.label) or 1.0
            reach = max(reach, 1.0) if value == "divergence" else reach
            layers = list(map(str, self.coords.get("layer", [""])))
            name = "reward" if value == "rewards" else value
            heat_map(axis, drawn.grid, layers, drawn.columns, name, reach=reach, centre=centre, **options)
            axis.set_title(drawn.title)
            axis.set_xlabel(drawn.across)
            style: dict[str, Any] = {"color": "0.15", "markersize": 4, "markeredgewidth": 0.8, "linestyle": ""}
            axis.plot(*np.argwhere(drawn.marks.T).T, marker="x", scalex=False, scaley=False, **style)
        return axes if len(maps) > 1 else axes[0]

    def _maps(self, values: Tensor, marked: Tensor) -> list[_Map]:
        """The maps of all sites and labels."""
        sizes = dict(zip(self.axes, values.shape))
        unit = next((axis for axis in ("head", "neuron", "unit") if axis in self.axes), "unit")
        shape = [sizes.get(axis, 1) for axis in ("site", "layer", "position", unit, "label")]
        grid, marks = values.double().numpy().reshape(shape), marked.bool().numpy().reshape(shape)
        sites, labels = self.coords.get("site", [""]), self.coords.get("label", [None])
        positions = self.coords.get("position", [[]])
        names = [f"{span(entry)} {self._text(entry)!r}" for entry in positions]
        shared = f", position {names[0]}" if len(positions) == 1 and positions[0] else ""
        maps = []
        if grid.shape[2] == grid.shape[3] == 1:  # sites side by side
            for k, label in enumerate(labels):
                title = self._mode + shared + _label(label)
                both = grid[:, :, 0, 0, k].T, marks[:, :, 0, 0, k].T
                maps.append(_Map(*both, list(map(str, sites)), "site", title, k))
            return maps
        for (s, site), (k, label) in product(enumerate(sites), enumerate(labels)):
            part, mark, kind = grid[s, ..., k], marks[s, ..., k], UNITS.get(site, unit)
            if site and site not in UNITS:
                part, mark = part[..., :1], mark[..., :1]  # units beyond it are other sites'
            title = self._mode + (f": {site}" if site else "")
            several = part.shape[2] > 1
            if grid.shape[2] == 1:
                units = [str(i) for i in self.coords[unit]] if several else [str(site)]
                title += shared + _label(label)
                maps.append(_Map(part[:, 0], mark[:, 0], units, kind if several else "site", title, k))
            else:
                strongest = np.where(np.isnan(part), -1, abs(part)).argmax(-1)[..., None]
                title += (f", strongest {kind} of each cell" if several else "") + _label(label)
                shown, crossed = (np.take_along_axis(of, strongest, -1)[..., 0] for of in (part, mark))
                maps.append(_Map(shown, crossed, names, "position", title, k))
        return maps


@dataclass(frozen=True)
class _Map:
    """What one heat map shows: grid and marks (layers, columns), names of the columns, and which label it is of."""

    grid: np.ndarray
    marks: np.ndarray
    columns: list[str]
    across: str
    title: str
    label: int


def span(positions: Sequence[int]) -> int | str:
    """A group of positions in short: 5 for a single one, else as "3-5,7"."""
    if len(positions) == 1:
        return int(positions[0])
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == runs[-1][1] + 1:
            runs[-1][1] = position
        else:
            runs.append([position, position])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _label(label: int | None) -> str:
    return "" if label is None else f", label {label}"


def _number(reward: Tensor) -> str:
    return f"{reward.item():.4g}" if reward.dim() == 0 else f"[{', '.join(f'{x:.4g}' for x in reward.tolist())}]"


def _axes(pyplot: Any, maps: list[_Map]) -> np.ndarray:
    """Axes of a new figure with room for the maps: side by side, or one below the other where they are wide."""
    width, height = figure_size(maps[0].grid.shape[0], max(len(drawn.columns) for drawn in maps))
    down, across = (len(maps), 1) if width > 8 else (1, len(maps))
    size = width * across, height * down
    return pyplot.subplots(down, across, figsize=size, layout="constrained", squeeze=False)[1].ravel()

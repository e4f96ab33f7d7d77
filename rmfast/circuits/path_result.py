"""`PathPatch`: the rewards of runs in which one path is patched, senders by receivers; to read, rank, draw and keep."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from rmfast.arguments import whole, word
from rmfast.circuits.nodes import Node, with_nodes
from rmfast.patching import stored
from rmfast.patching.grid import span
from rmfast.plots import axes as axes_of
from rmfast.plots import figure_size, heat_map, needed, shown_figure

Value = Literal["effect", "recovered", "rewards"]
_TENSORS = ("rewards", "clean_reward", "corrupted_reward")


@dataclass(eq=False, repr=False, kw_only=True)
class PathPatch:
    """Rewards of one base run, patched along each path of a grid.

    Attributes:
        rewards: (senders, receivers[, positions][, labels]), one dimension for each axis, CPU, fp32 (fp64 for an fp64
            model); NaN where no path leads from the sender to the receiver, it was not asked for, or none of the
            positions has a partner in the other run.
        axes: "sender", "receiver", and where there are several "position" and "label".
        senders, receivers: `rmfast.circuits.nodes.Node`.
        positions: lists of the base run's token positions at which the sender is changed together.
        clean_reward, corrupted_reward: () or (K,) where there is a label axis.
        base: "clean" or "corrupted", the run that was patched.
        mode: "noising" or "denoising".
        through: "residual", or "mlps" where MLPs between sender and receiver are run anew.
        tokens, token_ids: of the base run.
        unpaired: positions of the base run without a partner in the other.
        run: paths that were run.
        without_effect: paths that provably change nothing; they carry the base reward.
        engine: "suffix" or "layers".
    """

    rewards: Tensor
    axes: tuple[str, ...]
    senders: list[Node]
    receivers: list[Node]
    positions: list[list[int]]
    clean_reward: Tensor
    corrupted_reward: Tensor
    base: str
    mode: str
    through: str
    tokens: list[str]
    token_ids: list[int]
    unpaired: int = 0
    run: int = 0
    without_effect: int = 0
    engine: str

    def __post_init__(self) -> None:
        labels = self.rewards.size(-1) if self.axes[-1] == "label" else 1
        sizes = {"sender": len(self.senders), "receiver": len(self.receivers), "position": len(self.positions)}
        shape = tuple((sizes | {"label": labels})[axis] for axis in self.axes)
        if tuple(self.rewards.shape) != shape:
            raise ValueError(f"Expected rewards of shape {shape} by the nodes, got {tuple(self.rewards.shape)}")

    def __repr__(self) -> str:
        sizes = " × ".join(f"{axis} {size}" for axis, size in zip(self.axes, self.rewards.shape))
        rewards = [x.reshape(-1).tolist() for x in (self.base_reward, self.other_reward)]
        gap = " -> ".join(", ".join(f"{x:.4g}" for x in each) for each in rewards)
        parts = [self.mode, *(["through MLPs"] if self.through == "mlps" else []), sizes, f"reward {gap}"]
        for row in self.top(1):
            at = "" if len(self.positions) == 1 else f" at {row.position}"
            parts.append(f"strongest {row.sender} -> {row.receiver}{at} {row.effect:+.4g}")
        return f"PathPatch({', '.join(parts)})"

    def _repr_html_(self) -> str:
        """For notebooks: `plot`."""
        return shown_figure(self.plot, repr(self))

    @property
    def base_reward(self) -> Tensor:
        """() or (K,): of the run that was patched, as it was."""
        return self.clean_reward if self.base == "clean" else self.corrupted_reward

    @property
    def other_reward(self) -> Tensor:
        """() or (K,): of the run that senders' changes came from."""
        return self.corrupted_reward if self.base == "clean" else self.clean_reward

    @property
    def effect(self) -> Tensor:
        """`rewards` less the base reward."""
        return self.rewards - self.base_reward

    @property
    def recovered(self) -> Tensor:
        """The effect as a share of the whole gap, other less base reward."""
        return self.effect / (self.other_reward - self.base_reward)

    def top(self, n: int = 10, by: Value = "effect") -> list[Any]:
        """The n paths of largest |effect| (or of what `by` names), largest first; those that are NaN are left out.

        Returns:
            Named tuples (sender, receiver, position, label, reward, effect, recovered). A position is an int, or for a
            group the text "3-5,7"; label is 0 where there is one.
        """
        whole("n", n, 0)
        size = self._values("by", by).abs().double().numpy().ravel()
        order = np.argsort(-size, kind="stable")  # NaN last
        return self._rows(order[~np.isnan(size[order])][:n])

    def rows(self) -> list[Any]:
        """All cells in grid order, NaN ones included, as the named tuples of `top`."""
        return self._rows(np.arange(self.rewards.numel()))

    def to_dataframe(self) -> Any:
        """A pandas DataFrame of all cells in grid order, NaN ones included, with the columns of `top`, nodes as text.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = needed("pandas", "to_dataframe")
        columns = self._columns(np.arange(self.rewards.numel()))
        return pandas.DataFrame({**columns, **{name: list(map(str, columns[name])) for name in ("sender", "receiver")}})

    def _rows(self, flat: np.ndarray) -> list[Any]:
        columns = self._columns(flat)
        row = namedtuple("Path", columns)  # type: ignore[misc]
        return list(map(row._make, zip(*columns.values())))

    def _columns(self, flat: np.ndarray) -> dict[str, list]:
        """Nodes and values of the cells at these places of the flattened grid."""
        at = dict(zip(self.axes, np.unravel_index(flat, tuple(self.rewards.shape))))
        none = np.zeros(len(flat), np.int64)
        position, label = (at.get(axis, none).tolist() for axis in ("position", "label"))
        spans = [span(group) for group in self.positions]
        return {
            "sender": [self.senders[i] for i in at["sender"]],
            "receiver": [self.receivers[i] for i in at["receiver"]],
            "position": [spans[i] for i in position],
            "label": label,
            "reward": self.rewards.reshape(-1)[flat].tolist(),
            "effect": self.effect.reshape(-1)[flat].tolist(),
            "recovered": self.recovered.reshape(-1)[flat].tolist(),
        }

    def _values(self, argument: str, name: str) -> Tensor:
        return getattr(self, word(argument, name, ("effect", "recovered", "rewards")))

    def plot(self, value: Value = "effect", ax: Any = None, *, label: int = 0, **options: Any) -> Any:
        """Heat map of senders (rows) by receivers (columns); of several positions each cell shows the strongest.

        Colours are centred at 0 (for rewards at the base reward); cells without a path are grey.

        Args:
            value: what is drawn.
            ax: the matplotlib Axes to draw on; default: a new figure.
            label: which reward of a model with K > 1.
            options: for `Axes.imshow`.

        Returns:
            The Axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        grid, base = self._values("value", value), self.base_reward
        if "label" in self.axes:
            which = whole("label", label, 0, grid.size(-1) - 1)
            grid, base = grid[..., which], base[which]
        cells = grid.double().numpy()
        centre = float(base) if value == "rewards" else 0.0
        if "position" in self.axes:
            size = np.where(np.isnan(cells), -1, abs(cells - centre))
            cells = np.take_along_axis(cells, size.argmax(-1)[..., None], -1)[..., 0]
        ax = axes_of(ax, *figure_size(*cells.shape))
        down, across = (list(map(str, nodes)) for nodes in (self.senders, self.receivers))
        heat_map(ax, cells, down, across, "reward" if value == "rewards" else value, centre=centre, **options)
        ax.set_ylabel("sender")
        ax.set_xlabel("receiver")
        several = ", strongest position of each path" if "position" in self.axes else ""
        ax.set_title(f"{self.mode}{' through MLPs' if self.through == 'mlps' else ''}{several}")
        return ax

    def save(self, folder: str | Path) -> None:
        """Write `paths.safetensors` and `paths.json` to a folder, made where there is none. `load` gives all back."""
        stored.save(self, folder, "paths", _TENSORS)

    @classmethod
    def load(cls, folder: str | Path) -> PathPatch:
        """The result that `save` wrote to a folder, exactly.

        Raises:
            ValueError: the folder holds none, or one of another version.
        """
        return stored.load(cls, folder, "paths", lambda rest: {**with_nodes(rest), "axes": tuple(rest["axes"])})

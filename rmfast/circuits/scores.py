"""`EdgeScores`: a number for each edge of a model, to rank, screen, draw and keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from rmfast import arguments
from rmfast.circuits.nodes import Node, with_nodes
from rmfast.patching import stored
from rmfast.plots import axes, figure_size, heat_map, needed, shown_figure

_TENSORS = ("scores", "error")


class Edge(NamedTuple):
    """A sender, a receiver that reads it, and the edge's score."""

    sender: Node
    receiver: Node
    score: float = float("nan")

    def __str__(self) -> str:
        return f"{self.sender} -> {self.receiver}"


class Screened(NamedTuple):
    """The edges of largest |score| as exact path patching takes them.

    Attributes:
        senders, receivers: every node of the edges once, in the model's order.
        edges: the pairs, largest first.
        calls: for each sender those of its receivers that are among the edges: a run for each edge and no other.
    """

    senders: list[Node]
    receivers: list[Node]
    edges: list[tuple[Node, Node]]
    calls: list[tuple[Node, list[Node]]]


@dataclass(eq=False, repr=False, kw_only=True)
class EdgeScores:
    """What edge attribution patching estimates for each edge: the change of the metric if it were patched.

    Attributes:
        scores: (U, V) fp64, senders by receivers, or (T, U, V) where each token has its own; NaN where a receiver does
            not read a sender.
        error: (U, V) the standard error of the mean over pairs, or None (one pair, weights).
        senders, receivers: U and V nodes, in the model's order.
        method: "EAP" or "EAP-IG".
        steps: gradients that were taken for a pair.
        rule: "clean", or where on the way between the embeddings the gradients were taken ("midpoint", "left").
        clean, corrupted: the metric of both runs, in the mean over pairs (with `weights`, their weighted sum).
        pairs: how many.
        tokens: (T,) where each has its own scores, else None.
        dtype: in which the model ran.
    """

    scores: Tensor
    error: Tensor | None = None
    senders: list[Node]
    receivers: list[Node]
    method: str
    steps: int
    rule: str
    clean: float
    corrupted: float
    pairs: int = 1
    tokens: list[str] | None = None
    dtype: str

    def __post_init__(self) -> None:
        shape = (*([] if self.tokens is None else [len(self.tokens)]), len(self.senders), len(self.receivers))
        for name, given, wanted in (("scores", self.scores, shape), ("error", self.error, shape[-2:])):
            if given is not None and tuple(given.shape) != wanted:
                raise ValueError(f"Expected {name} of shape {wanted} by the nodes, got {tuple(given.shape)}")

    @property
    def joint(self) -> Tensor:
        """(U, V), the sum over tokens."""
        return self.scores if self.tokens is None else self.scores.sum(0)

    @property
    def edges(self) -> int:
        """How many edges the model has."""
        return int((~self.joint.isnan()).sum())

    def __getitem__(self, edge: tuple[Node, Node]) -> float:
        """Of a sender and a receiver, all tokens together; ValueError where there is no such edge."""
        return self._score("edge", edge)

    def _score(self, name: str, edge: Any) -> float:
        sender, receiver = nodes = arguments.sequence(name, edge, "a sender and a receiver", 2)
        if not all(isinstance(node, Node) for node in nodes):
            raise TypeError(f"Expected {name} to be a sender and a receiver (Node), got {arguments.shown(edge)}")
        if sender not in self.senders or receiver not in self.receivers:
            raise ValueError(
                f"Expected {name} to be a sender and a receiver of this model, got {sender} and {receiver}"
            )
        value = float(self.joint[self.senders.index(sender), self.receivers.index(receiver)])
        if np.isnan(value):
            raise ValueError(
                f"Expected {name} to be one of this model, got {sender} -> {receiver}, which does not read it"
            )
        return value

    def top(self, n: int = 10) -> list[Edge]:
        """The n edges of largest |score|, largest first; of equal ones the earlier sender's."""
        arguments.whole("n", n, 0)
        values = self.joint.numpy().ravel()
        order = np.argsort(-np.abs(values), kind="stable")[: min(n, self.edges)]
        at = zip(*np.unravel_index(order, self.joint.shape))
        return [Edge(self.senders[u], self.receivers[v], float(self.joint[u, v])) for u, v in at]

    def screen(self, n: int) -> Screened:
        """The n edges of largest |score|, for path patching to run exactly."""
        edges = self.top(n)
        senders, receivers = {edge.sender for edge in edges}, {edge.receiver for edge in edges}
        by_sender: dict[Node, list[Node]] = {}
        for edge in edges:
            by_sender.setdefault(edge.sender, []).append(edge.receiver)
        return Screened(
            [node for node in self.senders if node in senders],
            [node for node in self.receivers if node in receivers],
            [edge[:2] for edge in edges],
            [(node, by_sender[node]) for node in self.senders if node in by_sender],
        )

    def agreement(self, exact: Mapping[tuple[Node, Node], float]) -> float:
        """Spearman's correlation with exact effects of edges, NaN for fewer than three.

        Args:
            exact: by (sender, receiver), of `path_patch` with the clean run as its base ("noising").

        Raises:
            ValueError, TypeError: an edge that there is not, or an effect that is no finite number.
        """
        from scipy.stats import spearmanr

        if not isinstance(exact, Mapping):
            raise TypeError(f"Expected exact to be effects by (sender, receiver), got {arguments.shown(exact)}")
        theirs = [arguments.number("an effect of exact", effect) for effect in exact.values()]
        ours = [self._score("an edge of exact", edge) for edge in exact]
        return float(spearmanr(ours, theirs).statistic) if len(ours) > 2 else float("nan")

    def __repr__(self) -> str:
        ways = f"{self.steps} steps, {self.rule}" if self.method == "EAP-IG" else "1 gradient"
        strongest = "".join(f", strongest {edge} {edge.score:+.4g}" for edge in self.top(1))
        return (
            f"EdgeScores({self.method}, {ways}, {self.edges} edges, {self.pairs} pairs, "
            f"metric {self.clean:.4g} -> {self.corrupted:.4g}{strongest})"
        )

    def __str__(self) -> str:
        rows = self.top(10)
        width = max((len(str(edge)) for edge in rows), default=0)
        return "\n".join([repr(self), *(f"{str(edge).ljust(width)}  {edge.score:+.4g}" for edge in rows)])

    def _repr_html_(self) -> str:
        """For notebooks: `plot`."""
        return shown_figure(self.plot, repr(self))

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row for each edge (and token): both nodes by kind, layer and head, score, error.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = needed("pandas", "to_dataframe")
        values = self.scores.numpy()
        at = np.nonzero(~np.isnan(values))
        columns: dict[str, Any] = {}
        if self.tokens is not None:
            columns = {"position": at[0], "token": [self.tokens[t] for t in at[0]]}
        for side, nodes, index in (("sender", self.senders, at[-2]), ("receiver", self.receivers, at[-1])):
            columns[side] = [nodes[i].kind for i in index]
            for name in ("layer", "head"):
                each = [getattr(nodes[i], name) for i in index]
                columns[f"{side}_{name}"] = pandas.array(each, dtype="Int64")
        columns["score"] = values[at]
        if self.error is not None:
            columns["error"] = self.error.numpy()[at]
        return pandas.DataFrame(columns)

    def plot(self, ax: Any = None) -> Any:
        """A map of what layers write (rows) by what they read (columns), the scores of their heads summed.

        Returns:
            The Axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        grid, rows, columns = self._by_layer()
        ax = axes(ax, *figure_size(*grid.shape))
        heat_map(ax, grid, rows, columns, f"{self.method}, summed over heads")
        ax.set_ylabel("sender")
        ax.set_xlabel("receiver")
        return ax

    def _by_layer(self) -> tuple[np.ndarray, list[str], list[str]]:
        values = self.joint.numpy()
        names = [[_of_layer(node) for node in nodes] for nodes in (self.senders, self.receivers)]
        rows, columns = (list(dict.fromkeys(each)) for each in names)
        row, column = ([kept.index(name) for name in each] for kept, each in zip((rows, columns), names))
        grid, count = np.zeros((2, len(rows), len(columns)))
        at = np.ix_(row, column)
        np.add.at(grid, at, np.nan_to_num(values))
        np.add.at(count, at, ~np.isnan(values))
        return np.where(count > 0, grid, np.nan), rows, columns

    def save(self, folder: str | Path) -> None:
        """Write `edges.safetensors` and `edges.json` to a folder, made where there is none. `load` gives all back."""
        stored.save(self, folder, "edges", _TENSORS)

    @classmethod
    def load(cls, folder: str | Path) -> EdgeScores:
        """The scores that `save` wrote to a folder, exactly.

        Raises:
            ValueError: the folder holds none, or those of another version.
        """
        return stored.load(cls, folder, "edges", with_nodes)


def _of_layer(node: Node) -> str:
    """What a node is called where heads are together."""
    short = {"head_out": "attn", "mlp_out": "mlp", "q_input": "q", "k_input": "k", "v_input": "v", "mlp_input": "mlp"}
    return node.kind if node.layer is None else f"{short[node.kind]} {node.layer}"

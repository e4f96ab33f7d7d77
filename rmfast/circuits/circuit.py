"""`Circuit`: some edges of a model, chosen by their scores, that lie on paths from the embedding to the reward."""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rmfast import arguments
from rmfast.circuits.nodes import Node
from rmfast.circuits.scores import Edge, EdgeScores
from rmfast.plots import axes, needed, shown_figure


@dataclass(frozen=True, eq=False)
class Circuit:
    """Edges of a model.

    Attributes:
        edges: largest |score| first.
    """

    edges: tuple[Edge, ...]

    def __len__(self) -> int:
        return len(self.edges)

    @property
    def nodes(self) -> list[Node]:
        """Senders and receivers, each once, in the order of the edges."""
        return list(dict.fromkeys(node for edge in self.edges for node in edge[:2]))

    def mask(self, senders: Sequence[Node], receivers: Sequence[Node]) -> Tensor:
        """(U, V) bool of a model's senders and receivers; ValueError where it lacks one of the circuit's."""
        rows, columns = ({node: i for i, node in enumerate(nodes)} for nodes in (senders, receivers))
        at = []
        for edge in self.edges:
            if edge.sender not in rows or edge.receiver not in columns:
                raise ValueError(f"Expected edges between senders and receivers of this model, got {edge}")
            at.append((rows[edge.sender], columns[edge.receiver]))
        kept = torch.zeros(len(rows), len(columns), dtype=torch.bool)
        kept[tuple(torch.tensor(at, dtype=torch.int64).reshape(-1, 2).T)] = True
        return kept

    def __repr__(self) -> str:
        return f"Circuit({len(self)} edges, {len(self.nodes)} nodes)"

    def __str__(self) -> str:
        shown = self.edges[:20]
        width = max((len(str(edge)) for edge in shown), default=0)
        more = [f"and {len(self) - len(shown)} more"] if len(self) > len(shown) else []
        return "\n".join([repr(self), *(f"{str(edge).ljust(width)}  {edge.score:+.4g}" for edge in shown), *more])

    def _repr_html_(self) -> str:
        """For notebooks: `plot`."""
        return shown_figure(self.plot, repr(self))

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row for each edge: sender, receiver (as text) and score.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = needed("pandas", "to_dataframe")
        rows = [(str(edge.sender), str(edge.receiver), edge.score) for edge in self.edges]
        return pandas.DataFrame(rows, columns=["sender", "receiver", "score"])

    def plot(self, ax: Any = None) -> Any:
        """The nodes by layer, from the embedding up to the reward, and the edges: width by |score|, red above 0.

        Returns:
            The Axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        parts = {_part(node) for node in self.nodes} | {Node("embedding"), Node("reward")}
        last = max((node.layer for node in parts if node.layer is not None), default=0)
        levels: dict[float, list[Node]] = {}
        for node in sorted(parts, key=lambda node: (node.layer or 0, node.head or 0)):
            levels.setdefault(_level(node, last), []).append(node)
        wide = max(map(len, levels.values()))
        ax = axes(ax, min(max(4, 1.1 * wide), 14), min(max(3, 0.6 * len(levels)), 12))
        at = {node: ((i + 1) / (len(some) + 1), level) for level, some in levels.items() for i, node in enumerate(some)}
        largest = max((abs(edge.score) for edge in self.edges), default=1.0) or 1.0
        for edge in self.edges:
            (x0, y0), (x1, y1) = at[_part(edge.sender)], at[_part(edge.receiver)]
            colour = "C3" if edge.score > 0 else "C0"
            ax.plot([x0, x1], [y0, y1], color=colour, linewidth=0.3 + 3 * abs(edge.score) / largest, alpha=0.6)
        for node, (x, y) in at.items():
            name = str(node).replace("_input", "")
            ax.text(
                x,
                y,
                name,
                ha="center",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "0.6"},
            ).set_in_layout(False)
        ax.set_xlim(0, 1)
        ax.set_axis_off()
        return ax

    def save(self, path: str | Path) -> None:
        """As JSON."""
        edges = [[*edge[:2], edge.score] for edge in self.edges]
        text = json.dumps({"format": "rmfast.Circuit", "edges": edges}, indent=1)
        arguments.path("path", path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """The circuit that `save` wrote.

        Raises:
            ValueError: the file holds none.
        """
        place = arguments.path("path", path)
        try:
            found = json.loads(place.read_text(encoding="utf-8"))
            if found.get("format") != "rmfast.Circuit":
                raise ValueError("it is something else")
            return cls(tuple(Edge(Node(*u), Node(*v), score) for u, v, score in found["edges"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Expected a file that Circuit.save wrote, got {str(place)!r}: {error}") from error


def circuit(scores: EdgeScores, n: int, method: Literal["top", "greedy"] = "top") -> Circuit:
    """A circuit of at most n edges by their |score|.

    Args:
        scores: of a model.
        n: how many edges are chosen, before those are taken out that no path from the embedding to the reward is on.
        method: "top", the n largest of all; "greedy", from the reward on, each time the largest one into what is there
            already (Hanna et al. 2024), so that few are taken out.

    Returns:
        A `Circuit`.
    """
    n = arguments.whole("n", n, 0)
    arguments.word("method", method, ("top", "greedy"))
    graph = _Graph(arguments.instance("scores", scores, EdgeScores))
    return Circuit(tuple(graph.connected(scores.top(n) if method == "top" else graph.greedy(n))))


class _Graph:
    """Which senders a receiver belongs to: a head's are its own q and the k and v that it shares with its group."""

    def __init__(self, scores: EdgeScores):
        self.scores = scores
        sizes: dict[tuple[str, int | None], int] = {}
        for node in (*scores.senders, *scores.receivers):
            sizes[node.kind, node.layer] = sizes.get((node.kind, node.layer), 0) + 1
        self.feeds: dict[Node, list[Node]] = {}
        for node in scores.receivers:
            if node.kind == "reward":
                self.feeds[node] = []
            elif node.kind == "mlp_input":
                self.feeds[node] = [Node("mlp_out", node.layer)]
            else:
                each = sizes["head_out", node.layer] // sizes[node.kind, node.layer]
                assert node.head is not None
                heads = range(node.head * each, (node.head + 1) * each)
                self.feeds[node] = [Node("head_out", node.layer, head) for head in heads]
        self.fed_by: dict[Node, list[Node]] = {}
        for receiver, senders in self.feeds.items():
            for sender in senders:
                self.fed_by.setdefault(sender, []).append(receiver)

    def connected(self, edges: list[Edge]) -> list[Edge]:
        """The edges on paths from the embedding to the reward, which a patch of the embedding can go along."""
        into: dict[Node, list[Node]] = {}
        for edge in edges:
            into.setdefault(edge.receiver, []).append(edge.sender)
        live: set[Node] = {Node("embedding")}
        heeded: set[Node] = set()
        for receiver in self.scores.receivers:  # a receiver comes behind all that it reads
            if any(sender in live for sender in into.get(receiver, ())):
                live.update(self.feeds[receiver])
        wanted = {Node("reward")}
        for receiver in reversed(self.scores.receivers):
            if receiver in wanted or any(sender in heeded for sender in self.feeds[receiver]):
                wanted.add(receiver)
                heeded.update(into.get(receiver, ()))
        return [edge for edge in edges if edge.sender in live and edge.receiver in wanted]

    def greedy(self, n: int) -> list[Edge]:
        values = self.scores.joint.numpy()
        columns = {node: i for i, node in enumerate(self.scores.receivers)}
        heap: list[tuple[float, int, int]] = []

        def open_up(receiver: Node) -> None:
            column = columns[receiver]
            for row, value in enumerate(values[:, column]):
                if value == value:
                    heapq.heappush(heap, (-abs(float(value)), row, column))

        open_up(Node("reward"))
        opened, found = {Node("reward")}, list[Edge]()
        while heap and len(found) < n:
            _, row, column = heapq.heappop(heap)
            sender, receiver = self.scores.senders[row], self.scores.receivers[column]
            found.append(Edge(sender, receiver, float(values[row, column])))
            for each in self.fed_by.get(sender, ()):
                if each not in opened:
                    opened.add(each)
                    open_up(each)
        return sorted(found, key=lambda edge: -abs(edge.score))


def _part(node: Node) -> Node:
    """The head or MLP that a node belongs to; K/V heads are by themselves."""
    kind = {"head_out": "head", "q_input": "head", "mlp_out": "mlp", "mlp_input": "mlp"}.get(node.kind, node.kind)
    return Node(kind, node.layer, node.head)


def _level(node: Node, last: int) -> float:
    """How high a node is drawn."""
    if node.layer is None:
        return -1.0 if node.kind == "embedding" else last + 1.0
    return node.layer + {"head": 0.25, "mlp": 0.6}.get(node.kind, 0.0)

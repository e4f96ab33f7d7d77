"""Which nodes are meant: kinds and nodes with gaps, as the nodes of a model that they stand for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rmfast.arguments import indices, sequence, shown
from rmfast.circuits.nodes import WITH_HEADS, Node
from rmfast.patching.sites import Patcher

# Kinds (`rmfast.patching.sites`) whose units are a node's heads.
_UNITS = {"head_out": "head_out", "q_input": "q", "k_input": "k", "v_input": "v"}
_WHOLE = ("embedding", "reward")  # of the model


def named(name: str, asked: Any, kinds: Collection[str]) -> list[Node]:
    """Words and nodes as nodes, those with gaps as they are (`expanded`).

    Args:
        name: of the argument, for errors.
        asked: a kind, a node, or several. Node("head_out", 3) is all heads of layer 3, Node("head_out", head=2) head 2
            of all layers, "head_out" all heads of all layers. Negative layers and heads count from the end.
        kinds: that may be named.

    Raises:
        ValueError, TypeError: another kind, or no kind at all; none is named.
    """
    one = isinstance(asked, str | Node)
    found = []
    for item in [asked] if one else sequence(name, asked, "a kind, a node, or several"):
        node = Node(item) if isinstance(item, str) else item
        if not isinstance(node, Node):
            raise TypeError(f"Expected {name} to be kinds or nodes (rmfast.circuits.nodes.Node), got {shown(item)}")
        if node.kind not in kinds:
            raise ValueError(f"Expected {name} to be of {', '.join(kinds)}, got {shown(node.kind)}")
        found.append(node)
    if not found:
        raise ValueError(f"Expected {name} to name at least one node")
    return found


def expanded(name: str, node: Node, patcher: Patcher) -> list[Node]:
    """The model's nodes that a node stands for, in their order; ValueError or TypeError for one that is not there."""
    if node.kind in _WHOLE:
        if node.layer is not None or node.head is not None:
            raise ValueError(f"Expected {name} with {node.kind} to have neither layer nor head, got {node}")
        return [node]
    layers = range(patcher.layers)
    chosen = layers if node.layer is None else indices(f"the layer of {node.kind}", node.layer, patcher.layers)
    if node.kind not in WITH_HEADS:
        if node.head is not None:
            raise ValueError(f"Expected {name} with {node.kind} to have no head, got {node}")
        return [Node(node.kind, layer) for layer in chosen]
    count = patcher.units(_UNITS[node.kind])[0]
    heads = range(count) if node.head is None else indices(f"the head of {node.kind}", node.head, count)
    return [Node(node.kind, layer, head) for layer in chosen for head in heads]

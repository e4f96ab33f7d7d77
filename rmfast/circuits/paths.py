"""Path patching: which direct paths between a model's parts a reward goes through, exactly and for all pairs at once.

Two steps, as in the literature. In the first a sender (a head, an MLP, the embedding) is changed to what it gives in
the other run, all paths but those that lead directly to the receiver frozen (`rmfast.circuits.direct`); what the
receiver (a query, key or value, an MLP, the reward) makes of its input is noted. In the second this is put into the
base run, and everything behind the receiver runs as it would. The second step is an edit of `rmfast.patching`: its rows
run over the base run's keys and values, many at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from rmfast import arguments
from rmfast.circuits.direct import MADE, SuffixPaths, Through, written
from rmfast.circuits.direct_hooked import HookedPaths
from rmfast.circuits.nodes import RECEIVERS, SENDERS, Node
from rmfast.circuits.path_result import PathPatch
from rmfast.circuits.selection import expanded, named
from rmfast.engine.options import RunOptions, checked_run, takes
from rmfast.engine.scorer import Scorer
from rmfast.patching.pairs import Align, Pair
from rmfast.patching.request import Metric, Request
from rmfast.patching.sites import SITES, Edits
from rmfast.patching.suffix_patcher import SuffixPatcher
from rmfast.patching.sweep import row_budget
from rmfast.texts.inputs import words

if TYPE_CHECKING:
    from typing_extensions import Unpack

Nodes = str | Node | Sequence[str | Node]


@takes(RunOptions)
def path_patch(
    rm: Scorer, clean: Any, corrupted: Any, *, senders: Nodes = SENDERS, receivers: Nodes = "reward",
    edges: Iterable[tuple[str | Node, str | Node]] | None = None, positions: str | Iterable[Any] | None = "joint",
    through: Through = "residual", mode: Literal["noising", "denoising"] = "noising", align: Align = "auto",
    metric: Metric | None = None, **options: Unpack[RunOptions],
) -> PathPatch | list[PathPatch]:  # fmt: skip
    """The reward of a run in which one direct path is patched, for each sender and receiver (docs/circuits.md).

    A sender's change is what it adds to the residual stream in the other run less what it adds in the base run (a head
    through its output projection, and with the scale of a norm behind it as it is in each run). It is added to what the
    one receiver reads; the receiver's own norm and all that comes behind the receiver run as they would.

    Args:
        rm: a `rmfast.RewardModel`.
        clean, corrupted: one text each, in any form that `score` takes, or lists of as many texts.
        senders: "embedding", "head_out", "mlp_out": a kind, a `Node`, or several. Node("head_out", 3) is all heads of
            layer 3, "head_out" all heads of all layers.
        receivers: "q_input", "k_input", "v_input", "mlp_input", "reward", in the same way; heads of k_input and v_input
            are K/V heads.
        edges: (sender, receiver) pairs to run, in place of all pairs of senders and receivers.
        positions: at which the sender is changed: "joint" (all at once), "all" (each by itself), or a list of positions
            of the base run and of groups (lists, ranges, slices).
        through: "residual" leaves all heads and MLPs between the two as they are in the base run, "mlps" the heads
            alone: MLPs between are run anew.
        mode: "noising" (the clean run is the base, changes come from the corrupted one) or "denoising" (the other way
            round).
        align: which positions of two texts correspond, as for `patch_sweep`.
        metric: a function of the rewards (K,) that gives one number, taken in their place.
        options: max_length, truncation, format, batch_tokens, progress (`rmfast.engine.options`). batch_tokens are the
            rows that run at once; an edited run must fit. Default: twice that of `score`.

    Returns:
        A `PathPatch`, or for lists one for each pair of texts.

    Raises:
        ValueError, TypeError: an argument is wrong, the texts do not differ, no path leads from any sender to any
            receiver, or the model's layers lack a part that a node names.
    """
    arguments.word("mode", mode, ("noising", "denoising"))
    arguments.word("through", through, ("residual", "mlps"))
    given: dict[str, Any] = dict(options)
    progress = given.pop("progress", False)
    batch_tokens = checked_run(given.pop("batch_tokens", None), progress)
    asked = _asked(senders, receivers, edges)
    kinds = {node.kind for pair in asked for node in pair} & {"head_out", "mlp_out"}
    made = {MADE[receiver.kind] for _, receiver in asked}
    request = Request(
        rm, mode=mode, sites=sorted({"attn_out", "mlp_out", "resid_post", *kinds, *made}), positions=positions,
        align=align, metric=metric, **given,
    )  # fmt: skip
    rm.expect_invariance(getattr(request.patcher, "engine", None))
    graph = _Graph.of(asked, request)
    pairs, many = request.pairs(clean, corrupted)
    with tqdm(unit="path", disable=not progress) as bar:
        results = [_patched(request, graph, pair, through, batch_tokens, bar) for pair in pairs]
    return results if many else results[0]


def _asked(senders: Nodes, receivers: Nodes, edges: Any) -> list[tuple[Node, Node]]:
    """Pairs of nodes, some of which stand for several."""
    if edges is None:
        return list(itertools.product(named("senders", senders, SENDERS), named("receivers", receivers, RECEIVERS)))
    given = [
        arguments.sequence("edges", edge, "(sender, receiver) pairs", 2) for edge in arguments.sequence("edges", edges)
    ]
    if not given:
        raise ValueError("Expected edges to name at least one")
    return [(named("edges", [a], SENDERS)[0], named("edges", [b], RECEIVERS)[0]) for a, b in given]


@dataclass(frozen=True)
class _Graph:
    """The paths to be run.

    Attributes:
        paths: (S, R) bool.
        at_end: (R,) bool, receivers of a causal model of which the rows that are read alone count.
    """

    senders: list[Node]
    receivers: list[Node]
    paths: np.ndarray
    at_end: np.ndarray

    @classmethod
    def of(cls, asked: list[tuple[Node, Node]], request: Request) -> _Graph:
        patcher = request.patcher
        senders: dict[Node, int] = {}
        receivers: dict[Node, int] = {}
        chosen = []
        for a, b in asked:
            for sender, receiver in itertools.product(
                expanded("senders", a, patcher), expanded("receivers", b, patcher)
            ):
                chosen.append(
                    (senders.setdefault(sender, len(senders)), receivers.setdefault(receiver, len(receivers)))
                )
        paths = np.zeros((len(senders), len(receivers)), bool)
        paths[tuple(np.array(chosen).T)] = True
        parallel = [False] * patcher.layers  # by hooks, whose runs tell that such a path changes nothing
        if isinstance(patcher, SuffixPatcher):
            parallel = [layer.parallel for _, layer in patcher.engine.layers]
        since = np.array([written(node) for node in senders])
        paths &= since[:, None] <= np.array([_read(node, parallel) for node in receivers])
        if not paths.any():
            raise ValueError(
                f"Expected a sender that comes before a receiver, got {_some(senders)} and {_some(receivers)}"
            )
        last = patcher.layers - 1
        late = [
            node.layer is None or (node.layer == last and node.kind in ("q_input", "mlp_input")) for node in receivers
        ]
        return cls(list(senders), list(receivers), paths, np.array(late) & request.causal)


def _read(node: Node, parallel: Sequence[bool]) -> int:
    """When a receiver reads the stream, on the clock of `written`."""
    if node.layer is None:
        return 2 * len(parallel)
    return 2 * node.layer + (node.kind == "mlp_input" and not parallel[node.layer])


def _some(nodes: Iterable[Node]) -> str:
    names = [str(node) for node in nodes]
    return ", ".join(names if len(names) <= 4 else [*names[:3], "..."])


def _patched(
    request: Request, graph: _Graph, pair: Pair, through: Through, batch_tokens: int | None, bar: tqdm
) -> PathPatch:
    spans, missing, groups = request.groups(pair)
    shape = (*graph.paths.shape, len(spans))
    with request.binding.session():
        base, other, values = _runs(request, graph, pair, through)
        groups = groups[:, : len(base.ids)]
        read = np.zeros(groups.shape[1], bool)
        read[[pair.base_read, *(pair.gates or ())[:1]]] = request.causal
        groups = np.concatenate([groups, groups & read])
        sender, receiver, position = np.nonzero(np.broadcast_to(graph.paths[..., None] & ~missing, shape))
        group = position + len(spans) * graph.at_end[receiver]
        cell = np.ravel_multi_index((sender, receiver, position), shape)
        effect = groups[group].any(1)
        flat = torch.full((math.prod(shape), len(base.reward)), torch.nan, dtype=base.reward.dtype)
        flat[torch.from_numpy(cell[~effect])] = base.reward
        sender, receiver, group, cell = (x[effect] for x in (sender, receiver, group, cell))
        last = request.patcher.layers - 1
        to = [(MADE[node.kind], last if node.layer is None else node.layer, node.head or 0) for node in graph.receivers]
        code, layer, unit = (np.array(x)[receiver] for x in zip(*((SITES.index(k), m, head) for k, m, head in to)))
        edits = Edits(
            code.astype(np.int8), layer.astype(np.int32), group.astype(np.int32), unit.astype(np.int32), groups,
            sender.astype(np.int32),
        )  # fmt: skip
        budget = row_budget(request.rm, request.patcher, base, edits, batch_tokens)
        bar.total = (bar.total or 0) + len(edits)
        rows = np.flatnonzero(groups[np.unique(group)].any(0))  # of all blocks the same, and so the bits of each path
        count = len(rows) if isinstance(request.patcher, SuffixPatcher) else len(base.ids)
        for some, block in _blocks(edits, max(1, budget // max(1, count))):

            def finish(which: np.ndarray, rewards: Tensor, some: np.ndarray = some) -> None:
                flat[torch.from_numpy(cell[some[which]])] = rewards.to(flat.dtype)
                bar.update(len(which))

            here = replace(edits[some], source=np.searchsorted(block, sender[some]).astype(np.int32))
            made = values([graph.senders[i] for i in block], rows)
            request.patcher.rewards(base, here, made, budget, finish, np.zeros(len(some), bool))
    two = [request.measured(run.reward.clone()[None])[0] for run in (base, other)]
    return _result(
        request, graph, pair, spans, request.measured(flat.clone()), two, through, (len(edits), int((~effect).sum()))
    )


def _runs(request: Request, graph: _Graph, pair: Pair, through: Through) -> tuple[Any, Any, Callable[..., Any]]:
    """The base run, the other one, and what gives receivers' values of some senders at some positions."""
    patcher: Any = request.patcher
    assert pair.other is not None
    texts = ((pair.base, pair.base_read), (pair.other, pair.other_read))
    if isinstance(patcher, SuffixPatcher):
        kinds, sent = SuffixPaths.kinds(graph.senders, graph.receivers, through)
        base = patcher.record(pair.base, pair.base_read, kinds)
        other = patcher.record(pair.other, pair.other_read, sent, base=False)
        return base, other, SuffixPaths(patcher, base, other, pair.partner, through).values
    kinds = HookedPaths.kinds(graph.senders)
    base, other = (patcher.record(text, read, kinds) for text, read in texts)
    return base, other, HookedPaths(patcher, base, other, pair.partner, graph.senders, graph.receivers, through).values


def _blocks(edits: Edits, each: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Edits by index and their senders, of `each` senders at a time."""
    assert edits.source is not None
    senders = np.unique(edits.source)
    for start in range(0, len(senders), each):
        block = senders[start : start + each]
        yield np.flatnonzero((edits.source >= block[0]) & (edits.source <= block[-1])), block


def _result(
    request: Request, graph: _Graph, pair: Pair, spans: list[list[int]], flat: Tensor, two: list[Tensor],
    through: Through, counts: tuple[int, int],
) -> PathPatch:  # fmt: skip
    """From rewards (cells, K) and those of the base run and the other (K,)."""
    labelled = flat.size(1) > 1
    sizes = {"sender": len(graph.senders), "receiver": len(graph.receivers)}
    sizes |= {"position": len(spans)} if len(spans) > 1 else {}
    sizes |= {"label": flat.size(1)} if labelled else {}
    base, other = (run if labelled else run[0] for run in two)
    clean, corrupted = (other, base) if request.mode == "denoising" else (base, other)
    ids = pair.base.ids.tolist()
    return PathPatch(
        rewards=flat.reshape(*sizes.values()),
        axes=tuple(sizes),
        senders=graph.senders,
        receivers=graph.receivers,
        positions=spans,
        clean_reward=clean,
        corrupted_reward=corrupted,
        base="corrupted" if request.mode == "denoising" else "clean",
        mode=request.mode,
        through=through,
        tokens=words(request.rm.tokenizer, ids),
        token_ids=ids,
        unpaired=int((pair.partner < 0).sum()),
        run=counts[0],
        without_effect=counts[1],
        engine="suffix" if isinstance(request.patcher, SuffixPatcher) else "layers",
    )

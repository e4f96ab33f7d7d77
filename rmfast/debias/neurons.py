"""The neurons whose activations rank texts as an attribute does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rmfast.arguments import instance, number, shown, whole, word
from rmfast.debias.interventions import NeuronClamp, Positions
from rmfast.debias.last_token import CAPTURE_BYTES, LastTokenRuns
from rmfast.debias.measure import (
    Attributes,
    Wanted,
    attributes_of_pairs,
    of_one_reward,
    read_some,
)
from rmfast.engine.scorer import Scorer
from rmfast.ops import neuron_stats
from rmfast.texts.pairs import Pair

LEAST_PAIRS = 8  # among 16 texts a correlation of 0.5 is still chance (5%)


@dataclass(frozen=True, eq=False)
class Neurons:
    """How each neuron (an output of a q, k, v, o, gate, up or down projection) ranks texts, beside their attributes.

    Attributes:
        attributes: names of the a attributes.
        sizes: module name: its number of neurons; m in all, in the model's order.
        spearman: (m, a) float32, rank correlation of activation at the last token and attribute; 0 for a neuron that is
            constant.
        median: (m,) float32, of the activations.
        fingerprint: of the model they belong to.
    """

    attributes: tuple[str, ...]
    sizes: dict[str, int]
    spearman: np.ndarray
    median: np.ndarray
    fingerprint: Any = None
    _orders: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.median)

    def top(self, attribute: str, n: int = 10) -> list[tuple[str, int, float, float]]:
        """(module name, neuron, correlation, median) of the n neurons with the strongest correlations."""
        column = self._column(attribute)
        found = np.argsort(-abs(column), kind="stable")[: whole("n", n, 0)]
        return [(*self._named(i), float(column[i]), float(self.median[i])) for i in found]

    def ends(self, attribute: str, k: int) -> np.ndarray:
        """(2k,) or fewer: the neurons that rank highest and lowest over all layers, k of each."""
        k = whole("k", k, 0, len(self))
        word("attribute", attribute, self.attributes)
        if attribute not in self._orders:
            self._orders[attribute] = np.argsort(self._column(attribute), kind="stable").astype(np.int32)
        order = self._orders[attribute]
        return np.union1d(order[:k], order[len(order) - k :])

    def clamp(
        self, k: int | float | Mapping[str, int | float], positions: Positions = "last", **metadata: Any
    ) -> NeuronClamp:
        """The clamp of the k highest- and lowest-ranking neurons of each attribute to their medians.

        Args:
            k: one for all attributes, or of each by name (0: the attribute is left alone). A float below 1 is a share
                of all neurons, of which each end gives half.
            positions: the tokens at which neurons are clamped.
            metadata: kept with the clamp.

        Raises:
            ValueError: k is negative or above the number of neurons, or is not given for exactly these attributes.
        """
        ks = k_of_each(k, self.attributes, len(self))
        found = np.unique(np.concatenate([self.ends(name, each) for name, each in ks.items()]))
        return self._clamped(found, positions, {"k": ks, "neurons": len(found), **metadata})

    def random(self, like: NeuronClamp, seed: int = 0) -> NeuronClamp:
        """The clamp of as many neurons of each projection as `like` has, drawn at random, to their medians: a control.

        Raises:
            ValueError: `like` clamps neurons of a projection that these are not of, or more than it has.
        """
        instance("like", like, NeuronClamp)
        rng = np.random.default_rng(whole("seed", seed, 0))
        starts = dict(zip(self.sizes, np.cumsum([0, *self.sizes.values()])))
        drawn = [np.empty(0, np.int64)]
        for name, (indices, _) in like.neurons.items():
            if name not in starts or int(indices.max()) >= self.sizes[name]:
                raise ValueError(f"Expected like to clamp neurons of {', '.join([*starts][:4])}, ..., got {name}")
            drawn.append(starts[name] + rng.choice(self.sizes[name], len(indices), replace=False))
        found = np.sort(np.concatenate(drawn))
        return self._clamped(found, like.positions, {"method": "random", "seed": seed, "neurons": len(found)})

    def _clamped(self, found: np.ndarray, positions: Positions, metadata: dict[str, Any]) -> NeuronClamp:
        """Of neurons in ascending order."""
        edges = np.cumsum([0, *self.sizes.values()])
        cuts = np.searchsorted(found, edges)
        neurons = {
            name: (torch.from_numpy(found[a:b] - start), torch.from_numpy(self.median[found[a:b]]))
            for name, start, a, b in zip(self.sizes, edges, cuts, cuts[1:])
            if b > a
        }
        return NeuronClamp(neurons, positions, self.fingerprint, metadata)

    def _column(self, attribute: str) -> np.ndarray:
        return self.spearman[:, self.attributes.index(word("attribute", attribute, self.attributes))]

    def _named(self, index: int) -> tuple[str, int]:
        edges = np.cumsum([0, *self.sizes.values()])
        module = int(np.searchsorted(edges, index, side="right")) - 1
        return list(self.sizes)[module], int(index - edges[module])


def k_of_each(k: Any, names: Sequence[str], most: int) -> dict[str, int]:
    """k of each attribute by name; ValueError, TypeError where they are no whole numbers in [0, most] nor shares."""
    ks = dict(k) if isinstance(k, Mapping) else dict.fromkeys(names, k)
    if set(ks) != set(names):
        raise ValueError(
            f"Expected k of each attribute ({', '.join(names)}; 0 leaves one alone), got {', '.join(map(shown, ks))}"
        )
    return {name: whole_k(f"k of {name}", ks[name], most) for name in names}


def whole_k(name: str, k: Any, most: int) -> int:
    """Neurons of each end of a ranking: a whole number, or the half of a share of all neurons, at least 1."""
    if isinstance(k, float | np.floating):
        share = number(f"{name}, where it is a share of the model's neurons,", k, 0, 1, above=True, below=True)
        return max(1, round(share * most / 2))
    return whole(f"{name}, neurons of the model's {most},", k, 0, most)


def localise(
    rm: Scorer,
    pairs: Sequence[Any],
    *,
    attributes: Wanted = None,
    **encoding: Any,
) -> Neurons:
    """Rank correlations of all neurons with attributes of the texts, and the neurons' medians: what `fit` chooses from.

    Arguments and errors are those of `fit`; `encoding` says how texts become token ids, as for `score`.
    """
    read, found = fitting(rm, pairs, attributes)
    running = {name: encoding.pop(name) for name in ("batch_tokens", "progress") if name in encoding}
    encoded = rm.encode([text for pair in read for text in pair.inputs], **encoding)
    runs = LastTokenRuns(rm, encoded, max_length=encoding.get("max_length"), **running)
    return localised(rm, [runs], found, [np.arange(len(encoded))])[0]


def fitting(rm: Scorer, pairs: Any, attributes: Wanted) -> tuple[list[Pair], Attributes]:
    """The pairs, read, and attributes of their 2n texts, checked to have something to find."""
    instance("rm", rm, Scorer)
    read = read_some(pairs, LEAST_PAIRS)
    found = attributes_of_pairs(read, attributes)
    of_one_reward(rm)
    constant = [name for name, column in zip(found.names, found.values.T) if (column == column[0]).all()]
    if constant:
        rest = [name for name in found.names if name not in constant]
        raise ValueError(
            f"Expected attributes that differ between the texts, but {', '.join(constant)} "
            f"{'is' if len(constant) == 1 else 'are'} the same in all {len(found)}: give texts that differ there, or "
            f"leave it out, attributes={rest} (--attributes {','.join(rest)})"
        )
    return read, found


def localised(
    rm: Scorer, runs: Sequence[LastTokenRuns], found: Attributes, sets: Sequence[np.ndarray]
) -> list[Neurons]:
    """The neurons by the attributes of each of some sets of texts, which count through the texts of all runs."""
    values = torch.from_numpy(found.values)
    sizes: dict[str, int] = {}
    columns: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in sets]
    for outputs in zip(*(each.projections(at_once=CAPTURE_BYTES // len(runs)) for each in runs)):
        name, first = outputs[0]
        every = torch.cat([output for _, output in outputs]) if len(outputs) > 1 else first
        sizes[name] = every.size(1)
        for index, column in zip(sets, columns):
            some = torch.from_numpy(index)
            own = every if len(index) == len(every) else every[some.to(every.device)]
            rho, middle = neuron_stats(own, values[some].to(every.device))
            column.append((rho.float().cpu().nan_to_num(0.0), middle.float().cpu()))  # NaN: of one that overflows
    found_of = []
    for column in columns:
        spearman, median = (torch.cat(side).numpy() for side in zip(*column))
        found_of.append(Neurons(found.names, sizes, spearman, median, rm.fingerprint))
    return found_of

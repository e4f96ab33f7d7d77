"""Activation patching over every site of a grid: which activations make a reward, exactly, in one call.

`patch_sweep` encodes and aligns the texts, lists the edits of the grid, leaves out those that provably change nothing,
and has the others run by a patcher: rmfast.patching (suffixes over the base run's K and V) for causal models whose
layers are known by structure, rmfast.hooks (layer reuse, the model's own forward) for all others.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import safetensors.torch
import torch
from scipy.stats import spearmanr
from torch import Tensor
from tqdm.auto import tqdm

from rmfast import model as _model
from rmfast.grids import PatchSweep
from rmfast.hooks import LayersPatcher
from rmfast.inputs import Encoded, several, words
from rmfast.patching import SuffixPatcher
from rmfast.sites import KINDS, UNITS, Edits, Patcher, Record, Values

if TYPE_CHECKING:
    from rmfast.scoring import RewardModel

__all__ = ["attribution_patch", "patch_sweep"]

Metric = Callable[[Tensor], Any]
Align = Literal["auto", "strict"] | Mapping[int, int] | Sequence[int]

_PAIRED = ("denoising", "noising")
_ALONE = ("zero", "mean", "resample")
_SAVE_SECONDS = 20  # between two writes of a checkpoint


@dataclass
class _Grid:
    """The sites that were asked for: the cells of the result, and an edit for each that may have an effect."""

    axes: list[str]
    shape: tuple[int, ...]
    spans: list[list[int]]  # the token positions of each group, as asked for
    edits: Edits
    cells: Tensor  # (E,) int64, where each edit is in the flat grid
    same: Tensor  # int64, cells of sites that provably change nothing; all others have no partner, or don't exist


@dataclass
class _Pair:
    """One base run and what is put into it."""

    base: Encoded
    other: Encoded | None
    base_read: int
    other_read: int
    partner: np.ndarray  # (T,) the other run's position for each of the base's, or -1
    first: int  # tokens before it are the same in both runs


def patch_sweep(
    rm: RewardModel,
    clean: Any,
    corrupted: Any = None,
    *,
    mode: str | Tensor | Mapping[str, Tensor] = "denoising",
    sites: str | Sequence[str] = "resid_post",
    layers: int | Iterable[int] | None = None,
    positions: str | Iterable[Any] | None = None,
    heads: int | Iterable[int] | None = None,
    neurons: int | Iterable[int] | None = None,
    align: Align = "auto",
    metric: Metric | None = None,
    baseline: Sequence[Any] | None = None,
    seed: int = 0,
    screen: Literal["atp"] | None = None,
    top: int | None = None,
    batch_tokens: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **encoding: Any,
) -> PatchSweep | list[PatchSweep]:
    """See `RewardModel.patch_sweep`."""
    options = _Options(rm, mode, sites, layers, positions, heads, neurons, align, metric, baseline, seed, encoding)
    if screen not in (None, "atp"):
        raise ValueError(f'Expected screen to be "atp" or None, got {screen!r}')
    if (screen is None) != (top is None):
        raise ValueError("Expected screen and top together: the sites that AtP ranks among the first `top` are run")
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise ValueError(f"Expected top to be a positive int, got {top!r}")
    if batch_tokens is not None and (
        isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1
    ):
        raise ValueError(f"Expected batch_tokens to be a positive int, got {batch_tokens!r}")
    pairs, many = options.pairs(clean, corrupted)
    saved = None if checkpoint is None else _Checkpoint(Path(checkpoint), options.fingerprint(pairs, batch_tokens, top))
    results = []
    try:
        with tqdm(unit="site", disable=not progress) as bar:
            for number, pair in enumerate(pairs):
                screened = None if top is None else (top, _estimate(options, pair))
                results.append(_sweep(options, pair, batch_tokens, bar, saved, number, screened))
    finally:
        if saved is not None:
            saved.write()
    return results if many else results[0]


def attribution_patch(
    rm: RewardModel,
    clean: Any,
    corrupted: Any = None,
    *,
    mode: str | Tensor | Mapping[str, Tensor] = "denoising",
    sites: str | Sequence[str] = "resid_post",
    layers: int | Iterable[int] | None = None,
    positions: str | Iterable[Any] | None = None,
    heads: int | Iterable[int] | None = None,
    neurons: int | Iterable[int] | None = None,
    align: Align = "auto",
    metric: Metric | None = None,
    baseline: Sequence[Any] | None = None,
    seed: int = 0,
    **encoding: Any,
) -> PatchSweep | list[PatchSweep]:
    """See `RewardModel.attribution_patch`."""
    options = _Options(rm, mode, sites, layers, positions, heads, neurons, align, metric, baseline, seed, encoding)
    pairs, many = options.pairs(clean, corrupted)
    results = [_estimate(options, pair) for pair in pairs]
    return results if many else results[0]


class _Options:
    """The arguments that a sweep and its linear estimate share, checked."""

    def __init__(
        self, rm: RewardModel, mode: Any, sites: Any, layers: Any, positions: Any, heads: Any, neurons: Any,
        align: Any, metric: Any, baseline: Any, seed: int, encoding: dict[str, Any],
    ) -> None:  # fmt: skip
        self.rm, self.binding = rm, rm.binding
        self.patcher: Patcher = rm._patcher()
        self.causal = rm.binding.causal
        self.mode = mode if isinstance(mode, str) else "values"
        self.given: Any = None if isinstance(mode, str) else mode
        if isinstance(mode, str) and mode not in (*_PAIRED, *_ALONE):
            names = ", ".join(f'"{name}"' for name in (*_PAIRED, *_ALONE))
            raise ValueError(f"Expected mode to be {names}, or a tensor of values, got {mode!r}")
        if not isinstance(mode, str | Tensor | Mapping):
            raise TypeError(f"Expected mode to be a str, a tensor or a mapping of tensors, got {type(mode).__name__}")
        self.single = isinstance(sites, str)
        self.kinds = [sites] if isinstance(sites, str) else list(sites)
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"Expected sites to be one kind or several different ones, got {sites!r}")
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"Expected sites among {', '.join(KINDS)}, got {kind!r}")
        try:
            sizes = {kind: self.patcher.units(kind) for kind in self.kinds}
        except ValueError:  # a part that the suffix engine does not know, but a hook may reach
            self.patcher = cast(Patcher, LayersPatcher(self.binding))
            sizes = {kind: self.patcher.units(kind) for kind in self.kinds}
        self.sizes = sizes
        count = self.patcher.layers
        self.layers = list(range(count)) if layers is None else _indices("layers", layers, count)
        self.units = {kind: self._units(kind, sizes[kind][0], heads, neurons) for kind in self.kinds}
        self.positions = positions if isinstance(positions, str | int | None) else list(positions)
        self.align, self.metric, self.seed = align, metric, seed
        if metric is not None and not callable(metric):
            raise TypeError(f"Expected metric to be a function of the rewards (K,), got {type(metric).__name__}")
        if (baseline is not None) != (self.mode in ("mean", "resample")):
            raise ValueError(f'Expected baseline (texts) with mode "mean" or "resample" alone, got mode {self.mode!r}')
        self.encoding = encoding
        self.baseline = None if baseline is None else self._encode("baseline", list(baseline))
        if self.given is not None:
            self.given = self._given(self.given)
        self._mean: dict[tuple[str, int], Tensor] | None = None

    @cached_property
    def hooked(self) -> LayersPatcher:
        """What takes gradients."""
        return self.patcher if isinstance(self.patcher, LayersPatcher) else LayersPatcher(self.binding)

    @property
    def recorded(self) -> set[str]:
        """What is kept of a base run: tails of the MLP start from the stream before it."""
        return {*self.kinds, "resid_mid"} if isinstance(self.patcher, SuffixPatcher) else set(self.kinds)

    def _units(self, kind: str, count: int, heads: Any, neurons: Any) -> list[int]:
        unit = UNITS.get(kind)
        if unit == "neuron":
            if neurons is None:
                raise ValueError(f"Expected neurons, the ones to sweep of each layer's {count}, with sites mlp_neuron")
            return _indices("neurons", neurons, count)
        return list(range(count)) if unit is None or heads is None else _indices(f"heads of {kind}", heads, count)

    def _given(self, mode: Any) -> dict[tuple[str, int], Tensor]:
        """Values by kind and layer, (units, width)."""
        tensors = mode if isinstance(mode, Mapping) else dict.fromkeys(self.kinds, mode)
        if set(tensors) != set(self.kinds):
            raise ValueError(f"Expected values for sites {self.kinds}, got them for {sorted(tensors)}")
        found: dict[tuple[str, int], Tensor] = {}
        for kind, tensor in tensors.items():
            wanted = (len(self.layers), *self.sizes[kind])
            try:
                full = (tensor[:, None] if tensor.dim() == 2 else tensor).broadcast_to(wanted)
            except RuntimeError:
                raise ValueError(
                    f"Expected the values of {kind} to be of shape ({wanted[2]},), {wanted[::2]} or {wanted} (layers, "
                    f"units, width), got {tuple(tensor.shape)}"
                ) from None
            found |= {(kind, layer): full[i] for i, layer in enumerate(self.layers)}
        return found

    def _encode(self, name: str, texts: list[Any]) -> list[Encoded]:
        if not texts:
            raise ValueError(f"Expected {name} to hold at least one text")
        return self.rm.encode(texts, **self.encoding)

    def pairs(self, clean: Any, corrupted: Any) -> tuple[list[_Pair], bool]:
        many = several(clean)
        cleans = self._encode("clean", list(clean) if many else [clean])
        if self.mode not in _PAIRED:
            if corrupted is not None:
                raise ValueError(f"Expected no corrupted text with mode {self.mode!r}, which patches the clean run")
            return [self._pair(i, text, None) for i, text in enumerate(cleans)], many
        if corrupted is None:
            raise ValueError(f"Expected a corrupted text with mode {self.mode!r}")
        if several(corrupted) != many or (many and len(corrupted) != len(clean)):
            raise ValueError("Expected clean and corrupted to be one text each, or lists of the same length")
        others = self._encode("corrupted", list(corrupted) if many else [corrupted])
        ordered = zip(cleans, others) if self.mode == "noising" else zip(others, cleans)
        return [self._pair(i, base, other) for i, (base, other) in enumerate(ordered)], many

    def _pair(self, index: int, base: Encoded, other: Encoded | None) -> _Pair:
        read = self._read(base, index)
        if other is None:
            return _Pair(base, None, read, 0, np.arange(len(base)), 0)
        if np.array_equal(base.ids, other.ids):
            raise ValueError(
                f"Expected clean and corrupted to differ in at least one token: those of pair {index} are the same"
            )
        partner, other_read = self._aligned(base.ids, other.ids), self._read(other, index)
        if self.causal:
            partner[partner > other_read] = -1  # behind the token that is read nothing is run
        if isinstance(self.align, str) and self.align == "auto" and self.binding.head:
            partner[read] = other_read  # also where texts end in other words, or one goes on where the other ends
        shared = min(len(base), len(other))
        alike = (base.ids[:shared] == other.ids[:shared]) & (partner[:shared] == np.arange(shared))
        first = int(np.append(alike, False).argmin())
        if self.binding.length_group(len(base)) != self.binding.length_group(len(other)):
            first = 0  # other rotary frequencies: the runs differ from the first token on
        return _Pair(base, other, read, other_read, partner, first)

    def _read(self, text: Encoded, index: int) -> int:
        """Where the reward is read; a model that pools by itself reads where it does."""
        return self.rm._position(text.ids, index, None) if self.binding.head else 0

    def _aligned(self, base: np.ndarray, other: np.ndarray) -> np.ndarray:
        """For each position of the base run the other run's, or -1."""
        align = self.align
        if isinstance(align, str):
            if align not in ("auto", "strict"):
                raise ValueError(f'Expected align to be "auto", "strict" or a map of positions, got {align!r}')
            if len(base) == len(other):
                return np.arange(len(base))
            if align == "strict":
                raise ValueError(
                    f'Expected texts of equal length with align="strict", got {len(base)} and {len(other)} tokens'
                )
            return align_tokens(base, other)
        pairs = align.items() if isinstance(align, Mapping) else enumerate(align)
        noising = self.mode == "noising"  # the map goes from clean to corrupted, as noising does
        partner = np.full(len(base), -1)
        for clean, corrupted in pairs:
            if corrupted is None or corrupted < 0:
                continue
            at, to = (clean, corrupted) if noising else (corrupted, clean)
            if not 0 <= at < len(base) or not 0 <= to < len(other):
                raise ValueError(f"Expected align to map positions inside of the texts, got {clean} -> {corrupted}")
            if partner[at] >= 0:
                raise ValueError(f"Expected align to give each position one partner, got two for {at} of the base run")
            partner[at] = to
        return partner

    def grid(self, pair: _Pair) -> _Grid:
        tokens, spans = len(pair.base), _spans(self.positions, len(pair.base))
        paired = np.zeros((len(spans), tokens), bool)
        for g, span in enumerate(spans):
            paired[g, span] = True
        paired &= pair.partner >= 0
        missing = np.asarray(~paired.any(1))
        groups = paired.copy()
        if self.causal:
            # What comes after the read token has no part in it; and before the runs first differ, the values that would
            # be put in are the ones that stand there.
            groups[:, pair.base_read + 1 :] = False
            groups[:, : pair.first] = False
        reaches = np.asarray(groups.any(1))
        at_last = groups[:, pair.base_read] if self.causal else reaches

        width = max(map(len, self.units.values()))
        shape = (len(self.kinds), len(self.layers), len(spans), width)
        cells = np.arange(np.prod(shape)).reshape(shape)
        same: list[np.ndarray] = []
        parts: list[list[np.ndarray]] = []
        for s, kind in enumerate(self.kinds):
            units = np.array(self.units[kind])
            index = np.meshgrid(np.array(self.layers), np.arange(len(spans)), np.arange(len(units)), indexing="ij")
            layer, group, unit = (x.ravel() for x in index)
            cell = cells[s, :, :, : len(units)].ravel()
            # The last layer's output is read at one row; its k and v, and the stream that enters it, at all.
            last = (layer == self.patcher.layers - 1) & (kind not in ("k", "v", "resid_pre"))
            effect: np.ndarray = np.where(last, at_last[group], reaches[group])
            same.append(cell[~effect & ~missing[group]])
            code = np.full(len(cell), KINDS.index(kind), np.int8)
            columns = (code, layer.astype(np.int32), group.astype(np.int32), units[unit].astype(np.int32), cell)
            parts.append([column[effect] for column in columns])
        kinds, layers, group, unit, cell = (np.concatenate(column) for column in zip(*parts))

        axes = ["layer", "position"] if self.single else ["site", "layer", "position"]
        if width > 1 or any(kind in UNITS for kind in self.kinds):
            names = {(UNITS.get(kind), *self.units[kind]) for kind in self.kinds}
            axes.append(UNITS[self.kinds[0]] if len(names) == 1 else "unit")
        sizes = dict(zip(("site", "layer", "position"), shape))
        return _Grid(
            axes=axes,
            shape=tuple(sizes.get(axis, width) for axis in axes),
            spans=spans,
            edits=Edits(kinds, layers, group, unit, groups),
            cells=torch.from_numpy(cell),
            same=torch.from_numpy(np.concatenate(same)),
        )

    def values(self, pair: _Pair, base: Record, other: Record | None) -> Values:
        """What is put in at each position of the base run."""
        tokens = len(base.ids)
        if other is not None:
            partner = torch.from_numpy(pair.partner[:tokens].clip(0))
            return lru_cache(4)(lambda kind, layer: _at(other.activations(kind, layer), partner))
        if self.mode == "zero":

            def zeros(kind: str, layer: int) -> Tensor:
                like = base.activations(kind, layer)
                return like.new_zeros(()).expand_as(like)

            return zeros
        if self.mode == "resample":
            return self._resampled(tokens)
        if self.mode == "mean" and self._mean is None:
            self._mean = self._means()
        fixed: dict[tuple[str, int], Tensor] = self._mean if self.mode == "mean" else self.given  # type: ignore[assignment]

        def constant(kind: str, layer: int) -> Tensor:
            like = base.activations(kind, layer)
            return fixed[kind, layer].to(like).expand_as(like)

        return constant

    def _means(self) -> dict[tuple[str, int], Tensor]:
        """Of all tokens of all baseline texts, (units, width) in fp64."""
        assert self.baseline is not None
        total: dict[tuple[str, int], Tensor] = {}
        for text in self.baseline:
            record = self.patcher.record(text, len(text) - 1, set(self.kinds), self.layers, base=False)
            for key in ((kind, layer) for kind in self.kinds for layer in self.layers):
                part = record.activations(*key).double().sum(0)
                total[key] = total[key] + part if key in total else part
        tokens = sum(len(text) for text in self.baseline)
        return {key: value / tokens for key, value in total.items()}

    def _resampled(self, tokens: int) -> Values:
        """At each position the activations of one token of one baseline text, the same one at all sites."""
        assert self.baseline is not None
        rng = np.random.default_rng(self.seed)
        text = rng.integers(0, len(self.baseline), tokens)
        token = (rng.random(tokens) * np.array([len(self.baseline[i]) for i in text])).astype(np.int64)
        found: dict[tuple[str, int], Tensor] = {}
        for i in np.unique(text):
            record = self.patcher.record(
                self.baseline[i], len(self.baseline[i]) - 1, set(self.kinds), self.layers, base=False
            )
            here = np.flatnonzero(text == i)
            for key in ((kind, layer) for kind in self.kinds for layer in self.layers):
                rows = record.activations(*key)
                if key not in found:
                    found[key] = rows.new_empty(tokens, *rows.shape[1:])
                found[key][torch.from_numpy(here).to(rows.device)] = _at(rows, torch.from_numpy(token[here]))
        return lambda kind, layer: found[kind, layer]

    def fingerprint(self, pairs: list[_Pair], *more: Any) -> str:
        """Of all that a sweep's numbers depend on."""
        asked = (self.mode, self.kinds, self.layers, self.units, self.seed, more)
        digest = hashlib.sha256(repr(asked).encode())
        arrays: list[np.ndarray] = [text.ids for text in self.baseline or ()]
        for pair in pairs:
            digest.update(repr((_spans(self.positions, len(pair.base)), pair.base_read, pair.first)).encode())
            arrays += [pair.base.ids, pair.partner]
            arrays += [pair.other.ids] if pair.other is not None else []
        arrays += [tensor.detach().double().cpu().numpy() for tensor in (self.given or {}).values()]
        dtypes = sorted({str(p.dtype) for p in self.binding.root.parameters()})
        digest.update(f"{_model.fingerprint(self.binding.root)} {dtypes}".encode())
        for array in arrays:
            digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def result(
        self, pair: _Pair, grid: _Grid, flat: Tensor, base: Tensor | None, other: Tensor | None, **more: Any
    ) -> PatchSweep:
        """From rewards (cells, K), and those of the two runs (K,), or of all three the metric's numbers (..., 1)."""
        labelled = flat.size(1) > 1
        axes = [*grid.axes, "label"] if labelled else grid.axes
        coords: dict[str, list[Any]] = {"site": self.kinds, "layer": self.layers, "position": grid.spans}
        coords["label"] = list(range(flat.size(1)))
        # Heads are numbered alike in all kinds that have them; heads beside neurons are only counted.
        units = [self.units[kind] for kind in self.kinds if kind in UNITS]
        longest = max(units, key=len, default=[0])
        alike = all(some == longest[: len(some)] for some in units)
        coords["unit"] = longest if alike else list(range(grid.shape[-1]))
        coords |= dict.fromkeys(("head", "neuron"), self.units[self.kinds[0]])
        ids = pair.base.ids.tolist()
        base, other = (r if labelled or r is None else r[0] for r in (base, other))
        clean, corrupted = (other, base) if self.mode == "denoising" else (base, other)
        return PatchSweep(
            rewards=flat.reshape(*grid.shape, -1) if labelled else flat.reshape(grid.shape),
            axes=tuple(axes),
            coords={axis: coords[axis] for axis in ["site", *axes]},
            clean_reward=clean,  # type: ignore[arg-type]
            corrupted_reward=corrupted,
            base="corrupted" if self.mode == "denoising" else "clean",
            mode=self.mode,
            tokens=words(self.rm.tokenizer, ids),
            token_ids=ids,
            unpaired=int((pair.partner < 0).sum()),
            without_effect=len(grid.same),
            engine="suffix" if isinstance(self.patcher, SuffixPatcher) else "layers",
            **more,
        )

    def measured(self, rewards: Tensor) -> Tensor:
        """(n, K) rewards -> (n, 1) of the metric, or as they are; NaN stays NaN."""
        if self.metric is None:
            return rewards
        out = rewards.new_full((len(rewards), 1), torch.nan, dtype=torch.float64)
        for i in (~rewards.isnan().any(1)).nonzero()[:, 0].tolist():
            value = torch.as_tensor(self.metric(rewards[i]))
            if value.numel() != 1:
                raise ValueError(f"Expected metric to return one number, got shape {tuple(value.shape)}")
            out[i] = value.detach().double()
        return out


def _sweep(
    options: _Options, pair: _Pair, batch_tokens: int | None, bar: tqdm, saved: _Checkpoint | None, number: int,
    screen: tuple[int, PatchSweep] | None,
) -> PatchSweep:  # fmt: skip
    grid, patcher = options.grid(pair), options.patcher
    chosen = np.arange(len(grid.edits))
    if screen is not None:
        size = _cells(screen[1].effect, grid).abs().amax(1)[grid.cells]
        chosen = np.sort(np.argsort(-size.numpy(), kind="stable")[: screen[0]])
    cells = grid.cells[torch.from_numpy(chosen)]
    with options.binding.session():
        base = patcher.record(pair.base, pair.base_read, options.recorded, options.layers)
        other = None
        if pair.other is not None:
            other = patcher.record(pair.other, pair.other_read, set(options.kinds), options.layers, base=False)
        edits = grid.edits[chosen]
        edits = replace(edits, groups=edits.groups[:, : len(base.ids)])
        budget = _budget(options.rm, patcher, base, edits, batch_tokens)
        flat = torch.full((math.prod(grid.shape), len(base.reward)), torch.nan, dtype=base.reward.dtype)
        flat[grid.same] = base.reward
        done = np.zeros(len(edits), bool)
        if saved is not None:
            runs = torch.stack([base.reward, base.reward if other is None else other.reward])
            done, rewards, budget = saved.of(number, cells, runs, budget)
            flat[cells[torch.from_numpy(done)]] = rewards[torch.from_numpy(done)]

        def finish(some: np.ndarray, rewards: Tensor) -> None:
            flat[cells[torch.from_numpy(some)]] = rewards.to(flat.dtype)
            bar.update(len(some))
            if saved is not None:
                saved.add(number, some, rewards)

        bar.total = (bar.total or 0) + len(edits)
        bar.update(int(done.sum()))
        if not done.all():
            patcher.rewards(base, edits, options.values(pair, base, other), budget, finish, done)
    flat = flat.clone()  # outside of inference mode: an ordinary tensor
    two = [None if record is None else options.measured(record.reward.clone()[None])[0] for record in (base, other)]
    result = options.result(
        pair, grid, options.measured(flat), *two, run=len(edits), method="patching", screen=None  # type: ignore[arg-type]
    )  # fmt: skip
    if screen is not None:
        exact, linear = (_cells(x.effect, grid)[cells].flatten().numpy() for x in (result, screen[1]))
        agreement = float(spearmanr(exact, linear).statistic) if len(exact) > 1 else math.nan
        result.screen = {"method": "atp", "top": screen[0], "n": len(edits), "spearman": agreement}
    return result


def _cells(values: Tensor, grid: _Grid) -> Tensor:
    """A result's grid as (cells, labels)."""
    return values.reshape(math.prod(grid.shape), -1)


def _estimate(options: _Options, pair: _Pair) -> PatchSweep:
    """The linear estimate of every site: the reward's gradient at the base run times what a patch would change."""
    grid, kinds = options.grid(pair), set(options.kinds)
    hooked = options.hooked
    metric = options.metric and (lambda rewards: torch.as_tensor(options.metric(rewards)))  # type: ignore[misc]
    base, slopes = hooked.gradients(pair.base, pair.base_read, kinds, metric)
    with options.binding.session():
        other = None if pair.other is None else hooked.record(pair.other, pair.other_read, kinds, options.layers)
        values = options.values(pair, base, other)
        edits = grid.edits
        two = [None if record is None else options.measured(record.reward[None])[0] for record in (base, other)]
        assert two[0] is not None
        flat = torch.full((math.prod(grid.shape), len(two[0])), torch.nan, dtype=two[0].dtype)
        flat[grid.same] = two[0]
        groups = torch.from_numpy(edits.groups[:, : len(base.ids)])
        for kind in options.kinds:
            for layer in options.layers:
                here = np.flatnonzero((edits.kind == KINDS.index(kind)) & (edits.layer == layer))
                if not len(here):
                    continue
                change = values(kind, layer).double() - base.activations(kind, layer).double()
                slope = slopes(kind, layer).double()
                linear = (slope.unflatten(0, (-1, len(base.ids))) if slope.dim() == 3 else slope) * change
                by_group = torch.einsum("gt,ktu->kgu", groups.to(linear), linear.sum(-1)).cpu()
                effect = by_group[
                    :, torch.from_numpy(edits.group[here]).long(), torch.from_numpy(edits.unit[here]).long()
                ]
                flat[grid.cells[torch.from_numpy(here)]] = (two[0] + effect.T).to(flat.dtype)
    return options.result(pair, grid, flat, *two, run=0, method="attribution", screen=None)  # type: ignore[arg-type]


# Helpers --------------------------------------------------------------------------------------------------------------


def _at(rows: Tensor, index: Tensor) -> Tensor:
    return rows[index.to(rows.device)]


def _indices(name: str, given: Any, count: int) -> list[int]:
    """Layers, heads or neurons in [0, count), negative ones from the end."""
    asked = [given] if isinstance(given, int | np.integer) else list(given)
    if not asked:
        raise ValueError(f"Expected {name} to name at least one")
    for i in asked:
        if isinstance(i, bool) or not isinstance(i, int | np.integer):
            raise TypeError(f"Expected {name} to be ints, got {i!r}")
        if not -count <= i < count:
            raise ValueError(f"Expected {name} to be in [0, {count}), got {i}")
    found = [int(i) % count for i in asked]
    if len(set(found)) < len(found):
        raise ValueError(f"Expected {name} to be different, got {given!r}")
    return found


def _spans(positions: Any, tokens: int) -> list[list[int]]:
    """Groups of positions that are patched together."""
    if positions is None or (isinstance(positions, str) and positions == "all"):
        return [[t] for t in range(tokens)]
    if isinstance(positions, str):
        if positions != "joint":
            raise ValueError(f'Expected positions to be "all", "joint" or a list, got {positions!r}')
        return [list(range(tokens))]
    groups = []
    for item in [positions] if isinstance(positions, int | np.integer) else positions:
        if isinstance(item, slice):
            item = range(*item.indices(tokens))
        groups.append(sorted(_indices("positions", item, tokens)))
    if not groups:
        raise ValueError("Expected positions to name at least one")
    return groups


def align_tokens(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """For each token of base (T,) its partner's position in other, or -1.

    What both begin and end with is matched; inside of the span that differs, the longest common runs of tokens
    (difflib), and what is replaced by as many other tokens, one to one.
    """
    shared = min(len(base), len(other))
    differ = np.flatnonzero(base[:shared] != other[:shared])
    head = int(differ[0]) if len(differ) else shared
    differ = np.flatnonzero(base[::-1][: shared - head] != other[::-1][: shared - head])
    tail = int(differ[0]) if len(differ) else shared - head
    partner = np.full(len(base), -1)
    partner[:head] = np.arange(head)
    partner[len(base) - tail :] = np.arange(len(other) - tail, len(other))
    a, b = base[head : len(base) - tail].tolist(), other[head : len(other) - tail].tolist()
    for tag, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag == "equal" or (tag == "replace" and a1 - a0 == b1 - b0):
            partner[head + a0 : head + a1] = np.arange(head + b0, head + b1)
    return partner


def _budget(rm: RewardModel, patcher: Patcher, base: Record, edits: Edits, asked: int | None) -> int:
    least = patcher.least_tokens(base, edits)
    if asked is not None and asked < least:
        raise ValueError(
            f"Expected batch_tokens to be at least {least}, the rows of the longest edited run, got {asked}"
        )
    # Rows of edits carry less beside them than texts do; twice as many take 2% (fp32) to 7% (bf16) less time.
    return max(least, 2 * rm._default_batch_tokens(getattr(patcher, "engine", None)) if asked is None else asked)


class _Checkpoint:
    """Rewards of the edits that are done, in one file; a file of another sweep is refused."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.refusal = (
            f"Expected {path.name} to be a checkpoint of this very sweep (texts, sites, mode and model), got one of "
            "another. Remove it, or give another path"
        )
        self.tensors: dict[str, Tensor] = {}
        self.written = time.monotonic()
        if path.exists():
            with safetensors.safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("fingerprint") != fingerprint:
                    raise ValueError(self.refusal)
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def of(self, number: int, cells: Tensor, runs: Tensor, budget: int) -> tuple[np.ndarray, Tensor, int]:
        """Which of a pair's edits are done, their rewards (edits, K) and the budget that they were cut into chunks by.

        The rewards of the two runs tell what no fingerprint of the texts and weights does: adapters, hooks, the token
        that is read.
        """
        fresh = {
            "cells": cells.clone(),
            "runs": runs.clone(),
            "done": torch.zeros(len(cells), dtype=torch.bool),
            "rewards": runs.new_zeros(len(cells), runs.size(1)),
            "budget": torch.tensor(budget),
        }
        found = {name: self.tensors.setdefault(f"{name}.{number}", tensor) for name, tensor in fresh.items()}
        near = torch.allclose(found["runs"], runs, rtol=1e-4, atol=1e-5, equal_nan=True)
        if not torch.equal(found["cells"], cells) or not near:
            self.tensors = {}
            raise ValueError(self.refusal)
        return found["done"].numpy().copy(), found["rewards"], int(found["budget"])

    def add(self, number: int, some: np.ndarray, rewards: Tensor) -> None:
        at = torch.from_numpy(some)
        self.tensors[f"rewards.{number}"][at] = rewards.to(self.tensors[f"rewards.{number}"].dtype)
        self.tensors[f"done.{number}"][at] = True
        if time.monotonic() - self.written > _SAVE_SECONDS:
            self.write()

    def write(self) -> None:
        partial = self.path.with_name(self.path.name + ".partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.tensors:
            return
        safetensors.torch.save_file(self.tensors, partial, {"fingerprint": self.fingerprint})
        os.replace(partial, self.path)
        self.written = time.monotonic()

"""What a sweep and its linear estimate are asked for: arguments checked, texts paired, the edits and their values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from rmfast import arguments
from rmfast.engine.programs import gate_position
from rmfast.engine.scorer import Scorer
from rmfast.patching.grid import PatchSweep
from rmfast.patching.layers_patcher import LayersPatcher
from rmfast.patching.pairs import Align, Grid, Pair, aligned, spans_of
from rmfast.patching.patcher import patcher_of
from rmfast.patching.sites import SITES, UNITS, Edits, Patcher, Record, Values, sites_of
from rmfast.patching.suffix_patcher import SuffixPatcher, SuffixRecord
from rmfast.texts.inputs import Encoded, inputs_of, several, words

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from rmfast.engine.options import Encoding

Metric = Callable[[Tensor], Any]
_PAIRED = ("denoising", "noising")
_ALONE = ("zero", "mean", "resample")


class Request:
    """The arguments that a sweep and its linear estimate share, checked."""

    every = False  # whether every token is read, and not the one of the reward alone

    def __init__(
        self,
        rm: Scorer,
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
        patterns: Literal["own", "frozen"] = "own",
        **encoding: Unpack[Encoding],
    ) -> None:
        self.rm = arguments.instance("rm", rm, Scorer)
        self.binding = rm.binding
        self.patcher: Patcher = patcher_of(rm)
        self.causal = rm.binding.causal
        self.mode = mode if isinstance(mode, str) else "values"
        self.given: Any = None if isinstance(mode, str) else mode
        if not isinstance(mode, Tensor | Mapping):
            arguments.word("mode, where it is no tensor of values,", mode, (*_PAIRED, *_ALONE))
        self.single = isinstance(sites, str)
        self.kinds = sites_of(sites)
        try:
            sizes = {kind: self.patcher.units(kind) for kind in self.kinds}
        except ValueError:  # a part that the suffix engine does not know, but a hook may reach
            self.patcher = cast(Patcher, LayersPatcher(self.binding))
            sizes = {kind: self.patcher.units(kind) for kind in self.kinds}
        self.sizes = sizes
        self.patterns = arguments.word("patterns", patterns, ("own", "frozen"))
        if self.patterns == "frozen":
            self._freeze()
        if "pattern" in self.kinds and self.mode not in _PAIRED:
            raise ValueError(
                f"Expected pattern, a place for that of another text, with two of them, got mode {self.mode!r}"
            )
        count = self.patcher.layers
        self.layers = list(range(count)) if layers is None else arguments.indices("layers", layers, count)
        for name, given in (("head", heads), ("neuron", neurons)):
            if given is not None and name not in map(UNITS.get, self.kinds):
                having = ", ".join(kind for kind in SITES if UNITS.get(kind) == name)
                raise ValueError(f"Expected {name}s with sites of {having} alone, got sites {', '.join(self.kinds)}")
        self.units = {kind: self._units(kind, sizes[kind][0], heads, neurons) for kind in self.kinds}
        if arguments.is_whole(positions):
            positions = [positions]
        self.positions = positions
        if not isinstance(positions, str | None):
            self.positions = arguments.sequence("positions", positions, '"all", "joint" or a sequence')
        if self.mode not in _PAIRED and not (isinstance(align, str) and align == "auto"):
            raise ValueError(f"Expected align, of two texts, with two of them alone, got mode {self.mode!r}")
        self.align, self.seed = align, arguments.whole("seed", seed, 0)
        self.metric = metric if metric is None else arguments.function("metric", metric, "the rewards (K,)")
        if (baseline is not None) != (self.mode in ("mean", "resample")):
            raise ValueError(f'Expected baseline (texts) with mode "mean" or "resample" alone, got mode {self.mode!r}')
        self.encoding = encoding
        self.baseline = None
        if baseline is not None:
            self.baseline = self._encode("baseline", arguments.sequence("baseline", baseline, "a sequence of texts"))
        if self.given is not None:
            self.given = self._given(self.given)
        self._mean: dict[tuple[str, int], Tensor] | None = None

    @cached_property
    def hooked(self) -> LayersPatcher:
        """What takes gradients."""
        return self.patcher if isinstance(self.patcher, LayersPatcher) else LayersPatcher(self.binding)

    @property
    def recorded(self) -> set[str]:
        """What is kept of a base run: tails of the MLP start from the stream before it, and a pattern is one head's."""
        if not isinstance(self.patcher, SuffixPatcher):
            return set(self.kinds)
        return {*self.kinds, "resid_mid", *(["head_out"] if "pattern" in self.kinds else [])}

    def _freeze(self) -> None:
        if not isinstance(self.patcher, SuffixPatcher):
            raise ValueError(
                'Expected patterns="own" of a model that runs by hooks: attention is taken apart in layers that the '
                "suffix engine knows"
            )
        if moved := [kind for kind in ("q", "k", "pattern") if kind in self.kinds]:
            raise ValueError(
                f'Expected patterns="own" with sites of {", ".join(moved)}, which patches put other patterns in by'
            )
        self.patcher = SuffixPatcher(self.patcher.engine, frozen_patterns=True)

    def _units(self, kind: str, count: int, heads: Any, neurons: Any) -> list[int]:
        unit = UNITS.get(kind)
        if unit == "neuron":
            if neurons is None:
                raise ValueError(f"Expected neurons, the ones to sweep of each layer's {count}, with sites mlp_neuron")
            return arguments.indices("neurons", neurons, count)
        if unit is None or heads is None:
            return list(range(count))
        return arguments.indices(f"heads of {kind}", heads, count)

    def _given(self, mode: Any) -> dict[tuple[str, int], Tensor]:
        """Values by kind and layer, (units, width)."""
        tensors = mode if isinstance(mode, Mapping) else dict.fromkeys(self.kinds, mode)
        if set(tensors) != set(self.kinds):
            names = ", ".join(map(arguments.shown, tensors)) or "none"
            raise ValueError(f"Expected values in mode for sites {', '.join(self.kinds)}, got them for {names}")
        found: dict[tuple[str, int], Tensor] = {}
        for kind, tensor in tensors.items():
            wanted = (len(self.layers), *self.sizes[kind])
            arguments.instance(f"the values of {kind} in mode", tensor, Tensor)
            if tensor.dtype == torch.bool or tensor.is_complex() or tensor.is_meta:
                raise TypeError(f"Expected the values of {kind} in mode to be real numbers, got {tensor.dtype}")
            try:
                full = (tensor[:, None] if tensor.dim() == 2 else tensor).broadcast_to(wanted)
            except RuntimeError:
                raise ValueError(
                    f"Expected the values of {kind} in mode to be of shape ({wanted[2]},), {wanted[::2]} or {wanted} "
                    f"(layers, units, width), got {tuple(tensor.shape)}"
                ) from None
            found |= {(kind, layer): full[i] for i, layer in enumerate(self.layers)}
        return found

    def _encode(self, name: str, texts: Any) -> list[Encoded]:
        with inputs_of(name):
            encoded = self.rm.encode(texts, **self.encoding)
        if not encoded:
            raise ValueError(f"Expected {name} to hold at least one text")
        return encoded

    def pairs(self, clean: Any, corrupted: Any) -> tuple[list[Pair], bool]:
        many = several(clean)
        cleans = self._encode("clean", clean if many else [clean])
        if self.mode not in _PAIRED:
            if corrupted is not None:
                raise ValueError(f"Expected no corrupted text with mode {self.mode!r}, which patches the clean run")
            return [self._pair(i, text, None) for i, text in enumerate(cleans)], many
        if corrupted is None:
            raise ValueError(f"Expected a corrupted text with mode {self.mode!r}, got None")
        others = self._encode("corrupted", corrupted if several(corrupted) else [corrupted])
        if several(corrupted) != many or len(others) != len(cleans):
            raise ValueError("Expected clean and corrupted to be one text each, or lists of the same length")
        ordered = zip(cleans, others) if self.mode == "noising" else zip(others, cleans)
        return [self._pair(i, base, other) for i, (base, other) in enumerate(ordered)], many

    def _pair(self, index: int, base: Encoded, other: Encoded | None) -> Pair:
        read = self._read(base, index)
        gates = None
        if self.rm.gated:
            two = (base, base if other is None else other)
            gate, other_gate = (gate_position(self.binding, text, index) for text in two)
            if gate > read:
                raise ValueError(
                    f"Expected the reward of text {index} to be read behind its prompt's end, token {gate}"
                )
            gates = gate, other_gate
        if other is None:
            return Pair(base, None, read, 0, np.arange(len(base)), 0, gates)
        if np.array_equal(base.ids, other.ids):
            raise ValueError(
                f"Expected clean and corrupted to differ in at least one token: those of pair {index} are the same"
            )
        partner, other_read = aligned(base.ids, other.ids, self.align, self.mode == "noising"), self._read(other, index)
        if self.causal:
            partner[partner > other_read] = -1  # behind the token that is read nothing is run
        if isinstance(self.align, str) and self.align == "auto" and self.binding.reads_rows:
            partner[read] = other_read  # also where texts end in other words, or one goes on where the other ends
            if gates is not None:
                partner[gates[0]] = gates[1]
        shared = min(len(base), len(other))
        alike = (base.ids[:shared] == other.ids[:shared]) & (partner[:shared] == np.arange(shared))
        first = int(np.append(alike, False).argmin())
        group_of = self.binding.length_group
        if group_of(len(base)) != group_of(len(other)):
            first = 0  # other rotary frequencies: the runs differ from the first token on
        return Pair(base, other, read, other_read, partner, first, gates)

    def _read(self, text: Encoded, index: int) -> int:
        """Where the reward is read; a model that pools by itself reads where it does."""
        return self.rm.position(text.ids, index) if self.binding.reads_rows else 0

    def groups(self, pair: Pair) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
        """The groups of positions that are asked for, which of them have no partner at all (G,), and the positions of
        each at which a patch may have an effect (G, T)."""
        tokens, spans = len(pair.base), spans_of(self.positions, len(pair.base))
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
        return spans, missing, groups

    def grid(self, pair: Pair) -> Grid:
        spans, missing, groups = self.groups(pair)
        reaches = np.asarray(groups.any(1))
        at_last = groups[:, pair.base_read] if self.causal and not self.every else reaches
        if pair.gates is not None:
            at_last = at_last | groups[:, pair.gates[0]]

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
            code = np.full(len(cell), SITES.index(kind), np.int8)
            columns = (code, layer.astype(np.int32), group.astype(np.int32), units[unit].astype(np.int32), cell)
            parts.append([column[effect] for column in columns])
        kinds, layers, group, unit, cell = (np.concatenate(column) for column in zip(*parts))

        axes = ["layer", "position"] if self.single else ["site", "layer", "position"]
        if width > 1 or any(kind in UNITS for kind in self.kinds):
            names = {(UNITS.get(kind), *self.units[kind]) for kind in self.kinds}
            axes.append(UNITS[self.kinds[0]] if len(names) == 1 else "unit")
        sizes = dict(zip(("site", "layer", "position"), shape))
        return Grid(
            axes=axes,
            shape=tuple(sizes.get(axis, width) for axis in axes),
            spans=spans,
            edits=Edits(kinds, layers, group, unit, groups),
            cells=torch.from_numpy(cell),
            same=torch.from_numpy(np.concatenate(same)),
        )

    def values(self, pair: Pair, base: Record, other: Record | None) -> Values:
        """What is put in at each position of the base run."""
        tokens = len(base.ids)
        if other is not None:
            if "pattern" in self.kinds and not np.array_equal(pair.partner[:tokens], np.arange(tokens)):
                raise ValueError(
                    "Expected two texts that correspond token by token with sites pattern: each key needs a partner"
                )
            partner = torch.from_numpy(pair.partner[:tokens].clip(0))

            def swapped(kind: str, layer: int) -> Tensor:
                if kind == "pattern":
                    patcher, of = cast(SuffixPatcher, self.patcher), cast(SuffixRecord, other)
                    return patcher.with_pattern(of, cast(SuffixRecord, base), layer)
                return _rows_at(other.activations(kind, layer), partner)

            return lru_cache(4)(swapped)
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
                found[key][torch.from_numpy(here).to(rows.device)] = _rows_at(rows, torch.from_numpy(token[here]))
        return lambda kind, layer: found[kind, layer]

    def fingerprint(self, pairs: list[Pair], *more: Any) -> str:
        """Of all that a sweep's numbers depend on."""
        asked = (self.mode, self.kinds, self.layers, self.units, self.seed, self.patterns, more)
        digest = hashlib.sha256(repr(asked).encode())
        arrays: list[np.ndarray] = [text.ids for text in self.baseline or ()]
        for pair in pairs:
            digest.update(repr((spans_of(self.positions, len(pair.base)), pair.base_read, pair.first)).encode())
            arrays += [pair.base.ids, pair.partner]
            arrays += [pair.other.ids] if pair.other is not None else []
        arrays += [tensor.detach().double().cpu().numpy() for tensor in (self.given or {}).values()]
        dtypes = sorted({str(p.dtype) for p in self.binding.root.parameters()})
        digest.update(f"{self.binding.fingerprint} {dtypes} {self.binding.in_fp32}".encode())
        for array in arrays:
            digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def result(
        self, pair: Pair, grid: Grid, flat: Tensor, base: Tensor | None, other: Tensor | None, **more: Any
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
            patterns=self.patterns,
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
            value = arguments.array("what metric returns", self.metric(rewards[i]))
            if value.size != 1:
                raise ValueError(f"Expected metric to return one number, got shape {value.shape}")
            out[i] = value.item()
        return out


def _rows_at(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], the index moved to the rows' device."""
    return rows[index.to(rows.device)]

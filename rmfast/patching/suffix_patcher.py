"""Edited runs on the suffix engine: each is the rows that an edit reaches, over the base run's K and V.

An edit of layer l changes some rows of the stream that enters layer l + 1 (or l, for resid_pre). From there on it is a
suffix: the base run's rows from the first changed position to the read one, over the base run's K and V before them.
Layers and positions before are the base run's own (layer and prefix reuse: exact). What the edit makes of its rows
inside of layer l is computed first, for those rows alone (a *tail*): one row for each position of an edit, or for k and
v, on which later rows of the layer depend, all rows from the first changed one.

Edits are sorted by the layer that they enter and cut into chunks under a token budget. A chunk runs layer by layer, all
of its suffixes that have entered in one flat batch, a leading slice of which has been in it for longest. In the last
layer only the read rows have queries, output and MLP; the final norm and head read them. A gated head reads a row more,
the prompt's end: of suffixes that have it, the last layer runs the rows from there on, of others it is the base run's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rmfast.engine.attention import Run
from rmfast.engine.invariance import padded, padding
from rmfast.engine.layers import Layer
from rmfast.engine.memory import out_of_memory
from rmfast.engine.packed import Engine
from rmfast.heads.given import last_occurrence
from rmfast.kernels.patch_rows.reference import gather
from rmfast.ops import patch_rows
from rmfast.patching.sites import SITES, Edits, SourcedValues, Values
from rmfast.texts.inputs import Encoded

_CODE = {kind: i for i, kind in enumerate(SITES)}
_STREAM = (_CODE["resid_pre"], _CODE["resid_post"])
_KV = (_CODE["k"], _CODE["v"])


@dataclass(eq=False)
class SuffixRecord:
    """A run of one text up to its read token, as `rmfast.patching.sites.Record`; T is the tokens up to there.

    Attributes:
        reward: (K,), or where every token is read (T · K,).
        stream: (T, d) by the layer that it enters, L after the last one.
        parts: (T, units, width) by kind and layer.
        gate: the position that a gated head's gate reads, else None.
        gate_values: (1, V), what the head keeps of that row.
        cos, sin: (T, R) by layer.
        rotated: q, k (after norms and rotation) and v, (T, H, D), by layer.
    """

    ids: np.ndarray
    read: int
    reward: Tensor
    gate: int | None = None
    gate_values: Tensor | None = None
    stream: dict[int, Tensor] = field(default_factory=dict)
    parts: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    cos: dict[int, Tensor] = field(default_factory=dict)
    sin: dict[int, Tensor] = field(default_factory=dict)
    rotated: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def activations(self, kind: str, layer: int) -> Tensor:
        """(T, units, width) of a kind and layer that were recorded."""
        if kind in ("resid_pre", "resid_post"):
            return self.stream[layer + (kind == "resid_post")][:, None]
        return self.parts[kind][layer]


class SuffixPatcher:
    """`rmfast.patching.sites.Patcher` of a causal model whose layers the engine knows by structure.

    frozen_patterns: attention in edited runs has the base run's probabilities, and only values change.
    every: reads every token up to the one of the reward, those before an edit as the base run has them: rewards are
        (T · K,) in place of (K,). Not with a gated head.
    """

    def __init__(self, engine: Engine, frozen_patterns: bool = False, every: bool = False):
        assert engine.mode == "fused", engine.why
        self.engine, self.binding = engine, engine.binding
        self.frozen_patterns, self.every = frozen_patterns, every
        self.layers = len(engine.layers)

    def units(self, kind: str) -> tuple[int, int]:
        layers = [fused for _, fused in self.engine.layers]
        layer = layers[0]
        heads = layer.projections
        if kind in ("head_out", "pattern", "q"):
            return heads.count, heads.size
        if kind in ("k", "v"):
            return heads.kv_count, heads.size
        if kind == "resid_mid" and (index := [i for i, fused in enumerate(layers) if fused.parallel]):
            raise ValueError(f"Expected layer {index[0]} to have resid_mid: its attention and MLP read the same stream")
        if kind != "mlp_neuron":
            return 1, layer.width
        if any(fused.inner is None for fused in layers):
            raise ValueError(
                "Expected sites without mlp_neuron: it needs MLPs of projections in and out, and a function of a known "
                f"formula between them (a SiLU, GELU or ReLU), got {type(layer.mlp).__name__}"
            )
        return layer.neuron_count, 1

    def record(
        self, text: Encoded, read: int, kinds: set[str], layers: Collection[int] | None = None, base: bool = True,
        bounds: np.ndarray | None = None,
    ) -> SuffixRecord:  # fmt: skip
        """As `Patcher.record`; with `bounds` (n + 1,) of n texts one behind the other, for their activations alone."""
        ids = text.ids[: read + 1]
        bounds = np.array([0, len(text)]) if bounds is None else bounds
        record = SuffixRecord(ids, read, torch.empty(0), parts={kind: {} for kind in kinds})
        if self.binding.program is not None and self.binding.program.gated:
            record.gate = last_occurrence(ids, self.binding.program.pattern) or 0  # a baseline's text may have none
        binding, device = self.binding, self.binding.device
        longest = int(np.diff(bounds).max())
        longest = longest if any(binding.length_group(longest)) else 0
        starts, ends = bounds[:-1], bounds[1:].clip(max=len(ids))
        run = Run(*_suffixes(np.append(starts, len(ids)), np.zeros(len(starts), np.int32), device), pool=_no_pool)
        asked = range(self.layers) if layers is None else layers
        if base:  # what the lowest edit enters, and all that it then runs through
            streams: Collection[int] = range(min(asked, default=self.layers), self.layers + 1)
        else:
            offsets = [offset for kind, offset in (("resid_pre", 0), ("resid_post", 1)) if kind in kinds]
            streams = {layer + offset for layer in asked for offset in offsets}

        def recording(m: int, layer: Layer) -> Callable[..., Tensor]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                x, (cos, sin) = hidden_states[0], layer.tables(hidden_states, kwargs)
                if m in streams:
                    record.stream[m] = x
                    if base:
                        record.cos[m], record.sin[m] = cos, sin
                return layer.returned(self._record_layer(record, m, layer, run, x, cos, sin, m in asked))

            return forward

        tokens = _move(ids.astype(np.int64), device)
        positions = _move(np.arange(len(ids)) - np.repeat(starts, ends - starts), device)
        forwards = [recording(m, fused) for m, (_, fused) in enumerate(self.engine.layers)]
        hidden = self.engine.body(tokens, positions, run, forwards, longest)
        if self.layers in streams:
            record.stream[self.layers] = hidden
        at = torch.arange(0 if self.every else read, read + 1, device=hidden.device)
        if record.gate is None:
            record.reward = binding.rewards(hidden[None], at).flatten().cpu()
        else:
            record.gate_values = binding.row_values(hidden[None], at.new_tensor([record.gate]))
            own = binding.row_values(hidden[None], at, at[:0])
            record.reward = binding.program.rewards(own, record.gate_values)[0].cpu()
        return record

    def _record_layer(
        self, record: SuffixRecord, m: int, layer: Layer, run: Run, x: Tensor, cos: Tensor, sin: Tensor, kinds: bool
    ) -> Tensor:
        """One layer as `Layer.rows`, step by step; its kinds are kept where `kinds`."""

        def keep(kind: str, value: Tensor) -> None:
            if kinds and kind in record.parts:
                record.parts[kind][m] = value if value.dim() == 3 else value[:, None]

        q, k, v = layer.project(layer.enter(x, None)[0])
        for kind, value in (("q", q), ("k", k), ("v", v)):
            keep(kind, value)
        q, k = layer.turn(q, k, cos, sin)
        if m in record.cos or (kinds and "pattern" in record.parts):
            record.rotated[m] = (q, k, v)
        heads = run.attend(layer.attn, q, k, v, **layer.options)
        keep("head_out", heads)
        added = layer.added_by(heads)
        keep("attn_out", added)
        middle = x + added
        keep("resid_mid", middle)
        y = layer.mlp_reads(x, middle)
        if kinds and "mlp_neuron" in record.parts:
            neurons = layer.neurons(y)
            keep("mlp_neuron", neurons[..., None])
            delta = layer.mlp_from(neurons)
        else:
            delta = layer.mlp_of(y)
        keep("mlp_out", delta)
        return middle + delta

    def with_pattern(self, of: SuffixRecord, values: SuffixRecord, layer: int) -> Tensor:
        """(T, Hq, D): what heads give with the attention probabilities of one run and the values of another."""
        (q, k, _), v = of.rotated[layer], values.rotated[layer][2]
        run = Run(*_suffixes(np.array([0, len(v)]), np.zeros(1, np.int32), v.device), pool=_no_pool)
        fused = self.engine.layers[layer][1]
        return run.attend(fused.attn, q[: len(v)], k[: len(v)], v, **fused.options)

    def rewards(
        self,
        base: SuffixRecord,
        edits: Edits,
        values: Values | SourcedValues,
        batch_tokens: int,
        done: Callable[[np.ndarray, Tensor], None],
        skip: np.ndarray,
    ) -> None:
        rows, entry = self._sizes(base, edits)
        order = np.lexsort((-rows, entry))
        start = 0
        while start < len(order):
            ends = np.cumsum(rows[order[start : start + batch_tokens]])  # each is a row at least
            count = max(1, int(np.searchsorted(ends, batch_tokens, side="right")))
            some = order[start : start + count]
            if skip[some].all():
                start += count
                continue
            try:
                with self.engine.alike():
                    rewards = _Chunk(self, base, edits[some], entry[some], values).run()
            except RuntimeError as error:
                if count == 1 or not out_of_memory(error):
                    raise
                batch_tokens = int(ends[count - 1]) // 2
                continue
            done(some, rewards.cpu())
            start += count

    def least_tokens(self, base: SuffixRecord, edits: Edits) -> int:
        """Rows of the largest edit, which a budget must hold."""
        return int(self._sizes(base, edits)[0].max(initial=0))

    def _sizes(self, base: SuffixRecord, edits: Edits) -> tuple[np.ndarray, np.ndarray]:
        """Rows that each edit runs at once, at most, and the layer that it enters."""
        first = edits.groups.argmax(1)[edits.group]
        entry = edits.layer + (edits.kind != _CODE["resid_pre"])
        read_alone = (entry == self.layers) & ~np.isin(edits.kind, _KV)
        rows = len(base.ids) - np.where(read_alone, self.read_from(base, first), first)
        return rows, entry

    def read_from(self, base: SuffixRecord, first: np.ndarray) -> np.ndarray:
        """(E,) the first row read of edits whose first changed position is `first`: the gate's, else the last."""
        if self.every:
            return first
        last = len(base.ids) - 1
        return np.full(len(first), last) if base.gate is None else np.where(first <= base.gate, base.gate, last)


class _Chunk:
    """Edits that run together, sorted by the layer they enter."""

    def __init__(self, patcher: SuffixPatcher, base: SuffixRecord, edits: Edits, entry: np.ndarray, values: Any):
        self.patcher, self.base, self.edits, self.entry, self.values = patcher, base, edits, entry, values
        self.tokens, self.device = len(base.ids), patcher.binding.device
        self.first = edits.groups.argmax(1)[edits.group]
        self.read_from = patcher.read_from(base, self.first)
        self.tile = patcher.engine.tile

    def run(self) -> Tensor:
        """Rewards (n, K)."""
        layers, base = self.patcher.layers, self.base
        x = base.stream[layers][:0]
        delta: Tensor | None = None
        live = _Rows(self.tokens)
        for m in range(layers):
            layer = self.patcher.engine.layers[m][1]
            entering = np.flatnonzero(self.entry == m)
            if not len(live.at) + len(entering):
                continue
            parts = []
            if len(live.at):
                y, x = layer.enter(x, delta)
                at = _move(live.at, self.device)
                reads = _move(live.reads, self.device) if layer.last else None
                heads = layer.heads(y, base.cos[m][at], base.sin[m][at], reads)
                parts.append((*heads, x if reads is None else x[reads]))
            if len(entering):
                rows = _Rows(self.tokens).and_edits(self.first[entering], self.read_from[entering], self.tile)
                parts.append(self._enter(m, entering, rows, layer))
                live = live.and_rows(rows)
            q, k, v, x = parts[0] if len(parts) == 1 else (torch.cat(pair) for pair in zip(*parts))
            if self.patcher.frozen_patterns:
                at = _move(live.at, self.device)
                asking = at[_move(live.reads, self.device)] if layer.last else at
                q, k = base.rotated[m][0][asking], base.rotated[m][1][at]
            cu = np.concatenate([[0], np.cumsum(live.rows)])
            run = Run(*_suffixes(cu, live.prefix, self.device), pool=self._pool(m))
            if layer.last:
                run.cu_reads = _move(np.concatenate([[0], np.cumsum(live.read)]).astype(np.int32), self.device)
            x, delta = layer.after_heads(run, q, k, v, x)
        out = x if delta is None else x + delta
        out = out[_move(np.flatnonzero(live.of_edits), self.device)]
        last = np.flatnonzero(self.entry == layers)
        if len(last):  # of which the read rows alone count
            out = torch.cat([out, self._read_rows(last)])
        return self._rewards(out)

    def _read_rows(self, some: np.ndarray) -> Tensor:
        """What edits `some` of the last layer make of the rows that are read."""
        start, layers = self.read_from[some], self.patcher.layers
        positions = _positions(start, self.tokens)
        made, value_rows = self._replacements(layers, np.repeat(some, self.tokens - start), positions)
        rows = made[_move(value_rows.clip(0), self.device)]
        kept = np.flatnonzero(value_rows < 0)
        if len(kept):
            rows[_move(kept, self.device)] = self.base.stream[layers][_move(positions[kept], self.device)]
        return rows

    def _rewards(self, out: Tensor) -> Tensor:
        """Rewards (n, K) of the read rows of all edits, one after the other's."""
        binding, base = self.patcher.binding, self.base
        ends = (self.tokens - self.read_from).cumsum()
        if self.patcher.every:
            rows = _move(padded(np.arange(ends[-1]), self.tile), self.device)
            edit = np.repeat(np.arange(len(ends)), self.tokens - self.read_from)
            values = base.reward.to(out.device).unflatten(0, (self.tokens, -1)).repeat(len(ends), 1, 1)
            at = _move(edit, self.device), _move(_positions(self.read_from, self.tokens), self.device)
            return values.index_put_(at, binding.rewards(out[None], rows)[: ends[-1]].to(values)).flatten(1)
        if base.gate is None:
            rows = _move(padded(ends - 1, self.tile), self.device)
            return binding.rewards(out[None], rows)[: len(ends)]
        assert base.gate_values is not None
        gated = np.flatnonzero(self.first <= base.gate)  # whose first row that is read is the gate's
        firsts = ends[gated] - self.tokens + self.read_from[gated]
        rows = _move(padded(np.append(ends - 1, firsts), self.tile), self.device)
        marked = torch.arange(len(ends), len(ends) + len(gated), device=self.device)
        values = binding.row_values(out[None], rows, marked)
        gates = base.gate_values.repeat(len(ends), 1).index_copy_(0, _move(gated, self.device), values[marked])
        return binding.program.rewards(values[: len(ends)], gates)

    def _pool(self, m: int) -> Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]:
        _, k, v = self.base.rotated[m]
        pad = -k.size(-1) % 8
        pool = (nn.functional.pad(k, (0, pad)), nn.functional.pad(v, (0, pad))) if pad else (k, v)
        return lambda *_: pool

    def _enter(self, m: int, some: np.ndarray, rows: _Rows, layer: Layer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and the stream with which edits `some` enter layer m; in the last one queries and the
        stream at their read rows. Rows that no value stands in for have the base run's queries, keys and values."""
        base = self.base
        first = self.first[some]
        made, value_rows = self._replacements(m, np.repeat(some, self.tokens - first), _positions(first, self.tokens))
        value_rows = np.append(value_rows, np.full(len(rows.at) - len(value_rows), -1))  # padding
        at, value_at = _move(rows.at, self.device), _move(value_rows, self.device)
        x, y = _entered(layer, base.stream[m], made, at, value_at)
        reads = _move(rows.reads, self.device) if layer.last else None
        fresh = np.flatnonzero(value_rows >= 0)
        new = _move(padded(fresh, self.tile), self.device)
        made_heads = layer.heads(y[new], base.cos[m][at[new]], base.sin[m][at[new]])
        # Layer reuse, one step further: 3.9% of the arithmetic of a residual sweep over 8 layers.
        q, k, v = (
            heads if len(fresh) == len(at) else old[at].index_copy_(0, new[: len(fresh)], heads[: len(fresh)])
            for old, heads in zip(base.rotated[m], made_heads)
        )
        return (q, k, v, x) if reads is None else (q[reads], k, v, x[reads])

    def _replacements(self, m: int, edit: np.ndarray, positions: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """For rows of edits that enter layer m, each edit's last ones: values (V, d), and which of them each row is
        replaced by, -1 for none."""
        edits = self.edits
        kind = edits.kind[edit]
        # After an edit of k or v all rows of the layer are new.
        replaced = edits.groups[edits.group[edit], positions] | np.isin(kind, _KV)
        value_rows = np.full(len(edit), -1)
        pieces: list[Tensor] = []
        offset = 0
        for code in np.unique(kind):
            chosen = (kind == code) & replaced
            if code in _STREAM and edits.source is None:  # what comes in their place is known for all positions
                pieces.append(self.values(SITES[code], m - (SITES[code] == "resid_post"))[: self.tokens, 0])
                value_rows[chosen] = offset + positions[chosen]
            else:
                pieces.append(self._tail(SITES[code], m - 1, edit[chosen], positions[chosen]))
                value_rows[chosen] = np.arange(offset, offset + chosen.sum())
            offset += pieces[-1].size(0)
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0], value_rows

    def _tail(self, kind: str, m: int, edit: np.ndarray, position: np.ndarray) -> Tensor:
        """What edits of one kind inside of a layer make of its output: a row for each (edit, position)."""
        base, layer = self.base, self.patcher.engine.layers[m][1]
        at = _move(position, self.device)
        unit = _move(self.edits.unit[edit], self.device)
        n = torch.arange(len(edit), device=self.device)
        x = base.stream[m][at]

        def replaced(rows: Tensor) -> Tensor:
            """Rows (n, units, width) with their edit's unit taken from the values."""
            rows = rows.clone()
            rows[n, unit] = self._given(kind, m, edit, at, unit).to(rows.dtype)
            return rows

        if kind in ("resid_post", "mlp_out"):
            given = self._given(kind, m, edit, at)
            return given if kind == "resid_post" else base.parts["resid_mid"][m][at, 0] + given
        # Matmuls run on a whole number of tiles; what is behind the edits' rows is left off again.
        whole = _move(padded(np.arange(len(edit)), self.tile), self.device)
        if kind == "mlp_neuron":
            neurons = replaced(base.parts[kind][m][at])[..., 0]
            return base.parts["resid_mid"][m][at, 0] + layer.mlp_from(neurons[whole])[: len(edit)]
        if kind == "resid_mid":
            middle = self._given(kind, m, edit, at)
        elif kind == "attn_out":
            middle = x + self._given(kind, m, edit, at)
        else:
            if kind in ("head_out", "pattern"):
                heads = replaced(base.parts["head_out"][m][at])
            elif kind == "q":
                heads = self._edited_query(layer, m, replaced(base.parts["q"][m][at]), position)
            else:
                heads = self._edited_keys(layer, m, kind, edit, position)
            middle = x + layer.added_by(heads[whole])[: len(edit)]
        return middle + layer.mlp_after(x[whole], middle[whole])[: len(edit)]

    def _given(self, kind: str, m: int, edit: np.ndarray, at: Tensor, unit: Any = 0) -> Tensor:
        """(n, width): what edits (n,) put in at their positions (n,)."""
        values, source = self.values(kind, m), self.edits.source
        return values[at, unit] if source is None else values[_move(source[edit], self.device), at, unit]

    def _edited_query(self, layer: Layer, m: int, q: Tensor, position: np.ndarray) -> Tensor:
        """Attention of single rows, each over the base run's keys up to its own."""
        at = _move(position, self.device)
        q, _ = layer.turn(q, q[:, :0], self.base.cos[m][at], self.base.sin[m][at])
        _, k, v = self.base.rotated[m]
        run = Run(*_suffixes(np.arange(len(position) + 1), position, self.device), pool=self._pool(m))
        return run.attend(layer.attn, q, k[at], v[at], **layer.options)

    def _edited_keys(self, layer: Layer, m: int, kind: str, edit: np.ndarray, position: np.ndarray) -> Tensor:
        """Attention of all rows from the first changed one; after the last layer's, of the read rows alone."""
        base, edits = self.base, self.edits
        which, index = np.unique(edit, return_inverse=True)
        first = self.first[which]
        rows = _positions(first, self.tokens)
        owner = np.repeat(which, self.tokens - first)
        at = _move(rows, self.device)
        changed = np.flatnonzero(edits.groups[edits.group[owner], rows])
        changed_at = _move(rows[changed], self.device)
        unit = _move(edits.unit[owner[changed]], self.device)
        q, k, v = base.rotated[m]
        own = {"k": k[at], "v": v[at]}
        new = base.parts[kind][m][changed_at].clone()
        given = self._given(kind, m, owner[changed], changed_at, unit)
        new[torch.arange(len(changed), device=self.device), unit] = given.to(new.dtype)
        if kind == "k":
            new = layer.turn(new[:, :0], new, base.cos[m][changed_at], base.sin[m][changed_at])[1]
        own[kind][_move(changed, self.device)] = new
        cu = np.concatenate([[0], np.cumsum(self.tokens - first)])
        run = Run(*_suffixes(cu, first, self.device), pool=self._pool(m))
        run.cu_reads = _move(np.concatenate([[0], np.cumsum(np.bincount(index))]).astype(np.int32), self.device)
        return run.attend(layer.attn, q[_move(position, self.device)], own["k"], own["v"], **layer.options)


@dataclass
class _Rows:
    """Flat rows of suffixes, those of edits and after some of them one that pads them to whole tiles.

    Attributes:
        tokens: of the base run; an edit's suffix ends with the last of them.
        rows, prefix, read: (S,) of each suffix its rows, those before it and how many of its last ones are read.
        at: (n,) the base run's position of each row.
        reads: (m,) which rows are read.
        of_edits: (m,) bool, which of those are an edit's.
    """

    tokens: int
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    prefix: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    read: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    at: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    reads: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    of_edits: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    def and_edits(self, first: np.ndarray, read_from: np.ndarray, tile: int) -> _Rows:
        """With edits whose suffixes start at `first` and are read from `read_from` on, and padding."""
        rows, counts = self.tokens - first, self.tokens - read_from
        more, more_reads = padding(int(rows.sum()), int(counts.sum()), tile)
        reads = np.repeat(rows.cumsum(), counts) + _positions(read_from, self.tokens) - self.tokens
        made = _Rows(
            self.tokens,
            np.append(rows, more),
            np.append(first, 0),
            np.append(counts, more_reads),
            np.append(_positions(first, self.tokens), np.zeros(more, np.int64)),
            np.append(reads, rows.sum() + more - more_reads + np.arange(more_reads)),
            np.arange(len(reads) + more_reads) < len(reads),
        )
        return self.and_rows(made)

    def and_rows(self, other: _Rows) -> _Rows:
        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(self, name), getattr(other, name)])

        reads = np.concatenate([self.reads, other.reads + len(self.at)])
        return _Rows(
            self.tokens, joined("rows"), joined("prefix"), joined("read"), joined("at"), reads, joined("of_edits")
        )


def _entered(layer: Layer, base: Tensor, values: Tensor, at: Tensor, value_at: Tensor) -> tuple[Tensor, Tensor]:
    """The stream at rows of a base run, some replaced by values (-1: none), and what attention reads of it."""
    if layer.before_attn is not None and layer.before_attn.is_rms:
        return patch_rows(base, values, at, value_at, **layer.before_attn.arguments)
    y, x = layer.enter(gather(base, values, at, value_at), None)
    return x, y


def _no_pool(key: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k[:0], v[:0]


def _move(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _suffixes(cu: np.ndarray, prefix: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """cu_seqlens, prefix_start (one text: 0) and prefix_len."""
    length = _move(prefix.astype(np.int32), device)
    return _move(cu.astype(np.int32), device), torch.zeros_like(length), length


def _positions(first: np.ndarray, tokens: int) -> np.ndarray:
    """first[0], ..., tokens - 1, first[1], ..., tokens - 1, ..."""
    counts = tokens - first
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - tokens, counts)

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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rmfast.engine.attention import Run
from rmfast.engine.layers import Layer
from rmfast.engine.memory import out_of_memory
from rmfast.engine.packed import Engine
from rmfast.engine.uploads import sent
from rmfast.heads.given import last_occurrence
from rmfast.patching.sites import Edits, SourcedValues, Values
from rmfast.patching.suffix_chunk import Chunk
from rmfast.patching.suffix_plan import Plan, sizes
from rmfast.patching.suffix_record import SuffixRecord
from rmfast.texts.inputs import Encoded


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
        cu_seqlens, none, tokens, positions, at = sent(
            [
                np.append(starts, len(ids)).astype(np.int32),
                np.zeros(len(starts), np.int32),
                ids.astype(np.int64),
                np.arange(len(ids)) - np.repeat(starts, ends - starts),
                np.arange(0 if self.every else read, read + 1),
            ],
            device,
        )
        run = Run(cu_seqlens, none, none, pool=_no_pool)
        asked = range(self.layers) if layers is None else layers
        if base:  # what the lowest edit enters, and all that it then runs through
            streams: Collection[int] = range(min(asked, default=self.layers), self.layers + 1)
        else:
            offsets = [offset for kind, offset in (("resid_pre", 0), ("resid_post", 1)) if kind in kinds]
            streams = {layer + offset for layer in asked for offset in offsets}

        def recording(m: int, layer: Layer) -> Callable[..., Tensor]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                x, (cos, sin) = layer.widened(hidden_states[0]), layer.tables(hidden_states, kwargs)
                if m in streams:
                    record.stream[m] = x
                    if base:
                        record.cos[m], record.sin[m] = cos, sin
                return layer.returned(self._record_layer(record, m, layer, run, x, cos, sin, m in asked))

            return forward

        forwards = [recording(m, fused) for m, (_, fused) in enumerate(self.engine.layers)]
        hidden = self.engine.body(tokens, positions, run, forwards, longest)
        if self.layers in streams:
            record.stream[self.layers] = hidden
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
        attended = layer.o_proj(heads.flatten(1))
        if kinds and "attn_out" in record.parts:
            keep("attn_out", layer.added(attended))
        y, middle = layer.behind(attended, x)
        keep("resid_mid", middle)
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
        cu_seqlens, none = sent([np.array([0, len(v)], np.int32), np.zeros(1, np.int32)], v.device)
        fused = self.engine.layers[layer][1]
        run = Run(cu_seqlens, none, none, pool=_no_pool)
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
        rows, entry = sizes(base, edits, self.layers, self.every)
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
                    plan = Plan(
                        base, edits[some], entry[some], self.layers, self.engine.tile, self.frozen_patterns, self.every
                    )
                    rewards = Chunk(self.binding, [fused for _, fused in self.engine.layers], plan, values).run()
            except RuntimeError as error:
                if count == 1 or not out_of_memory(error):
                    raise
                batch_tokens = int(ends[count - 1]) // 2
                continue
            done(some, rewards.cpu())
            start += count

    def least_tokens(self, base: SuffixRecord, edits: Edits) -> int:
        """Rows of the largest edit, which a budget must hold."""
        return int(sizes(base, edits, self.layers, self.every)[0].max(initial=0))


def _no_pool(key: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k[:0], v[:0]

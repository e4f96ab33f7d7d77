"""Reruns of the token at which a text is scored, over cached keys and values of all before it.

An edit at that token alone changes nothing before it, so a run with other edits is one row of each text: 1/T of
scoring. That is what a search over clamps of neurons costs for each trial, and what reading all neurons there costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rmfast.arguments import instance, sequence, shown, whole
from rmfast.binding.binding import Binding
from rmfast.binding.compute import outside
from rmfast.binding.modules import Snapshot, modules_of
from rmfast.binding.session import read_rows, reading, replaced_forward
from rmfast.debias.apply import clamp_key, intervened, projections
from rmfast.debias.interventions import Intervention
from rmfast.engine.attention import Run
from rmfast.engine.invariance import padded
from rmfast.engine.memory import free_memory
from rmfast.engine.options import checked_run
from rmfast.engine.packed import Engine
from rmfast.engine.padded import batches, run_batch
from rmfast.engine.planned import planning_windows
from rmfast.engine.planner import plan
from rmfast.engine.programs import run_gated
from rmfast.engine.scorer import Scorer
from rmfast.engine.uploads import sent
from rmfast.ops import suffix_attention
from rmfast.texts.inputs import Format, Truncation

# Outputs held at once while they are captured; a layer of an 8B model at 512 tokens is 88 MB in fp32.
CAPTURE_BYTES = 1 << 30

# Rows of K (and of V) gathered at once where a text's are not side by side: 6 MB of SmolLM2's, which stay in the cache.
_GATHERED_ROWS = 8192


class LastTokenRuns:
    """Texts of which all tokens but the one that is read have been run, once.

    Args:
        rm: the model; interventions that it carries are part of it.
        inputs, max_length, truncation, format, chat_template_kwargs, tools: as for `RewardModel.score`.
        batch_tokens: most rows that run at once; default as for `score`.
        progress: show a progress bar.

    Attributes:
        widths: the neurons of each projection, by name and in order (`rmfast.interventions.projections`).
        cached_bytes: memory that the keys and values take. 0 for a model that can't run packed: it then runs all
            tokens at each call.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.
        ValueError: the model pools by itself, or keys and values do not fit into free memory.
    """

    def __init__(
        self,
        rm: Scorer,
        inputs: Sequence[Any],
        *,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        truncation: Truncation = "error",
        format: Format | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
        progress: bool = False,
    ):
        instance("rm", rm, Scorer)
        batch_tokens = checked_run(batch_tokens, progress)
        if rm.pools:
            raise ValueError(f"{type(rm.binding.root).__name__} pools by itself, so that it has no last token to rerun")
        self.rm = rm
        self.widths = projections(rm)
        self._encoded = rm.encode(
            inputs,
            max_length=max_length,
            truncation=truncation,
            format=format,
            chat_template_kwargs=chat_template_kwargs,
            tools=tools,
        )
        self._read = rm.positions(self._encoded)
        self._gates = self._gate_rows() if rm.gated else None
        engine = rm.packed_engine() if self._encoded else "no texts"
        self._engine = None if isinstance(engine, str) else engine
        if self._encoded:
            rm.expect_invariance(engine)
        self._batch_tokens = rm.default_batch_tokens(self._engine) if batch_tokens is None else batch_tokens
        self._batches: list[_Batch] = []
        self.cached_bytes = 0
        self._autocast = torch.is_autocast_enabled(rm.binding.device.type)
        if self._engine is not None:
            with tqdm(total=len(self._encoded), unit="text", disable=not progress) as bar:
                self._cache(self._engine, bar)
        keeps = self._engine is not None or self._gates is not None
        self._kept_of = Snapshot.of(rm.binding.root, modules_of(rm.binding.root)) if keeps else None

    def __len__(self) -> int:
        return len(self._encoded)

    def rewards(self, intervention: Intervention | None = None) -> Tensor:
        """Rewards (n, K) of the texts under an intervention, on the CPU; fp32, or fp64 for an fp64 model.

        Raises:
            ValueError: it clamps neurons at all positions, or does not fit the model, as
                `RewardModel.with_interventions` says; or the model has changed since its texts were run, or autocast
                been turned on or off.
        """
        model = self.rm if intervention is None else intervened(self.rm, [intervention])
        if clamp_key(model.interventions, "all") != clamp_key(self.rm.interventions, "all"):
            raise ValueError('Expected clamps with positions="last": the other tokens of these texts are not run again')
        rewards = self._run(model.binding, ())
        return model.corrected(rewards, self._encoded)

    def projections(
        self, names: Sequence[str] | None = None, *, at_once: int | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Each projection's name and its outputs (n, m) at the tokens that are read, in order, without interventions
        other than the model's own.

        They are in the model's dtype and on its device. At most 1 GiB of them, or one projection's, is held at once:
        more take another run of the last tokens for each GiB.

        Args:
            names: only these; default all.
            at_once: bytes that are held at once at most (or one projection's); default 1 GiB.
        """
        most = CAPTURE_BYTES if at_once is None else whole("at_once", at_once, 1)
        asked = list(self.widths) if names is None else [*sequence("names", names)]
        for name in asked:
            if not isinstance(name, str) or name not in self.widths:
                known = ", ".join([*self.widths][:8])
                raise ValueError(f"Expected names of projections ({known}, ...), got {shown(name)}")
        itemsize = self.rm.binding.stream_dtype.itemsize
        row = len(self) * itemsize
        while asked:
            count, size = 0, 0
            while count < len(asked) and (not count or size + row * self.widths[asked[count]] <= most):
                size += row * self.widths[asked[count]]
                count += 1
            found: dict[str, Tensor] = {}
            self._run(self.rm.binding, asked[:count], found)
            for name in asked[:count]:
                if name not in found:
                    raise ValueError(f"{name} gives no output at the tokens that are read")
                yield name, found.pop(name)
            asked = asked[count:]

    # Runs ----------------------------------------------------------------------------------------------------------

    def _run(self, binding: Binding, names: Sequence[str], found: dict[str, Tensor] | None = None) -> Tensor:
        """Rewards (n, K); outputs of the projections `names` (n, m) go to `found`."""
        if self._encoded:
            self.rm.expect_invariance(self._engine)  # of the backend that runs now
        if self._kept_of is not None and self._kept_of.changed:
            raise ValueError(
                f"Expected {type(self.rm.binding.root).__name__} to be as it was when its texts were run: their keys "
                "and values are kept. Make LastTokenRuns anew"
            )
        if self._kept_of is not None and torch.is_autocast_enabled(binding.device.type) != self._autocast:
            raise ValueError(
                f"Expected autocast to be {'on' if self._autocast else 'off'}, as when the texts' keys and values (or "
                "their gates' rows) were made. Make LastTokenRuns anew"
            )
        values = torch.empty(len(self), self.rm.num_labels, device="cpu")
        parts: list[tuple[np.ndarray, Tensor]] = []
        with binding.session(), ExitStack() as stack:
            texts: list[Tensor] = []  # those that run, as an index

            for name in names:
                module = binding.root.get_submodule(name)
                record = self._recording(name, module.forward, texts, {} if found is None else found)
                stack.enter_context(replaced_forward(module, record))
            for some, run in self._runs(binding):
                texts[:] = [torch.from_numpy(some)]
                parts.append((some, run()))
            if parts:
                found_values = torch.cat([value for _, value in parts]).cpu()
                values = torch.empty_like(found_values)
                values[torch.from_numpy(np.concatenate([some for some, _ in parts]))] = found_values
            if self._gates is not None and parts:
                gates = binding.row_values(self._gates[None], torch.arange(len(self), device=self._gates.device)).cpu()
                values = binding.program.rewards(values, gates)
        return values.clone()

    def _gate_rows(self) -> Tensor:
        """(n, d), the stream at the token that a gated head's gate reads: one before the token that is run again."""
        nothing = [np.array([at]) for at in self._read]
        found = run_gated(
            self.rm, self._encoded, nothing, (None, False, None),
            lambda hidden, rows: hidden.reshape(-1, hidden.size(-1))[rows], told=False,
        )  # fmt: skip
        rows = [gate for _, gate in found] or [torch.empty(0, self.rm.binding.width)]
        return torch.cat(rows).to(self.rm.binding.device)

    def _recording(self, name: str, original: Callable, texts: list[Tensor], found: dict[str, Tensor]) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            rows = read_rows(f"{name}, recorded", out)
            if rows is not None:
                flat = out.reshape(-1, out.size(-1))
                if name not in found:
                    with torch.inference_mode(False):  # an ordinary tensor, for callers who compute with it
                        found[name] = torch.empty(len(self), flat.size(1), dtype=flat.dtype, device=flat.device)
                found[name][texts[0].to(flat.device)] = flat[rows][: len(texts[0])]  # behind them is padding
            return out

        return forward

    def _runs(self, binding: Binding) -> Iterator[tuple[np.ndarray, Callable[[], Tensor]]]:
        """Batches of texts and what runs each: rewards (m, K), of a gated head the rows' values."""
        head = binding.rewards if self._gates is None else binding.row_values
        if self._engine is not None:
            for batch in self._batches:
                yield batch.texts, lambda batch=batch: batch.run(self._engine, binding, head)  # type: ignore[misc]
            return
        for some in batches([len(item) for item in self._encoded], self._batch_tokens, 64, binding.length_group):
            items = [self._encoded[i] for i in some]
            read = [np.array([self._read[i]]) for i in some]
            yield np.array(some), lambda items=items, read=read: run_batch(binding, items, read, head)  # type: ignore[misc]

    # The cache -----------------------------------------------------------------------------------------------------

    def _cache(self, engine: Engine, bar: tqdm) -> None:
        # Tokens before the one that is read do not see a clamp there.
        binding = replace(self.rm.binding, clamps=tuple(clamp for clamp in self.rm.binding.clamps if not clamp.last))
        with binding.session():
            plans = []
            for texts, longest in planning_windows(self.rm.binding, self._encoded):
                prefixes = [self._encoded[i].ids[: self._read[i]] for i in texts]
                filled = [ids for ids in prefixes if len(ids)]
                ids = np.concatenate([np.empty(0, np.int32), *filled], dtype=np.int32)
                cu = np.cumsum([0, *map(len, filled)])
                plans.append(
                    (texts, longest, ids, plan(ids, cu, batch_tokens=self._batch_tokens, read="all"), prefixes)
                )
            rows = sum(planned.stats.rows for _, _, _, planned, _ in plans)
            self.cached_bytes = rows * self._row_bytes(engine)
            free = free_memory(binding.device)
            if self.cached_bytes > 0.8 * free:
                raise ValueError(
                    f"Expected the keys and values of {len(self)} texts to fit into 80% of free memory: {rows} tokens "
                    f"take {self.cached_bytes / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free. Give fewer or "
                    "shorter texts, or a model in bf16"
                )
            for texts, longest, ids, planned, prefixes in plans:
                store = _Store(planned.stats.rows)
                for chunk, _ in engine.run(ids, planned, longest, store.put):
                    store.filled += chunk.rows
                    bar.update(len(chunk.inputs))
                self._batches += self._batched(texts, longest, prefixes, planned.read_index, store)

    def _row_bytes(self, engine: Engine) -> int:
        """Of the keys and values of one token in all layers, as one run shows them."""
        size = 0

        def measure(key: nn.Module, k: Tensor, v: Tensor) -> None:
            nonlocal size
            size += (k[0].numel() + v[0].numel()) * k.element_size()

        one = self._encoded[0].ids[:1].astype(np.int32)
        for _ in engine.run(one, plan(one, np.array([0, 1]), batch_tokens=1, read="all"), 0, measure):
            pass
        return size

    def _batched(
        self, texts: list[int], longest: int, prefixes: list[np.ndarray], index: np.ndarray, store: _Store
    ) -> list[_Batch]:
        ends = np.cumsum([len(ids) for ids in prefixes])
        rows = [index[end - len(ids) : end] for end, ids in zip(ends, prefixes)]
        # Texts whose rows are side by side, which need no gathering, come first.
        aside = [len(r) > 0 and bool((np.diff(r) != 1).any()) for r in rows]
        order = sorted(range(len(texts)), key=lambda j: (aside[j], int(rows[j][-1]) if len(rows[j]) else -1))
        made = []
        for a in range(0, len(order), self._batch_tokens):
            some = order[a : a + self._batch_tokens]
            ids = np.array([self._encoded[texts[j]].ids[self._read[texts[j]]] for j in some])
            which = np.array([texts[j] for j in some])
            groups = _groups([rows[j] for j in some], [aside[j] for j in some], self.rm.binding.device)
            made.append(_Batch(which, ids, np.array([len(rows[j]) for j in some]), longest, store, groups))
        return made


class _Store:
    """Keys and values (rows, heads, D) of each attention module."""

    def __init__(self, rows: int):
        self.rows, self.filled = rows, 0
        self.kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def put(self, key: nn.Module, k: Tensor, v: Tensor) -> None:
        if key not in self.kept:
            self.kept[key] = k.new_empty(self.rows, *k.shape[1:]), v.new_empty(self.rows, *v.shape[1:])
        for kept, x in zip(self.kept[key], (k, v)):
            kept[self.filled : self.filled + len(x)] = x


@dataclass(frozen=True)
class _Group:
    """Suffixes start to stop of a batch, over rows of the store (None: all of them)."""

    start: int
    stop: int
    rows: Tensor | None
    cu_seqlens: Tensor
    prefix_start: Tensor
    prefix_len: Tensor


def _groups(rows: list[np.ndarray], aside: list[bool], device: torch.device) -> list[_Group]:
    def group(start: int, stop: int, gathered: bool) -> _Group:
        lengths = np.array([len(r) for r in rows[start:stop]])
        firsts = np.cumsum(lengths) - lengths if gathered else [int(r[0]) if len(r) else 0 for r in rows[start:stop]]
        index = torch.from_numpy(np.concatenate(rows[start:stop])).to(device) if gathered else None
        numbers = (
            torch.tensor(x, dtype=torch.int32, device=device) for x in (range(stop - start + 1), firsts, lengths)
        )
        return _Group(start, stop, index, *numbers)

    found = []
    side_by_side = aside.index(True) if True in aside else len(aside)
    if side_by_side:
        found.append(group(0, side_by_side, False))
    start = side_by_side
    while start < len(rows):
        sizes = np.cumsum([len(r) for r in rows[start:]])
        stop = start + max(1, int(np.searchsorted(sizes, _GATHERED_ROWS, side="right")))
        found.append(group(start, stop, True))
        start = stop
    return found


@dataclass
class _Batch:
    """Last tokens that run together: one row each."""

    texts: np.ndarray  # (m,) which they are
    ids: np.ndarray
    positions: np.ndarray
    longest: int
    store: _Store
    groups: list[_Group]

    def run(self, engine: Engine, binding: Binding, head: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What the head makes of the rows, (m, K), inside `binding.session()`."""
        device, m = binding.device, len(self.ids)
        rows = padded(np.arange(m), engine.tile)
        tokens, positions = sent([x[rows].astype(np.int64) for x in (self.ids, self.positions)], device)
        none = torch.empty(0, dtype=torch.int32, device=device)
        run = _CachedRun(none, none, none, lambda key, k, v: (k[:0], v[:0]), store=self.store, groups=self.groups)
        forwards = [fused for _, fused in engine.layers]
        with reading(len(rows), None):
            hidden = engine.body(tokens, positions, run, forwards, self.longest)
        return head(hidden[None], torch.arange(len(rows), device=hidden.device))[:m]


@dataclass
class _CachedRun(Run):
    """A run of one row for each text, over the store."""

    store: _Store = field(default_factory=lambda: _Store(0))
    groups: list[_Group] = field(default_factory=list)

    def over_pool(self, key: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        before = self.store.kept.get(key, (k[:0], v[:0]))  # none: all texts have one token
        out = []
        for group in self.groups:
            some = slice(group.start, group.stop)
            k_pool, v_pool = before if group.rows is None else (x[group.rows] for x in before)
            own = q[some], k[some], v[some]
            with outside():
                attended, _ = suffix_attention(
                    *own, group.cu_seqlens, k_pool, v_pool, group.prefix_start, group.prefix_len, **options
                )
            out.append(attended)
        # Rows behind those of the groups are padding.
        out.append(q.new_zeros(len(q) - self.groups[-1].stop, *q.shape[1:]))
        return torch.cat(out)

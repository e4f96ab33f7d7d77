"""The suffix engine: a causal body run on ragged suffixes over shared prefixes, without padding.

All rows of a chunk (rmfast.engine.planner) lie flat, (1, n, d), with their own position ids. Every part of a layer but
attention is token-wise, so the model's own modules run on them unchanged (`rmfast.engine.attention`); layers of known
structure are fused (`rmfast.engine.layers`). Both ways are tried on a few tokens against the padded run before they are
used. Nothing stays changed in the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rmfast import backends as _backends
from rmfast.binding.binding import Binding
from rmfast.binding.compute import LOW, holds
from rmfast.binding.find import probe_ids
from rmfast.binding.modules import has_hooks, hidden_state_of, is_transformers, modules_of
from rmfast.binding.rope import fresh_rope
from rmfast.binding.session import passing_through, reading, replaced_forward
from rmfast.engine import alibi
from rmfast.engine.attention import (
    ChainedPool,
    Pool,
    Recorded,
    Run,
    Unsupported,
    attention_configs,
    attention_of,
    current_run,
)
from rmfast.engine.experts import experts_of, in_tiles, unknown_experts
from rmfast.engine.functions import Alike
from rmfast.engine.graphs import Graphs, unfit
from rmfast.engine.invariance import tile_of
from rmfast.engine.layers import Layer
from rmfast.engine.memory import free_memory, reuse_freed_memory
from rmfast.engine.planner import Chunk, plan
from rmfast.engine.shapes import Shape, arrays
from rmfast.engine.structure import by_formula, by_names, by_run, error_of, watched
from rmfast.engine.tables import longest_text, rotary_modules, unrounded
from rmfast.engine.uploads import sent
from rmfast.engine.wiring import seen_in

# Of rows that run otherwise than the model's code has in mind.
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, Unsupported)


class Engine:
    """Packed runs of one bound model.

    Args:
        invariant: whether runs pad their rows so that a text has the same bits in any batch, where that can be.
        graphs: whether chunks run as CUDA graphs.

    Attributes:
        mode: "fused" (layers by structure) or "modules" (the model's own layers around suffix_attention).
        why: why the mode is not "fused", or None.
        graphs: what holds them, or None.

    Raises:
        Unsupported: the model can't run packed.
    """

    def __init__(self, binding: Binding, invariant: bool = True, graphs: bool = False):
        if not binding.causal:
            raise Unsupported("its attention sees later tokens too")
        if not binding.reads_rows:
            raise Unsupported("it pools by itself")
        hooked = [name or "the body" for name, module in binding.body.named_modules() if has_hooks(module)]
        if hooked:
            raise Unsupported(f"hooks (on {hooked[0]}) expect padded batches")
        if not attention_configs(binding.body):
            raise Unsupported("its attention does not use transformers' AttentionInterface")
        self.binding, self.invariant = binding, invariant
        self.graphs: Graphs | None = None  # the probe's few texts need none
        self.why: str | None = None
        self.layers: list[tuple[nn.Module, Layer]] = []
        self._options: dict[nn.Module, dict[str, Any]] = {}
        self._tiles: dict[tuple, int | str] = {}  # by the number of threads, and whether products are ours
        self._moves: dict[tuple, str | None] = {}
        self.experts = experts_of(binding.body)
        self._rotary = rotary_modules(binding.body)
        with binding.session(clamped=False):
            self.written = alibi.find(binding)
            precise = binding.stream_dtype in (torch.float32, torch.float64)
            # fp32 differs by 1e-6, a wrong formula by a percent or more. bf16 itself is off by up to 2%.
            error = self._probe(1e-4 if precise else 0.1)
            hidden = isinstance(error, str) and not self._options  # attention is no function that ours stands in for
            if isinstance(error, str) and not hidden:
                raise Unsupported(error)
            if (
                problem := self._unseen_window() if hidden else self._masked_window() or self._other_layers()
            ) is not None:
                raise Unsupported(problem)
            limit = (0.0 if isinstance(error, str) else 2 * error) + (1e-5 if precise else 0.01)
            try:
                self.why = self._fuse(limit, 1e-4 if precise else 0.03, hidden)
            except (_backends.BackendError, torch.OutOfMemoryError):
                raise  # says nothing about the model
            except _FAILURES as failure:
                self.why = f"fused layers: {failure}"
            if self.why is not None:
                self.layers = []
            if hidden and self.why is not None:
                raise Unsupported(f"its attention is its own, and its layers are not taken apart: {self.why}")
        self.graphs = self._new_graphs() if graphs else None

    def _fuse(self, limit: float, part_limit: float, hidden: bool) -> str | None:
        """Takes the layers apart, or says why they run as they are; `hidden` attention shows no heads."""
        if self.written:
            return "its attention, with ALiBi, is written out in its modules"
        layers = by_names(self.binding)
        if isinstance(layers, str):
            return layers
        if hidden and (own := [fused.attn for _, fused in layers if not is_transformers(fused.attn)]):
            return f"{type(own[0]).__name__} is not transformers' own, and may see less than all tokens before"
        known = sum(fused.attn in self._options for _, fused in layers)
        if known < len(layers) and not hidden:  # num_hidden_layers may be smaller than the number of layers held
            return f"the body runs only {known} of the {len(layers)} layers that it holds"
        device, end = self.binding.device, getattr(self.binding.config, "max_position_embeddings", None) or 4096
        tokens = probe_ids(self.binding.root, self.binding.vocab_size, None, ())[0].to(device)
        # Some models scale by position (Ministral), which the few first positions of the probe do not show.
        positions = torch.arange(len(tokens), device=device) + max(0, end - len(tokens))
        cu, none = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, len(tokens)], [0]))
        run = Recorded(cu, none, none, lambda key, k, v: (k[:0], v[:0]))
        with seen_in(watched(layers)) as seen:
            states = self._padded(tokens, positions) if hidden else self.body(tokens, positions, run, [], 0)
        if (problem := by_run(layers, seen)) is not None:
            return problem
        for _, fused in layers:
            scale = fused.projections.size**-0.5
            fused.options = (
                {"scale": scale, "softcap": None, "window": None} if hidden else {**self._options[fused.attn]}
            )
        if (problem := by_formula(layers, seen, run, run.heads.copy(), part_limit)) is not None:
            return f"fused layers: {problem}"
        self.layers = layers
        error: float | str = ""
        for wide, layers[-1][1].keeps_rows in product((True, False) if self._may_widen() else (False,), (False, True)):
            for _, fused in layers:
                fused.narrow = self.binding.stream_dtype if wide else None
            error = self._probe(limit)
            if not isinstance(error, str):
                break
        if not isinstance(error, str):
            far = error_of(self.body(tokens, positions, run, [fused for _, fused in layers], 0), states)
            error = far if far <= limit else f"they differ from the model's own by {far:.1e} at its last positions"
        return f"fused layers: {error}" if isinstance(error, str) else None

    def _may_widen(self) -> bool:
        """Whether the stream between the layers may be fp32 where their blocks run in 16 bits: what takes the last
        layer's must be the head's op, or `Binding.normed`, and no module."""
        binding = self.binding
        return binding.stream_dtype in LOW and binding.device.type == "cpu" and binding.leaves_norm_out

    @property
    def wide(self) -> bool:
        """Whether the stream is fp32 between layers whose blocks run in 16 bits."""
        return bool(self.layers) and self.layers[0][1].narrow is not None

    def _padded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The model's own run of one text at given positions, as `body` gives it."""
        binding = self.binding
        with passing_through(binding.norm) if binding.leaves_norm_out else nullcontext():
            ids = tokens[None]
            given = {"attention_mask": torch.ones_like(ids), "position_ids": positions[None], "use_cache": False}
            return hidden_state_of(binding.body(input_ids=ids, **given))[0]

    @property
    def tile(self) -> int:
        """Rows that all runs are a multiple of, for the same bits in any batch; 1 where there is no such number."""
        found = self._tile() if self.invariant else 1
        return 1 if isinstance(found, str) else found

    def _tile(self) -> int | str:
        key = torch.get_num_threads(), holds(), self.binding.device, self.binding.stored
        if key not in self._tiles:
            self._tiles[key] = tile_of(self.binding.body)
        return self._tiles[key]

    @contextmanager
    def alike(self) -> Iterator[None]:
        """Gives a row the same bits in parts that run as the modules that they are; around whatever runs layers."""
        modules = not self.layers or any(layer.inner is None for _, layer in self.layers)
        if not modules or not self.invariant or isinstance(self._tile(), str):
            yield
            return
        with in_tiles(experts_of(self.binding.body), self.tile), Alike():
            yield

    def moves(self) -> str | None:
        """Why a text's bits may depend on the texts beside it, or None where they do not.

        A self-test of the matmuls, and of the probe's texts alone and together; not inside of a session.
        """
        if not self.invariant:
            return "it was not asked for (invariant=True)"
        attention = _backends.runs("suffix_attention", self.binding.device.type)
        if attention == "eager":
            return "eager attention goes through the BLAS"
        if attention == "cuda":
            return "a tile of the CUDA kernel holds rows of several texts"
        if attention == "varlen":
            return "torch's varlen_attn promises no bits"
        key = attention, torch.get_num_threads(), self.binding, self.binding.device, self.binding.stored
        if key not in self._moves:
            with self.binding.session():
                self._moves[key] = self._moved_bits()
        return self._moves[key]

    def _moved_bits(self) -> str | None:
        if isinstance(reason := self._tile(), str):
            return reason
        if (unknown := unknown_experts(self.binding.body)) is not None:
            return f"how {unknown} multiplies by its experts depends on the batch"
        texts = self._probe_texts()
        for read in ("all", "last"):
            together = self._ran(texts, read)
            alone = torch.cat([self._ran([text], read) for text in texts])
            if not torch.equal(together, alone):
                return "the probe's texts have other bits alone than together"
        return None

    @property
    def mode(self) -> str:
        return "fused" if self.layers else "modules"

    def __str__(self) -> str:
        why, stream = f" ({self.why})" if self.why else "", ", the stream between them float32" if self.wide else ""
        return f"packed, {self.mode} layers{why}{stream}"

    def moved(self, binding: Binding, copies: Mapping[nn.Module, nn.Module] | None) -> Engine:
        """The engine of the same model under another binding, or of `copies` of its modules with other weights."""
        made = copy.copy(self)
        made.binding = binding
        if copies is not None:
            made._options = {copies[module]: options for module, options in self._options.items()}
            made.experts = [copies[module] for module in self.experts]
            made._rotary = [copies[module] for module in self._rotary]
            made.written = {copies[module]: how for module, how in self.written.items()}
            made.layers = [(copies[module], layer.moved(copies)) for module, layer in self.layers]
        made.graphs = None if self.graphs is None else made._new_graphs()
        return made

    def _new_graphs(self) -> Graphs:
        modules = list(self.binding.body.modules())
        inside = {part for layer, _ in self.layers for part in layer.modules()}
        beside = [module for module in modules if module not in inside]
        return Graphs(modules, unfit(self.binding, self.layers, self.why), beside)

    def affordable_tokens(self) -> int:
        """Rows of a chunk that fit into half of the free memory, K/V rows kept for the next chunk included."""
        config = self.binding.config
        try:
            d, heads = int(config.hidden_size), int(config.num_attention_heads)
            head_dim = int(getattr(config, "head_dim", None) or d // heads)
            kv = int(getattr(config, "num_key_value_heads", None) or heads) * head_dim
            inner = int(getattr(config, "intermediate_size", None) or 4 * d)
        except (AttributeError, TypeError):  # sizes that differ by layer: no estimate, the default budget
            return 1 << 30
        # A row at its widest: stream, norm, q, k, v, output, gate, up and their product; a pool may hold 8 rows of K/V
        # for each; and K/V kept in every layer.
        row = 6 * d + 3 * inner + 2 * kv * (9 + config.num_hidden_layers)
        if self.wide:  # twice the bytes: the stream before and behind a sum, what is added to it and its norm
            row += 4 * d
        return max(256, free_memory(self.binding.device) // 2 // (row * self.binding.stream_dtype.itemsize))

    def _masked_window(self) -> str | None:
        """Why windows that the model puts into its mask, which no longer exists, rule packed runs out: other ones than
        its attention is given, which the few tokens of the probe need not show."""
        config = self.binding.config
        kinds = getattr(config, "layer_types", None)
        if getattr(config, "attention_chunk_size", None) and (kinds is None or "chunked_attention" in kinds):
            return "its attention is chunked by its mask"
        window = getattr(config, "sliding_window", None)
        window = None if getattr(config, "use_sliding_window", True) is False else window
        for module, options in self._options.items():
            index = getattr(module, "layer_idx", None)
            slides = kinds is None or index is None or kinds[index] == "sliding_attention"
            due, given = window if slides else None, options["window"]
            if due is not None and given is None:
                return "it has its sliding window in the mask alone"
            if due != given:
                return f"its mask has windows of {due} where its attention is given {given}"
        return None

    def _other_layers(self) -> str | None:
        """Why layers without attention of their own, which the probe's error may not show in bf16, rule it out.

        Rows of other texts would run through what else mixes tokens (Mamba, convolutions), and a layer that is run
        twice has two sets of K and V.
        """
        count, seen = getattr(self.binding.config, "num_hidden_layers", None), len(self._options)
        if count is None or seen >= count:
            return None
        return f"only {seen} of its {count} layers have attention of their own"

    def _unseen_window(self) -> str | None:
        """Why attention that is not ours to replace may see less than all tokens before, beyond what a probe shows."""
        config = self.binding.config
        names = ("sliding_window", "attention_chunk_size", "window_size", "attention_layers", "local_attention")
        named = [name for name in names if getattr(config, name, None)]
        return f"its attention is its own and may have windows ({named[0]})" if named else None

    def _probe(self, limit: float) -> float | str:
        """The error of packed hidden states against padded ones; above the limit, or failing, what is wrong."""
        try:
            error = self._probe_error()
        except (_backends.BackendError, torch.OutOfMemoryError):
            raise  # says nothing about the model
        except _FAILURES as failure:
            return f"packed rows failed: {failure}"
        if error <= limit:
            return error
        return f"packed and padded hidden states differ by {error:.1e}"

    def _probe_texts(self) -> list[np.ndarray]:
        """Three texts that share a beginning."""
        ids = probe_ids(self.binding.root, self.binding.vocab_size, None, ())[0].numpy()
        return [ids, np.concatenate([ids[:4], ids[::-1]]), ids[2:5]]

    def _ran(self, texts: list[np.ndarray], read: str) -> Tensor:
        """Hidden states at all tokens of the texts, or the last of each; one chunk leaves K/V to the next."""
        flat, cu = np.concatenate(texts), np.cumsum([0, *map(len, texts)])
        planned = plan(flat, cu, batch_tokens=8, min_shared=2, read=read)  # type: ignore[arg-type]
        out = torch.cat([hidden[: len(chunk.read_rows)] for chunk, hidden in self.run(flat, planned, 0)])
        return out[torch.from_numpy(planned.read_index).to(out.device)]

    def _probe_error(self) -> float:
        """Relative error on the probe's texts."""
        binding, texts = self.binding, self._probe_texts()
        want = []
        for text in texts:
            one = torch.from_numpy(text)[None].to(binding.device)
            want.append(binding.hidden(one, torch.ones_like(one))[0])
        wanted = torch.cat(want).double()
        ends = torch.from_numpy(np.cumsum([len(text) for text in texts]) - 1)
        wanted_last = wanted[ends.to(wanted.device)]
        every, last = self._ran(texts, "all").double(), self._ran(texts, "last").double()
        return max(
            float((every - wanted).norm() / wanted.norm()), float((last - wanted_last).norm() / wanted_last.norm())
        )

    def run(
        self,
        ids: np.ndarray,
        planned: Any,
        longest: int,
        seen: Callable[[nn.Module, Tensor, Tensor], None] | None = None,
    ) -> Iterator[tuple[Chunk, Tensor]]:
        """Runs a plan's chunks in order, inside `binding.session()`.

        Args:
            ids: flat token ids, as given to the planner.
            planned: a `rmfast.engine.planner.Plan`, or some of its chunks from one with kept == 0 on.
            longest: tokens of the longest text, by which length-dependent rotary embeddings go; 0 for none.
            seen: is given each attention module and its K and V of a chunk's rows (n, heads, D), after RoPE; D is
                padded to a multiple of 8.

        Yields:
            Each chunk and its hidden states (m, d), those at its M read_rows and behind them padding, before the final
            norm where `binding.leaves_norm_out`.
        """
        graphs = None
        if self.graphs is not None and seen is None and not longest and self.uncaptured() is None:
            # A replay calls no hook: what watches a session's layers would be left with a chunk before.
            watched = any(map(has_hooks, modules_of(self.binding.body)))
            graphs = None if watched else self.graphs.renewed(self.binding)
        kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for chunk in planned:
            if graphs is not None and not chunk.kept and not len(chunk.keep_rows):
                shape = Shape.rounded(chunk, self.tile)
                out = graphs.run(shape, arrays(ids, chunk, shape), self.binding.device, self._of_gathered_pool)
                # The next replay writes where this one did.
                hidden, kept = out[: len(chunk.read_rows)].clone(), {}
            else:
                hidden, kept = self._chunk(ids, chunk, kept, longest, seen)
            yield chunk, hidden

    def _chunk(
        self,
        ids: np.ndarray,
        chunk: Chunk,
        kept: dict[nn.Module, tuple[Tensor, Tensor]],
        longest: int,
        seen: Callable[[nn.Module, Tensor, Tensor], None] | None,
    ) -> tuple[Tensor, dict[nn.Module, tuple[Tensor, Tensor]]]:
        shape = Shape.of(chunk, self.tile)
        tensors = sent(arrays(ids, chunk, shape), self.binding.device)
        pool = ChainedPool(chunk, tensors[5], tensors[6], kept, seen)
        return self._hidden(tensors, pool, longest), pool.keep

    def _of_gathered_pool(self, tensors: list[Tensor]) -> Tensor:
        """Hidden states of a chunk that neither keeps rows nor is left any, from its arrays alone."""
        rows = tensors[5]
        return self._hidden(tensors, lambda _, k, v: (k[rows], v[rows]), 0)

    def _hidden(self, tensors: list[Tensor], pool: Pool, longest: int) -> Tensor:
        """Hidden states at the rows that are read, of a chunk's `arrays` on the device."""
        cu_seqlens, start, length, tokens, positions, _, _, *read = tensors
        run = Run(cu_seqlens, start, length, pool)
        if read:
            run.read_rows, run.cu_reads = read
        with reading(len(tokens), run.read_rows):
            hidden = self.body(tokens, positions, run, [fused for _, fused in self.layers], longest)
        if run.read_rows is None:
            return hidden
        return hidden[: len(run.read_rows)] if self.layers else hidden[run.read_rows]

    @property
    def replaced(self) -> list[nn.Module]:
        """Modules beside the layers whose own forwards do not run, or not when a graph does."""
        return [*self.written, *self.experts, *(self.graphs.beside if self.graphs is not None else ())]

    def uncaptured(self) -> str | None:
        """Why chunks can't run as CUDA graphs; None where they can."""
        return "they were not asked for" if self.graphs is None else self.graphs.why_not(self.binding)

    def body(
        self, tokens: Tensor, positions: Tensor, run: Run, forwards: Sequence[Callable[..., Tensor]], longest: int
    ) -> Tensor:
        """Runs the body on flat rows (n,) with the given forwards of its layers (or none: their own); (m, d).

        `longest` as for `run`; hidden states before the final norm where `binding.leaves_norm_out`.
        """
        binding = self.binding
        if binding.device.type == "cpu":
            reuse_freed_memory()
        fresh_rope(binding.rope)
        with ExitStack() as stack:
            stack.enter_context(attention_of(binding.body, own_mask=bool(self.written)))
            stack.enter_context(alibi.running(self.written))
            stack.enter_context(self.alike())
            if longest:
                stack.enter_context(longest_text(self._rotary, longest))
            if forwards and self.wide:
                stack.enter_context(unrounded(self._rotary))
            if binding.leaves_norm_out:
                stack.enter_context(passing_through(binding.norm))
            for (layer, _), forward in zip(self.layers, forwards):
                stack.enter_context(replaced_forward(layer, forward))
            token = current_run.set(run)
            try:
                out = binding.body(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
            finally:
                current_run.reset(token)
                self._options.update(run.options)
        return hidden_state_of(out)[0]

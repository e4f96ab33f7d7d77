"""`RewardModel`: rewards of texts, and of every token of them; `load` makes one from a checkpoint."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rmfast import backends as _backends
from rmfast import inputs as _inputs
from rmfast import model as _model
from rmfast.engine import Engine, Unsupported
from rmfast.hooks import Point, Watched
from rmfast.inputs import Encoded, Format, InputError, Truncation
from rmfast.planner import plan, windows

if TYPE_CHECKING:
    from rmfast.values import ResponseValues

__all__ = ["Encoded", "InputError", "RewardModel", "load"]

# Tokens of one batch, padding included. A CPU is at its GEMM rate from about 2,000 tokens, and more only adds padding,
# cache misses and memory; a large GPU wants more rows in flight: 16,384 tokens of an 8B model take about 1.5 GB.
_BATCH_TOKENS = {"cpu": 3072}
_BATCH_TOKENS_ACCELERATOR = 16384

# What starting another batch costs, in tokens: the weights are read once more (a 135M fp32 model on 2 cores: 27 ms, as
# long as 27 tokens) and on a GPU a few hundred kernels are launched (30 ms, as long as 750 tokens of an 8B model).
_BATCH_COST = {"cpu": 64}
_BATCH_COST_ACCELERATOR = 1024

# A budget that is halved each time memory runs out stops here.
_LEAST_BATCH_TOKENS = 64


class RewardModel:
    """A transformers reward model, bound to the fused reward head.

    Args:
        model: a transformers model with a reward head, in memory: sequence or token classification, with a linear or
            MLP head, or an encoder that pools by itself; may carry peft adapters, be quantised, or be spread by
            device_map. Its weights are used where they are, and read at each call: further training, or a switch of
            adapters, is seen.
        tokenizer: its tokenizer; None where all inputs are token ids.
        pooling: the token at which `score` reads: "auto" (the rightmost id other than the configuration's
            pad_token_id, as transformers reads a text alone), "last", or a token id (its rightmost occurrence).

    Attributes:
        num_labels: K, the rewards of one token.
        max_length: most tokens of a text that the model and tokenizer are made for, or None.
        binding: the parts found in the model (`rmfast.model.Binding`).
        interventions: what `with_interventions` has put in, or None.

    Raises:
        ValueError: no body and head are found in the model, or they do not reproduce its own logits on a few tokens.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, pooling: str | int = "auto"):
        if isinstance(pooling, bool) or not (pooling in ("auto", "last") or isinstance(pooling, int)):
            raise ValueError(f'Expected pooling to be "auto", "last" or a token id, got {pooling!r}')
        read_id = pooling if isinstance(pooling, int) else None
        self.binding = _model.bind(model, read_id, tuple(getattr(tokenizer, "all_special_ids", None) or ()))
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.num_labels = self.binding.num_labels
        self._table = _position_table(self.binding)
        self.max_length = _max_length(self.binding, tokenizer)
        if not self.binding.head and pooling != "auto":
            name = type(self.binding.root).__name__
            raise ValueError(f'{name} pools by itself: expected pooling to be "auto", got {pooling!r}')
        self.interventions: Any = None
        self._base: RewardModel | None = None
        self._warned = False
        self._engine: tuple[tuple, Engine | str] | None = None

    @property
    def fingerprint(self) -> str:
        """Of the architecture and a sample of the weights, by which interventions know their model."""
        return _model.fingerprint((self._base or self).binding.root)

    def __repr__(self) -> str:
        bound = self.binding
        return (
            f"RewardModel({type(bound.root).__name__}, num_labels={self.num_labels}, norm={bound.norm_kind!r}, "
            f"pooling={self.pooling!r}, device={str(bound.device)!r})"
        )

    def score(
        self,
        inputs: Sequence[Any],
        *,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        truncation: Truncation = "error",
        normalize: tuple[Any, Any] | None = None,
        progress: bool = False,
        format: Format | None = None,
        positions: Sequence[int] | None = None,
        interventions: Sequence[Any] | None = None,
        intervention_index: Sequence[int] | None = None,
        engine: Literal["packed", "padded"] | None = None,
    ) -> Tensor:
        """One reward (or K) for each input: the head's raw output.

        Args:
            inputs: a sequence of (prompt, response) pairs, chat message lists, strings, or token-id sequences (list,
                1-D array or tensor), in any mixture. With a chat template a pair is a user and an assistant turn (the
                prompt may also be a list of messages). Without one an encoder gets its tokenizer's pair encoding,
                a decoder prompt + response.
            batch_tokens: most tokens of one batch, padding included; a longer text is a batch of its own. Default 3,072
                on CPU, 16,384 elsewhere; a batch that does not fit in a GPU's memory is halved.
            max_length: most tokens of one input; default `self.max_length`.
            truncation: what is done to an input over max_length: "error", or cut at the "left" or "right". Tokens that
                the tokenizer adds ([CLS], [SEP]) and a leading BOS are kept.
            normalize: (mean, std), numbers or K of each; the result is (reward − mean) / std.
            progress: show a progress bar.
            format: how pairs become text: "chat", "pair" (the tokenizer's pair encoding), "concat", or a function of
                one input that returns an input.
            positions: the token at which each input is read, after truncation, negative from the end; in place of
                pooling.
            interventions: V of them (`rmfast.interventions`; None for none): the rewards under each, on top of the
                model's own. Those that clamp the same neurons, or none, share one pass of the body.
            intervention_index: the one of them that each input gets, −1 for none, in place of all.

        Returns:
            (N,) for K = 1, else (N, K), in input order, on the CPU; fp32 (fp64 for an fp64 model). With interventions
            and no intervention_index (V, N) or (V, N, K).

        Raises:
            InputError: (a ValueError) an input is empty, of an unknown kind, over max_length, outside of the
                vocabulary, or lacks the pooling token. `.index` is its position.
            ValueError, TypeError: an argument is wrong.
        """
        scale = None if normalize is None else _normalize(normalize, self.num_labels)
        variants = None
        if interventions is None and intervention_index is not None:
            raise ValueError("Expected interventions with intervention_index, got None")
        if interventions is not None:
            from rmfast.interventions import variants_of

            variants = variants_of(self, interventions, intervention_index)
        encoded = self.encode(inputs, max_length=max_length, truncation=truncation, format=format)
        if positions is not None and len(positions) != len(encoded):
            raise ValueError(f"Expected one position for each of {len(encoded)} inputs, got {len(positions)}")
        if not self.binding.head:
            if positions is not None:
                raise ValueError(f"{type(self.binding.root).__name__} pools by itself and can't be read at positions")
            read = [np.zeros(1, np.int64)] * len(encoded)  # one row each; its own forward picks the tokens
        else:
            read = []
            for i, item in enumerate(encoded):
                read.append(np.array([self._position(item.ids, i, None if positions is None else positions[i])]))
        if variants is None:
            values = self._run(encoded, read, batch_tokens, progress, engine)
            out = self._corrected(torch.cat(values) if values else torch.empty(0, self.num_labels), encoded)
        else:
            out = variants(encoded, read, batch_tokens, progress, engine)
        if scale is not None:
            out = (out - scale[0].to(out)) / scale[1].to(out)
        return out[..., 0] if self.num_labels == 1 else out

    def token_values(
        self,
        inputs: Sequence[Any],
        *,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        truncation: Truncation = "error",
        normalize: tuple[Any, Any] | None = None,
        progress: bool = False,
        format: Format | None = None,
        engine: Literal["packed", "padded"] | None = None,
    ) -> list[Tensor]:
        """The reward read at every token of every input, from one pass of the body.

        Arguments and errors are those of `score`. Value t of an input is what `score` with position t gives.

        Returns:
            For each input (T_i,), or (T_i, K) for K > 1, on the CPU; fp32 (fp64 for an fp64 model). `encode` gives the
            tokens they belong to.

        Raises:
            ValueError: the model pools by itself (a cross-encoder), so tokens have no reward of their own.
        """
        if not self.binding.head:
            raise ValueError(
                f"{type(self.binding.root).__name__} pools the whole text by itself, so its tokens have no rewards of "
                "their own; token_values needs a head that is applied to each token"
            )
        scale = None if normalize is None else _normalize(normalize, self.num_labels)
        encoded = self.encode(inputs, max_length=max_length, truncation=truncation, format=format)
        values = self._run(encoded, [np.arange(len(item)) for item in encoded], batch_tokens, progress, engine)
        if self.interventions is not None and self.interventions.lengths:  # of a text one length, for all its tokens
            off = self._corrected(torch.zeros(len(encoded), self.num_labels, dtype=torch.float64), encoded)
            values = [v + o.to(v) for v, o in zip(values, off)]
        if scale is not None:
            values = [(v - scale[0].to(v)) / scale[1].to(v) for v in values]
        return [v[:, 0] if self.num_labels == 1 else v for v in values]

    def values_and_reward(
        self,
        inputs: Sequence[Any],
        *,
        gamma: float = 1.0,
        lam: float = 0.95,
        rewards: Sequence[Any] | None = None,
        response_start: Sequence[int] | None = None,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        progress: bool = False,
        format: Format | None = None,
        engine: Literal["packed", "padded"] | None = None,
    ) -> ResponseValues:
        """Critic and reward of PPO from one pass of the body: values, rewards, advantages and returns of all responses.

        Meant for models trained with the TCRM loss (arXiv 2604.22981), whose reward read at any token is the expected
        final one. A response token's value is that of the state in which it was chosen: the reward read one token
        before it, for the first one at the prompt's last token (or, without any, its own). The reward comes with the
        token that `score` reads, where the response ends. With gamma 1 and lam 0 an advantage is the token's credit
        r_k − r_{k−1}.

        Args:
            inputs: as for `score`. (prompt, response) pairs and messages that end with the assistant's turn say where
                their response starts: where their tokens differ from those of the prompt alone, a template's assistant
                header included. Where the policy has the same tokenizer, its own token ids are surer, with
                response_start.
            gamma, lam: as for `rmfast.values.gae`.
            rewards: added to the rewards: for each input as many numbers as its response has tokens, such as −β times
                the log-ratio to a reference policy.
            response_start: for each input the index of its response's first token.
            batch_tokens, max_length, progress, format, engine: as for `score`.

        Returns:
            A `rmfast.ResponseValues`, on the CPU; fp32 (fp64 for an fp64 model).

        Raises:
            InputError: as for `score`, or an input whose response's start is unknown or behind the token that is read.
            ValueError, TypeError: an argument is wrong; the model is not causal, pools by itself or has several labels.
        """
        from rmfast.values import values_and_reward

        return values_and_reward(
            self, inputs, gamma=gamma, lam=lam, rewards=rewards, response_start=response_start,
            batch_tokens=batch_tokens, max_length=max_length, progress=progress, format=format, engine=engine,
        )  # fmt: skip

    def encode(
        self,
        inputs: Sequence[Any],
        *,
        max_length: int | None = None,
        truncation: Truncation = "error",
        format: Format | None = None,
        errors: Literal["raise", "return"] = "raise",
    ) -> list[Any]:
        """Inputs as token ids, formatted, checked and cut as `score` would; `score` takes the results as inputs.

        Returns:
            A list of `Encoded` (`.ids` is (T,) int64). With errors="return" an input that can't be scored has its
            `InputError` there instead, and the others can still be scored.

        Raises:
            InputError: with errors="raise", the first input that can't be scored; `.index` is its position.
        """
        return _inputs.encode(
            inputs,
            self.tokenizer,
            causal=self.binding.causal,
            vocab_size=self.binding.vocab_size,
            max_length=_least(self._table, self.max_length if max_length is None else max_length),
            truncation=truncation,
            format=format,
            errors=errors,
        )

    def _position(self, ids: np.ndarray, index: int, given: int | None) -> int:
        """The token at which an input is read."""
        if given is not None:
            if not -len(ids) <= given < len(ids):
                raise InputError(index, f"position {given} is outside of its {len(ids)} tokens")
            return int(given) % len(ids)
        if self.pooling == "last":
            return len(ids) - 1
        if self.pooling == "auto":
            pad = getattr(self.binding.config, "pad_token_id", None)
            if pad is None:
                return len(ids) - 1
            if ids[-1] == pad:
                self._warn_pad(pad)
            other = np.flatnonzero(ids != pad)
            return int(other[-1]) if len(other) else 0  # only pads: transformers reads the first token
        found = np.flatnonzero(ids == self.pooling)
        if not len(found):
            raise InputError(index, f"token id {self.pooling}, at which pooling={self.pooling} reads, is not in it")
        return int(found[-1])

    def _warn_pad(self, pad: int) -> None:
        if self._warned:
            return
        self._warned = True
        config = self.binding.config
        eos = getattr(config, "eos_token_id", None)
        same = pad in eos if isinstance(eos, list | tuple) else pad == eos
        warnings.warn(
            f"A text ends with token {pad}, this model's pad_token_id{' and eos_token_id' if same else ''}. As in "
            'transformers, the reward is read at the last token that is not; pooling="last" reads the very last',
            stacklevel=4,
        )

    def _corrected(self, rewards: Tensor, encoded: list[Encoded]) -> Tensor:
        """Rewards (N, K) less what the length corrections among `interventions` take off for each input's response."""
        if self.interventions is None or not self.interventions.lengths:
            return rewards
        from rmfast.interventions import corrected

        return corrected(self, rewards, encoded, self.interventions.lengths)

    def _run(
        self,
        encoded: list[Encoded],
        read: list[np.ndarray],
        batch_tokens: int | None,
        progress: bool,
        engine: str | None,
        head: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """Rewards (len(read[i]), K) of each input at its tokens read[i], on the CPU.

        With `head`, a function of hidden states (B, T, d) and flat rows (M,) of them, what that gives (M, C) in their
        place.
        """
        if engine not in (None, "packed", "padded"):
            raise ValueError(f'Expected engine to be "packed", "padded" or None, got {engine!r}')
        if batch_tokens is not None and (
            isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1
        ):
            raise ValueError(f"Expected batch_tokens to be a positive int, got {batch_tokens!r}")
        packed = self._packed_engine() if engine != "padded" and encoded else None
        if isinstance(packed, str):
            if engine == "packed":
                raise ValueError(f'Expected engine to be "padded": this model cannot run packed, since {packed}')
            packed = None
        if batch_tokens is None:
            batch_tokens = self._default_batch_tokens(packed)
        counts = [len(r) for r in read]
        if self.binding.clamps_last and any(count != 1 for count in counts):
            # What a clamp does at a token, later ones must not see: each is the end of a text of its own, whose other
            # tokens the planner finds in the longest one.
            encoded = [item for item, count in zip(encoded, counts) for _ in range(count)]
            read = [r[i : i + 1] for r in read for i in range(len(r))]
        with self.binding.session(), tqdm(total=len(encoded), unit="text", disable=not progress) as bar:
            run = self._run_padded if packed is None else partial(self._run_packed, packed)
            results: list[Tensor] = run(encoded, read, batch_tokens, bar, head or self.binding.rewards)
            flat = torch.cat(results).cpu() if results else torch.empty(0, self.num_labels)
        # A clone made outside of inference mode is an ordinary tensor, which autograd may save.
        return list(flat.clone().split(counts))

    def _run_watched(
        self,
        bound: _model.Binding,
        taps: Sequence[tuple[Point, Callable[[Tensor], None]]],
        encoded: list[Encoded],
        read: list[np.ndarray],
        head: Callable[[Tensor, Tensor], Tensor],
        batch_tokens: int | None = None,
        progress: bool = False,
        packed: bool = True,
    ) -> list[Tensor]:
        """`_run` with a head, while `taps` see what comes by at their points; `bound` is `hooks.layered`'s."""
        self._packed_engine()  # before hooks are in the layers, which would rule it out; kept by self
        watched = copy.copy(self)
        watched.binding = Watched.of(bound, taps)
        # A norm that stays in the body is one that the packed engine leaves out.
        engine = None if packed and bound is self.binding else "padded"
        return watched._run(encoded, read, batch_tokens, progress, engine, head)

    def _run_padded(
        self, encoded: list[Encoded], read: list[np.ndarray], batch_tokens: int, bar: tqdm, head: Callable
    ) -> list[Tensor]:
        results: list[Any] = [None] * len(encoded)
        cost = _BATCH_COST.get(self.binding.device.type, _BATCH_COST_ACCELERATOR)
        pending = list(_plan([len(item) for item in encoded], batch_tokens, cost, self.binding.length_group))[::-1]
        while pending:
            batch = pending.pop()
            try:
                values = self._batch([encoded[i] for i in batch], [read[i] for i in batch], head)
            except RuntimeError as error:
                if len(batch) == 1 or not _model.out_of_memory(error):
                    raise
                pending += [batch[len(batch) // 2 :], batch[: len(batch) // 2]]
                continue
            # Results stay on their device until the end: a copy to the host would wait for each batch.
            for i, value in zip(batch, values.split([len(read[i]) for i in batch])):
                results[i] = value
            bar.update(len(batch))
        return results

    def _run_packed(
        self,
        engine: Engine,
        encoded: list[Encoded],
        read: list[np.ndarray],
        batch_tokens: int,
        bar: tqdm,
        head: Callable,
    ) -> list[Tensor]:
        results: list[Any] = [None] * len(encoded)
        for todo, longest in self._windows(encoded):
            while todo:
                ids = np.concatenate([encoded[i].ids for i in todo], dtype=np.int32)
                cu = np.cumsum([0, *(len(encoded[i]) for i in todo)])
                one = all(len(read[i]) == 1 for i in todo)
                positions = np.array([read[i][0] for i in todo]) if one else "all"
                shared = ids
                if self.binding.clamps_last:
                    # A clamped row is no other text's: to the planner the token that is read has an id of its own.
                    shared = ids.copy()
                    shared[cu[:-1] + positions] += self.binding.vocab_size
                planned = plan(shared, cu, batch_tokens=batch_tokens, read=positions)  # type: ignore[arg-type]
                values: list[Tensor] = []
                try:
                    for chunk, hidden in engine.run(ids, planned, longest):
                        rows = torch.arange(hidden.size(0), device=hidden.device)
                        values.append(head(hidden[None], rows))
                        bar.update(len(chunk.inputs))
                except RuntimeError as error:
                    if batch_tokens <= _LEAST_BATCH_TOKENS or not _model.out_of_memory(error):
                        raise
                    batch_tokens = max(_LEAST_BATCH_TOKENS, batch_tokens // 2)
                done = planned.cu_inputs[len(values)]
                finished = planned.order[:done]
                spans = [(i, i + 1) if one else (cu[i], cu[i + 1]) for i in finished]
                at = np.concatenate([planned.read_index[a:b] for a, b in spans]) if spans else np.zeros(0, np.int64)
                if len(at):
                    out = torch.cat(values)
                    out = out[torch.from_numpy(at).to(out.device)]
                    for i, value in zip(finished, out.split([b - a for a, b in spans])):
                        results[todo[i]] = value
                todo = [todo[i] for i in np.sort(planned.order[done:])]
        return results

    def _windows(self, encoded: list[Encoded]) -> Iterator[tuple[list[int], int]]:
        """Inputs to plan together, and the longest text by which their rotary frequencies go (0 for none)."""
        groups: dict[tuple, list[int]] = {}
        for i, item in enumerate(encoded):
            groups.setdefault(self.binding.length_group(len(item)), []).append(i)
        for key, group in groups.items():
            lengths = [len(encoded[i]) for i in group]
            # Of one key above 0 all are as long as the group's frequencies need.
            longest = max(lengths) if any(key) else 0
            for window in windows(lengths):
                yield [group[i] for i in window], longest

    def _packed_engine(self) -> Engine | str:
        """The packed engine of the model as it is now, or why there is none."""
        if torch.is_autocast_enabled(self.binding.device.type):
            return "autocast is on, whose choice of dtypes is the modules' own"
        with _model._lock(self.binding.root):  # a run in another thread has the modules' forwards replaced
            parts = self._parts()
            if self._engine is None or self._engine[0] != parts:  # new, or changed since (modules replaced, hooks)
                try:
                    self._engine = parts, Engine(self.binding)
                except Unsupported as reason:
                    self._engine = parts, str(reason)
            return self._engine[1]

    def _parts(self) -> tuple:
        """The body's modules, and what would make them run otherwise than they are: a key for its engine."""
        return tuple(
            (module, _model._hooked(module), module.__dict__.get("forward")) for module in self.binding.body.modules()
        )

    def patch_sweep(
        self,
        clean: Any,
        corrupted: Any = None,
        *,
        mode: str | Tensor | Mapping[str, Tensor] = "denoising",
        sites: str | Sequence[str] = "resid_post",
        layers: int | Iterable[int] | None = None,
        positions: str | Iterable[Any] | None = None,
        heads: int | Iterable[int] | None = None,
        neurons: int | Iterable[int] | None = None,
        align: Any = "auto",
        metric: Callable[[Tensor], Any] | None = None,
        baseline: Sequence[Any] | None = None,
        seed: int = 0,
        screen: Literal["atp"] | None = None,
        top: int | None = None,
        batch_tokens: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = False,
        max_length: int | None = None,
        truncation: Truncation = "error",
        format: Format | None = None,
    ) -> Any:
        """Activation patching over a grid of sites: the reward of a run in which one activation is replaced, for each.

        The *base run* is the corrupted text's for denoising and the clean text's for all other modes. Rewards are those
        of the full forward with that one replacement; only the rows that it reaches are run (docs/sweep.md).

        Args:
            clean, corrupted: one text each, in any form that `score` takes, or lists of as many texts. corrupted is
                None for modes without another run.
            mode: "denoising" (clean activations into the corrupted run) or "noising" (corrupted ones into the clean
                run); on the clean run alone "zero", "mean" (of all `baseline` tokens), "resample" (at each position the
                activations of a random token of `baseline`, by `seed`), or values: a tensor that broadcasts to
                (layers, units, width), or one for each kind of sites.
            sites: a kind or several (`rmfast.sites`): "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out",
                "head_out", "mlp_neuron", "q", "k", "v".
            layers: the layers to sweep, negative from the end; default all.
            positions: "all" (the default: each by itself), "joint" (all at once), or a list of positions of the base
                run and of groups (lists, ranges, slices) that are replaced together.
            heads, neurons: which units of kinds that have them; heads default to all (K/V heads for k and v).
            align: "auto" (equal lengths position by position; else what both texts begin and end with, and between
                that the tokens that correspond; in any case the tokens where the rewards are read), "strict" (equal
                lengths only), or a map from clean to corrupted positions. Positions without a partner are NaN and
                counted in `unpaired`.
            metric: a function of the rewards (K,) that gives one number, taken in their place.
            screen, top: with "atp", only the `top` sites that `attribution_patch` ranks first are run, others are NaN.
            batch_tokens: most rows that run at once; default as for `score`. An edited run must fit.
            checkpoint: a file from which an interrupted sweep of the same texts, sites and model goes on.
            progress: show a progress bar.
            max_length, truncation, format: as for `score`.

        Returns:
            A `rmfast.PatchSweep`, or for lists one for each pair.

        Raises:
            ValueError, TypeError: an argument is wrong, the texts do not differ, or the model's layers lack a part that
                a kind names.
        """
        from rmfast.sweep import patch_sweep  # with scipy, which takes 0.5 s

        return patch_sweep(
            self, clean, corrupted, mode=mode, sites=sites, layers=layers, positions=positions, heads=heads,
            neurons=neurons, align=align, metric=metric, baseline=baseline, seed=seed, screen=screen, top=top,
            batch_tokens=batch_tokens, checkpoint=checkpoint, progress=progress, max_length=max_length,
            truncation=truncation, format=format,
        )  # fmt: skip

    def attribution_patch(
        self,
        clean: Any,
        corrupted: Any = None,
        *,
        mode: str | Tensor | Mapping[str, Tensor] = "denoising",
        sites: str | Sequence[str] = "resid_post",
        layers: int | Iterable[int] | None = None,
        positions: str | Iterable[Any] | None = None,
        heads: int | Iterable[int] | None = None,
        neurons: int | Iterable[int] | None = None,
        align: Any = "auto",
        metric: Callable[[Tensor], Any] | None = None,
        baseline: Sequence[Any] | None = None,
        seed: int = 0,
        max_length: int | None = None,
        truncation: Truncation = "error",
        format: Format | None = None,
    ) -> Any:
        """Attribution patching (AtP): what `patch_sweep` gives, estimated for all sites from one backward pass.

        The effect of a site is taken as the reward's gradient at the base run times the change of the activation.
        Arguments, results and errors are those of `patch_sweep`.
        """
        from rmfast.sweep import attribution_patch

        return attribution_patch(
            self, clean, corrupted, mode=mode, sites=sites, layers=layers, positions=positions, heads=heads,
            neurons=neurons, align=align, metric=metric, baseline=baseline, seed=seed, max_length=max_length,
            truncation=truncation, format=format,
        )  # fmt: skip

    def attribute(
        self,
        inputs: Any,
        *,
        components: str | Sequence[str] = ("embedding", "attn_out", "mlp_out"),
        positions: Literal["last", "all"] = "last",
        norm: Literal["frozen", "raw"] = "frozen",
        batch_tokens: int | None = None,
        progress: bool = False,
        max_length: int | None = None,
        truncation: Truncation = "error",
        format: Format | None = None,
    ) -> Any:
        """Direct attribution: the reward of a text as a sum over components, from one pass of the body.

        Args:
            inputs: one text, of any form that `score` takes, or a list of texts.
            components: of "embedding" (the stream that enters the first layer), "attn_out" or in its place "head_out"
                (heads, and the output projection's bias), "mlp_out" or in its place "mlp_neuron" (neurons, and the down
                projection's bias).
            positions: "last", the token at which `score` reads, or "all": the rewards of `token_values`.
            norm: "frozen" takes the final norm, its scale frozen at what it is, into every contribution: they sum to
                the reward. "raw" leaves it out, w·o_c (arXiv 2604.26130): their sum is not the reward.
            batch_tokens, progress, max_length, truncation, format: as for `score`.

        Returns:
            A `rmfast.Attribution`, or for a list one for each text.

        Raises:
            ValueError, TypeError: an argument is wrong; the model's head is not one linear map of a token's stream, its
                layers lack a part, or their parts do not add up to the stream (BERT).
        """
        from rmfast.attribution import attribute

        self._expect_clamps_alone(("all",))
        return attribute(
            self, inputs, components=components, positions=positions, norm=norm, batch_tokens=batch_tokens,
            progress=progress, max_length=max_length, truncation=truncation, format=format,
        )  # fmt: skip

    def sae_attribution(
        self,
        inputs: Any,
        sae: Any,
        *,
        layer: int | None = None,
        site: str | None = None,
        positions: Literal["last", "all"] = "last",
        norm: Literal["frozen", "raw"] = "frozen",
        top: int | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
        max_length: int | None = None,
        truncation: Truncation = "error",
        format: Format | None = None,
    ) -> Any:
        """What features of a sparse autoencoder add to the reward, f_i (W_dec γ⊙w)_i, from one pass of the body.

        Args:
            inputs: one text, of any form that `score` takes, or a list of texts.
            sae: a `rmfast.SAE` of the model's width (`rmfast.SAE.load` reads a folder of SAELens).
            layer, site: the stream it reads, site of "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out";
                default what its hook_name says.
            positions: "last", the token at which `score` reads, or "all": the rewards of `token_values`.
            norm: as for `attribute`.
            top: features of a token that are kept, those of largest contribution; default k of a TopK SAE, else 64.
            batch_tokens, progress, max_length, truncation, format: as for `score`.

        Returns:
            A `rmfast.SAEAttribution`, or for a list one for each text.

        Raises:
            ValueError, TypeError: as `attribute`; the SAE's width is not the model's, or its hook_name names no place
                that rmfast knows, and layer or site is not given.
        """
        from rmfast.sae import sae_attribution

        self._expect_clamps_alone(("all",))
        return sae_attribution(
            self, inputs, sae, layer=layer, site=site, positions=positions, norm=norm, top=top,
            batch_tokens=batch_tokens, progress=progress, max_length=max_length, truncation=truncation, format=format,
        )  # fmt: skip

    def with_interventions(self, *interventions: Any) -> RewardModel:
        """This model under interventions: `NeuronClamp`, `DirectionRemoval`, `LengthPenalty`, `LWR`, or sums of them.

        Any number of such models live side by side with this one, which stays as it is, and share its weights. Clamps
        at all positions are folded into copies of the matrices that they touch; such a model does not see a later
        switch of adapters. What else is changed in this model's weights in place is seen. (docs/interventions.md)

        Raises:
            ValueError: an intervention was made with another model, names modules or neurons that this one lacks, does
                not fit its width, or clashes with another; the model pools by itself, so that it has no last token.
            TypeError: one is no intervention.
        """
        from rmfast.interventions import intervened

        return intervened(self, interventions)

    def lens(
        self,
        inputs: Sequence[Any],
        *,
        positions: Literal["last", "all"] = "last",
        norm: Literal["final", "frozen", "raw"] = "final",
        batch_tokens: int | None = None,
        progress: bool = False,
        max_length: int | None = None,
        truncation: Truncation = "error",
        format: Format | None = None,
    ) -> Any:
        """The reward lens: what the head makes of the residual stream after each layer, from one pass of the body.

        Args:
            inputs: as for `score`; for pairs a chosen and a rejected text alternately.
            positions: "last", the token at which `score` reads, or "all".
            norm: "final" applies the final norm to each layer's stream as it does to the last one's. "frozen" gives it
                the scale that it has on the last one, so that differences of layers are what attention and MLP add to
                the reward. "raw" leaves it out, w·h + b (arXiv 2604.26130): its last layer is not the reward.
            batch_tokens, progress, max_length, truncation, format: as for `score`.

        Returns:
            A `rmfast.Lens`.

        Raises:
            InputError, ValueError, TypeError: as `score`; the model's body has no list of its layers, it pools by
                itself, or (other norms than "final") its head is not one linear map or its final norm of no known kind.
        """
        from rmfast.lens import lens

        return lens(
            self, inputs, positions=positions, norm=norm, batch_tokens=batch_tokens, progress=progress,
            max_length=max_length, truncation=truncation, format=format,
        )  # fmt: skip

    def compare(
        self,
        clean: Sequence[Any],
        corrupted: Sequence[Any],
        *,
        sites: str | Sequence[str] = ("attn_out", "mlp_out"),
        layers: int | Iterable[int] | None = None,
        heads: int | Iterable[int] | None = None,
        neurons: int | Iterable[int] | None = None,
        mode: Literal["noising", "denoising"] = "noising",
        norm: Literal["frozen", "raw"] = "frozen",
        align: Any = "auto",
        label: int | None = None,
        confidence: float = 0.95,
        seed: int = 0,
        batch_tokens: int | None = None,
        progress: bool = False,
        max_length: int | None = None,
        truncation: Truncation = "error",
        format: Format | None = None,
    ) -> Any:
        """Does attribution predict patching? Both over pairs of texts, and how their ranks of the sites agree.

        For each pair the difference of both texts' contributions (`attribute`, at the read token), beside what patching
        the same components does (`patch_sweep`, all positions jointly).

        Args:
            clean, corrupted: as many texts each, at least 10.
            sites: of "attn_out", "mlp_out", "head_out", "mlp_neuron"; those with the same units together.
            layers, heads, neurons, mode, align, batch_tokens, progress: as for `patch_sweep`.
            norm: as for `attribute`.
            label: which reward of a model with K > 1.
            confidence: of the intervals, in (0, 1).
            seed: of the bootstrap.
            max_length, truncation, format: as for `score`.

        Returns:
            A `rmfast.Comparison`.

        Raises:
            ValueError, TypeError: as `patch_sweep` and `attribute`; too few pairs or sites.
        """
        from rmfast.comparison import compare_attribution

        self._expect_clamps_alone(("all",))
        return compare_attribution(
            self, clean, corrupted, sites=sites, layers=layers, heads=heads, neurons=neurons, mode=mode, norm=norm,
            align=align, label=label, confidence=confidence, seed=seed, batch_tokens=batch_tokens, progress=progress,
            max_length=max_length, truncation=truncation, format=format,
        )  # fmt: skip

    def _expect_clamps_alone(self, positions: tuple[str, ...] = ("last", "all")) -> None:
        """ValueError under interventions that what is read in the model's layers would not show."""
        for part in () if self.interventions is None else self.interventions.parts:
            if getattr(part, "positions", None) not in positions:
                raise ValueError(
                    f"Expected a model under no interventions but clamps at {' or '.join(positions)} positions, got "
                    f"{part}: the runs that are read here would not show it"
                )

    def _patcher(self) -> Any:
        """What runs patched texts: the suffix engine where it knows the layers, else the model's own forward."""
        from rmfast.hooks import LayersPatcher
        from rmfast.patching import SuffixPatcher

        if self.interventions is not None and self.interventions.lengths:
            raise ValueError("Expected a model without corrections by length, which no activation has a part in")
        engine = self._packed_engine()
        if isinstance(engine, str) or engine.why or self.binding.clamps_last:
            return LayersPatcher(self.binding)
        return SuffixPatcher(engine)

    def _default_batch_tokens(self, engine: Engine | None) -> int:
        """Rows of a batch: as many as pay, and fit into free memory."""
        most = _BATCH_TOKENS.get(self.binding.device.type, _BATCH_TOKENS_ACCELERATOR)
        return most if engine is None else min(most, engine.affordable_tokens())

    def explain(self) -> str:
        """Which engine scores this model and why, and which backend runs each op on its device."""
        packed = self._packed_engine()
        if isinstance(packed, str):
            engine = f"padded (not packed: {packed})"
        else:
            engine = f"packed, {packed.mode} layers" + (f" ({packed.why})" if packed.why else "")
        return f"engine: {engine}\n{_backends.explain(device=self.binding.device.type)}"

    def _batch(self, items: list[Encoded], read: list[np.ndarray], head: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Rewards (sum of len(read), K) of one right-padded batch."""
        longest = max(map(len, items))
        device = self.binding.device
        ids = np.full((len(items), longest), _model.pad_id(self.binding), np.int64)
        mask = np.zeros((len(items), longest), np.int64)
        types = np.zeros((len(items), longest), np.int64)
        for i, item in enumerate(items):
            ids[i, : len(item)] = item.ids
            mask[i, : len(item)] = 1
            if item.types is not None:
                types[i, : len(item)] = item.types
        # A decoder that takes token types (GPT-2) looks them up as words; only encoders have them in their inputs.
        typed = not self.binding.causal and any(item.types is not None for item in items)
        args = [torch.from_numpy(x).to(device) for x in (ids, mask, *([types] if typed else []))]
        if not self.binding.head:
            return self.binding.pooled(*args)
        rows = torch.from_numpy(np.concatenate([i * longest + r for i, r in enumerate(read)])).to(device)
        with _model.reading(ids.size, rows):
            hidden = self.binding.hidden(*args)
        return head(hidden, rows.to(hidden.device))


def _plan(lengths: list[int], batch_tokens: int, cost: int, group: Callable[[int], tuple]) -> Iterator[list[int]]:
    """Batches of indices, longest text first (memory runs out at once or never), of one length group each.

    A batch ends at the budget, or where its padding would come to cost more tokens than another batch does.
    """
    batch: list[int] = []
    padding = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch:
            longest = lengths[batch[0]]
            padding += longest - lengths[i]
            full = (len(batch) + 1) * longest > batch_tokens
            if full or padding > cost or group(lengths[i]) != group(longest):
                yield batch
                batch, padding = [], 0
        batch.append(i)
    if batch:
        yield batch


def _normalize(normalize: tuple[Any, Any], labels: int) -> tuple[Tensor, Tensor]:
    if not isinstance(normalize, tuple | list) or len(normalize) != 2:
        raise ValueError(f"Expected normalize to be (mean, std), got {normalize!r}")
    mean, std = (torch.as_tensor(x, dtype=torch.float64) for x in normalize)
    for name, x in (("mean", mean), ("std", std)):
        if x.dim() > 1 or x.numel() not in (1, labels):
            raise ValueError(f"Expected {name} in normalize to be a number or {labels} of them, got {tuple(x.shape)}")
    if not bool((std > 0).all()):
        raise ValueError(f"Expected the std in normalize to be above 0, got {std.tolist()}")
    return mean, std


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _position_table(binding: _model.Binding) -> int | None:
    """Most tokens that a table of learned positions has rows for: beyond it the model would crash."""
    rows = []
    for name, module in binding.body.named_modules():
        if not isinstance(module, nn.Embedding):
            continue
        if name.endswith("position_embeddings"):
            # RoBERTa counts positions from padding_idx + 1, so its table holds fewer texts' tokens than rows.
            rows.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
        elif name.endswith(("wpe", "embed_positions")):
            rows.append(module.num_embeddings - int(getattr(module, "offset", 0)))  # OPT's table begins at row 2
    return min(rows, default=None)


def _max_length(binding: _model.Binding, tokenizer: Any) -> int | None:
    """The smaller of the model's positions and the tokenizer's limit, where they are stated."""
    limits = [table] if (table := _position_table(binding)) is not None else []
    positions = getattr(binding.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions)
    stated = getattr(tokenizer, "model_max_length", None)
    if isinstance(stated, int) and 0 < stated < 10**9:  # unset, it is 10^30
        limits.append(stated)
    return min(limits, default=None)


# Loading --------------------------------------------------------------------------------------------------------------


def load(
    path_or_id: Any,
    *,
    dtype: Any = None,
    device: Any = None,
    trust_remote_code: bool = False,
    pooling: str | int = "auto",
    **kw: Any,
) -> RewardModel:
    """Load a reward model and its tokenizer with transformers.

    Args:
        path_or_id: a folder or hub id of a sequence- or token-classification checkpoint, or of a peft adapter on one.
        dtype: a torch dtype or its name; default the checkpoint's own.
        device: where the weights go; default a CUDA GPU where there is one, else the CPU. Not with device_map.
        trust_remote_code: run the checkpoint's own Python code.
        pooling: as for `RewardModel`.
        **kw: passed to from_pretrained: device_map, quantization_config, revision, subfolder, gguf_file, ...

    Raises:
        ValueError: the checkpoint is no reward model, or its head's weights are missing.
        OSError: there is no such checkpoint (from transformers).
    """
    if device is not None and kw.get("device_map") is not None:
        raise ValueError("Expected device or device_map, got both")
    shared = {name: kw[name] for name in _HUB_ARGUMENTS if name in kw} | {"trust_remote_code": trust_remote_code}
    options = {**kw, "dtype": "auto" if dtype is None else dtype, "trust_remote_code": trust_remote_code}
    if device is None and kw.get("device_map") is None and torch.cuda.is_available():
        device = "cuda"
    model = _load_model(path_or_id, shared, options, device)
    return RewardModel(model, _load_tokenizer(path_or_id, shared), pooling=pooling)


_HUB_ARGUMENTS = ("cache_dir", "gguf_file", "local_files_only", "revision", "subfolder", "token")


def _load_model(path: Any, shared: dict[str, Any], options: dict[str, Any], device: Any) -> nn.Module:
    import transformers

    if _is_adapter(path, shared):
        from peft import AutoPeftModelForSequenceClassification

        model = AutoPeftModelForSequenceClassification.from_pretrained(path, **options)
        return model.to(device) if device is not None else model

    config = transformers.AutoConfig.from_pretrained(path, **shared)
    architectures = list(getattr(config, "architectures", None) or [])
    remote = getattr(config, "auto_map", None) or {}
    for task in ("SequenceClassification", "TokenClassification"):
        auto = f"AutoModelFor{task}"
        if any(name.endswith(f"For{task}") for name in architectures) or auto in remote:
            break
    else:
        auto = "AutoModel"  # a class of the checkpoint's own (InternLM2-reward); its structure will tell what it is
        if auto not in remote:
            raise ValueError(
                f"{path} is not a reward model: its config names {architectures or 'no architecture'}; rmfast looks "
                "for one that ends in ForSequenceClassification or ForTokenClassification; for one of these, or "
                "AutoModel, in auto_map (with trust_remote_code=True); or for a peft adapter (adapter_config.json). "
                "For a model with a head of your own: rmfast.RewardModel(model, tokenizer)"
            )
    if device is not None and (options.get("quantization_config") or getattr(config, "quantization_config", None)):
        options["device_map"], device = {"": device}, None  # quantised weights are made where they will stay
    model, info = getattr(transformers, auto).from_pretrained(path, output_loading_info=True, **options)
    _check_head(path, model, info)
    return model.to(device) if device is not None else model


def _check_head(path: Any, model: nn.Module, info: dict[str, Any]) -> None:
    """Refuse a head that transformers has just filled with random numbers."""
    prefix = getattr(model, "base_model_prefix", "")
    missing = sorted(name for name in info.get("missing_keys", ()) if not name.startswith(f"{prefix}."))
    if missing:
        raise ValueError(
            f"{path} is not a reward model: it has no weights for its head, {', '.join(missing)}, which transformers "
            "would fill with random numbers"
        )


def _is_adapter(path: Any, shared: dict[str, Any]) -> bool:
    from transformers.utils import cached_file

    hub = {name: value for name, value in shared.items() if name not in ("gguf_file", "trust_remote_code")}

    def has(name: str) -> bool:
        found = cached_file(
            path,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )
        return found is not None

    return "gguf_file" not in shared and has("adapter_config.json") and not has("config.json")


def _load_tokenizer(path: Any, shared: dict[str, Any]) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path, **shared)
    except (OSError, ValueError, KeyError) as error:
        warnings.warn(f"No tokenizer could be loaded from {path}, so inputs must be token ids: {error}", stacklevel=3)
        return None

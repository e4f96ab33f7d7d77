"""`Scorer`: a bound model with its tokenizer, and runs of texts on it: what every workload stands on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rmfast import arguments
from rmfast.binding.binding import Binding
from rmfast.binding.compute import chosen
from rmfast.binding.find import bind
from rmfast.binding.modules import has_hooks, modules_of, same_settings, settings_of
from rmfast.binding.session import lock_of, on_the_host, share_lock
from rmfast.binding.sketch import sketch
from rmfast.engine.attention import Unsupported
from rmfast.engine.explain import explained
from rmfast.engine.layers import settings
from rmfast.engine.limits import longest_text, position_table
from rmfast.engine.options import Encoding, check_options, checked_normalization, checked_pooling, checked_run
from rmfast.engine.packed import Engine
from rmfast.engine.padded import run_padded
from rmfast.engine.planned import run_packed
from rmfast.engine.programs import outputs, run_heads
from rmfast.engine.reading import token_reader, warn_of_padding
from rmfast.engine.workers import runner
from rmfast.heads.given import head_of
from rmfast.texts.inputs import Encoded, Format, InputError, Truncation, encode

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

# Tokens of one batch, padding included. A CPU is at its GEMM rate from about 2,000 tokens, and more only adds padding,
# cache misses and memory; a large GPU wants more rows in flight: 16,384 tokens of an 8B model take about 1.5 GB.
_BATCH_TOKENS = {"cpu": 3072}
_BATCH_TOKENS_ACCELERATOR = 16384
_TINY = 128  # up to this width twice as many: rows take less time than the Python around a batch (d 64: 13% of a run)


class Scorer:
    """What workloads run texts on; `rmfast.RewardModel`, which is one, says what arguments and errors are.

    Attributes:
        model: as it was given, with its wrappers.
        tokenizer: or None.
        pooling: the rule by which `position` goes.
        num_labels: K, the rewards of one token.
        binding: the parts found in the model; of one from `rmfast.load` proven at first use.
        interventions: what the model is under (`rmfast.debias.apply.intervened`), or None.
        base: the scorer without them; None where this is it.
        invariant: whether texts must have the same bits in any batch (None: where it costs little, on CPUs).
        cuda_graphs: whether texts run as CUDA graphs, or not at all.
        warned: what has been said: "end", that a text ends in padding; "ids", that token ids come with theirs.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, *, pooling: str | int = "auto", invariant: bool | None = None,
        compute: Literal["auto", "native", "fp32"] = "auto", head: Any = None, cuda_graphs: bool = False,
    ):  # fmt: skip
        check_options(pooling, invariant, compute, cuda_graphs)
        if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "decode")):
            raise TypeError(f"Expected tokenizer to be one of transformers, or None, got {arguments.shown(tokenizer)}")
        self._set_up(model, tokenizer, checked_pooling(pooling), invariant, compute, head, cuda_graphs)

    @classmethod
    def loaded(
        cls, model: nn.Module, tokenizer: Any, *, pooling: str | int, invariant: bool | None, compute: str, head: Any,
        cuda_graphs: bool,
    ) -> Self:  # fmt: skip
        """The scorer of a model that nobody else has seen: it is run as a whole at the first use of `binding`.

        Args: as for `rmfast.RewardModel`, checked (`check_options`).
        """
        made = cls.__new__(cls)
        made._set_up(model, tokenizer, checked_pooling(pooling), invariant, compute, head, cuda_graphs, whole=False)
        return made

    def _set_up(
        self, model: nn.Module, tokenizer: Any, pooling: str | int, invariant: bool | None, compute: str, head: Any,
        cuda_graphs: bool, whole: bool = True,
    ) -> None:  # fmt: skip
        program = None if head is None else head_of(head, model, tokenizer)
        if program is not None and pooling == "auto" and not isinstance(program.reading, str):
            pooling = program.reading
        avoid = tuple(getattr(tokenizer, "all_special_ids", None) or ())
        found = None if whole or program is not None else sketch(model, pooling, avoid)
        self._sketched = found is not None
        self._binding = found = found or bind(model, pooling, avoid, program)
        chosen(compute, found.root)
        found.compute = compute
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.num_labels = found.num_labels
        if pooling != "auto" and self.pools:
            name = "The head" if found.reads_rows else type(found.root).__name__
            raise ValueError(f'{name} pools by itself: expected pooling to be "auto", got {pooling!r}')
        self.invariant = invariant
        self.cuda_graphs = cuda_graphs
        self.interventions: Any = None
        self.base: Scorer | None = None
        self.warned: set[str] = set()
        self._engine: tuple[tuple, list[Any], Engine | str] | None = None

    @property
    def binding(self) -> Binding:
        if self._sketched:
            with lock_of(self._binding.root):
                if self._sketched:
                    self._prove()
        return self._binding

    @binding.setter
    def binding(self, binding: Binding) -> None:
        self._binding, self._sketched = binding, False

    def _prove(self) -> None:
        """Binds the whole model, all its layers run."""
        sketched = self._binding
        found = bind(self.model, self.pooling, sketched.avoid)
        parts = [(each.body_name, each.head_names, each.num_labels) for each in (sketched, found)]
        if parts[0] != parts[1]:
            raise ValueError(
                f"{type(found.root).__name__} has other parts than when it was loaded: expected body, head and labels "
                f"{parts[0]}, got {parts[1]}. Make a new RewardModel of the model"
            )
        found.compute = sketched.compute
        self.binding = found

    @property
    def pools(self) -> bool:
        """Whether a text's reward is not read at one of its tokens: by the model, or by a head of its own."""
        return not self.binding.reads_rows or (self.binding.program is not None and self.binding.program.pools)

    @property
    def gated(self) -> bool:
        """Whether the head reads the prompt's end beside the token of the reward."""
        return self.binding.program is not None and self.binding.program.gated

    @property
    def max_length(self) -> int | None:
        """Most tokens of a text that the model and tokenizer are made for, or None."""
        return longest_text(self.binding, self.tokenizer)

    @property
    def table(self) -> int | None:
        """Most tokens that a table of learned positions has rows for, beyond which the model would crash, or None."""
        return position_table(self.binding)

    @property
    def fingerprint(self) -> str:
        """Of the architecture and a sample of the weights, by which interventions know their model."""
        return (self.base or self).binding.fingerprint

    def __repr__(self) -> str:
        bound = self._binding
        return (
            f"{type(self).__name__}({type(bound.root).__name__}, num_labels={self.num_labels}, "
            f"norm={bound.norm_kind!r}, pooling={self.pooling!r}, device={str(bound.device)!r})"
        )

    def encode(
        self, inputs: Sequence[Any], *, errors: Literal["raise", "return"] = "raise", max_length: int | None = None,
        truncation: Truncation = "error", format: Format | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None, tools: Sequence[Any] | None = None,
    ) -> list[Any]:  # fmt: skip
        """Inputs as token ids, formatted, checked and cut as `score` would; `score` takes the results as inputs.

        Returns:
            A list of `Encoded` (`.ids` is (T,) int64). With errors="return" an input that can't be scored has its
            `InputError` there instead, and the others can still be scored.

        Raises:
            InputError: with errors="raise", the first input that can't be scored; `.index` is its position.
        """
        if self.binding.changed:  # which may say that other tokens are read, or seen
            with lock_of(self.binding.root):
                self.binding.renew()
        if max_length is not None:  # before the least of limits is taken
            max_length = arguments.whole("max_length", max_length, 1)
        limits = (self.table, self.max_length if max_length is None else max_length)
        most = min((limit for limit in limits if limit is not None), default=None)
        last = getattr(self.binding.program, "append", None)
        encoded = encode(
            inputs,
            self.tokenizer,
            causal=self.binding.causal,
            vocab_size=self.binding.vocab_size,
            max_length=most if most is None or last is None else max(1, most - 1),
            truncation=truncation,
            format=format,
            chat_template_kwargs=chat_template_kwargs,
            tools=tools,
            errors=errors,
        )
        if "ids" not in self.warned:
            warn_of_padding(self.binding, self.tokenizer, self.pooling, encoded, self.warned)
        return (
            encoded
            if last is None
            else [item.ending_in(last) if isinstance(item, Encoded) else item for item in encoded]
        )

    def position(self, ids: np.ndarray, index: int) -> int:
        """The token at which an input (index among the inputs, for its error) is read, by `pooling`."""
        return token_reader(self.binding, self.pooling, self.warned)(ids, index)

    def positions(self, encoded: Sequence[Encoded], given: Sequence[int] | None = None) -> list[int]:
        """Of each input the token that is given, else `position`."""
        if given is None:
            read = token_reader(self.binding, self.pooling, self.warned)
            return list(map(read, [item.ids for item in encoded], range(len(encoded))))
        for i, (item, at) in enumerate(zip(encoded, given)):
            if not -len(item) <= at < len(item):
                raise InputError(i, f"position {at} is outside of its {len(item)} tokens")
        return [int(at) % len(item) for item, at in zip(encoded, given)]

    def score(
        self,
        inputs: Sequence[Any],
        *,
        positions: Sequence[int] | None = None,
        normalize: tuple[Any, Any] | str | None = None,
        variants: Callable[[], Callable[..., Tensor]] | None = None,
        device: Any = None,
        batch_tokens: int | None = None,
        progress: bool = False,
        engine: Literal["packed", "padded"] | None = None,
        **encoding: Unpack[Encoding],
    ) -> Tensor:
        """See `RewardModel.score`.

        Args:
            variants: makes what runs in place of the model's own rewards: of `run`'s first five arguments, (..., N, K).
        """
        if variants is not None and device is not None:
            raise ValueError("Expected no device with interventions: make a model under each (with_interventions)")
        scale = None if normalize is None else self._scale(normalize)
        varied = None if variants is None else variants()
        encoded = self.encode(inputs, **encoding)
        read = self.reads(encoded, positions)
        if varied is None:
            with runner(self, device) as run:
                values = run(encoded, read, batch_tokens, progress, engine)
            out = self.corrected(torch.cat(values) if values else torch.empty(0, self.num_labels), encoded)
        else:
            out = varied(encoded, read, batch_tokens, progress, engine)
        if scale is not None:
            out = (out - scale[0].to(out)) / scale[1].to(out)
        return out[..., 0] if self.num_labels == 1 else out

    def reads(self, encoded: list[Encoded], positions: Sequence[int] | None = None) -> list[np.ndarray]:
        """(1,) for each text, the token where its reward is read: one of `positions`, or by `pooling`."""
        if positions is not None:
            positions = arguments.wholes("positions", positions, len(encoded))
        if self.pools:
            if positions is not None:
                name = "The head" if self.binding.reads_rows else type(self.binding.root).__name__
                raise ValueError(f"{name} pools by itself and can't be read at positions")
            return [np.zeros(1, np.int64)] * len(encoded)  # one row each; which tokens is not ours to say
        return [np.array([at]) for at in self.positions(encoded, positions)]

    def outputs(
        self,
        inputs: Sequence[Any],
        *,
        positions: Sequence[int] | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
        engine: Literal["packed", "padded"] | None = None,
        **encoding: Unpack[Encoding],
    ) -> dict[str, Any]:
        """See `RewardModel.score` with output="all"."""
        if self.interventions is not None and self.interventions.lengths:
            raise ValueError(
                f'Expected a model without corrections by length for output="all", got {self.interventions}'
            )
        encoded = self.encode(inputs, **encoding)
        return outputs(self, encoded, self.reads(encoded, positions), (batch_tokens, progress, engine))

    def token_values(
        self,
        inputs: Sequence[Any],
        *,
        normalize: tuple[Any, Any] | str | None = None,
        device: Any = None,
        batch_tokens: int | None = None,
        progress: bool = False,
        engine: Literal["packed", "padded"] | None = None,
        **encoding: Unpack[Encoding],
    ) -> list[Tensor]:
        """See `RewardModel.token_values`."""
        if self.pools:
            name = "The head" if self.binding.reads_rows else type(self.binding.root).__name__
            raise ValueError(
                f"{name} pools the whole text by itself, so its tokens have no rewards of "
                "their own; token_values needs a head that is applied to each token"
            )
        scale = None if normalize is None else self._scale(normalize)
        encoded = self.encode(inputs, **encoding)
        with runner(self, device) as run:
            values = run(encoded, [np.arange(len(item)) for item in encoded], batch_tokens, progress, engine)
        if self.interventions is not None and self.interventions.lengths:  # of a text one length, for all its tokens
            off = self.corrected(torch.zeros(len(encoded), self.num_labels, dtype=torch.float64), encoded)
            values = [v + o.to(v) for v, o in zip(values, off)]
        if scale is not None:
            values = [(v - scale[0].to(v)) / scale[1].to(v) for v in values]
        return [v[:, 0] if self.num_labels == 1 else v for v in values]

    def run(
        self,
        encoded: list[Encoded],
        read: list[np.ndarray],
        batch_tokens: int | None = None,
        progress: bool = False,
        engine: str | None = None,
        head: Callable[..., Tensor] | None = None,
        marks: list[np.ndarray] | None = None,
    ) -> list[Tensor]:
        """Rewards (len(read[i]), K) of each input at its tokens read[i], on the CPU.

        With `head`, a function of hidden states (B, T, d) and flat rows (M,) of them, what that gives (M, C) in their
        place. With `marks`, (len(read[i]),) bool each, it is given which of the rows are marked, (G,) int64, as well.
        """
        if head is None and self.binding.program is not None:
            return run_heads(self, [self.binding], encoded, read, (batch_tokens, progress, engine))
        if engine is not None:
            arguments.word("engine", engine, ("packed", "padded"))
        batch_tokens = checked_run(batch_tokens, progress)
        packed = self.packed_engine() if engine != "padded" and encoded else None
        if encoded:
            self.expect_invariance(packed)
            if self.cuda_graphs and (problem := self.uncaptured(packed)) is not None:
                raise ValueError(f"Expected cuda_graphs=False: {problem}")
        if isinstance(packed, str):
            if engine == "packed":
                raise ValueError(f'Expected engine to be "padded": this model cannot run packed, since {packed}')
            packed = None
        if batch_tokens is None:
            batch_tokens = self.default_batch_tokens(packed)
        counts = [len(r) for r in read]
        some = packed is not None and any(count not in (1, len(item)) for count, item in zip(counts, encoded))
        if (self.binding.clamps_last or some) and any(count != 1 for count in counts):
            # Each is the end of a text of its own, whose other tokens the planner finds in the longest one: what a
            # clamp does at a token, later ones must not see, and the last layer runs the tokens that are read alone.
            encoded = [item for item, count in zip(encoded, counts) for _ in range(count)]
            read = [r[i : i + 1] for r in read for i in range(len(r))]
        with self.binding.session(), tqdm(total=len(encoded), unit="text", disable=not progress) as bar:
            run = run_padded if packed is None else partial(run_packed, packed)
            head = head or self.binding.rewards
            results: list[Tensor] = run(self.binding, encoded, read, batch_tokens, bar, head, marks)
            flat = torch.cat(results).cpu() if results else torch.empty(0, self.num_labels)
        # A clone made outside of inference mode is an ordinary tensor, which autograd may save.
        return list(flat.clone().split(counts))

    def _scale(self, normalize: Any) -> tuple[Tensor, Tensor]:
        """Mean and std of `normalize`, or "own" ones."""
        if isinstance(normalize, str) and normalize == "own":
            normalize = getattr(self.binding.program, "normalization", None)
            if normalize is None:
                raise ValueError(
                    'Expected (mean, std): the model brings no mean and std of its own for normalize="own"'
                )
        return checked_normalization(normalize, self.num_labels)

    def corrected(self, rewards: Tensor, encoded: list[Encoded]) -> Tensor:
        """Rewards (N, K) less what the length corrections among `interventions` take off for each input's response."""
        if self.interventions is None or not self.interventions.lengths:
            return rewards
        characters = [self._characters(item, i) for i, item in enumerate(encoded)]
        off = sum(correction.expected(characters) for correction in self.interventions.lengths)
        return rewards - torch.as_tensor(off, dtype=rewards.dtype)[:, None]

    def _characters(self, item: Encoded, index: int) -> int:
        if item.characters is not None:
            return item.characters
        if self.tokenizer is None:
            raise InputError(index, "a correction by length needs its characters: give text, or the model a tokenizer")
        return len(self.tokenizer.decode(item.ids.tolist(), skip_special_tokens=True))

    def packed_engine(self) -> Engine | str:
        """The packed engine of the model as it is now, or why there is none."""
        if torch.is_autocast_enabled(self.binding.device.type):
            return "autocast is on, whose choice of dtypes is the modules' own"
        with lock_of(self.binding.root), on_the_host():  # a run in another thread has the modules' forwards replaced
            parts = self._parts()
            if self._engine is None or not self._is_as_tried(parts):  # new, or changed since (modules replaced, hooks)
                engine: Engine | str
                try:
                    engine = Engine(self.binding, self._pads, self.cuda_graphs)
                except Unsupported as reason:
                    engine = str(reason)
                self._engine = parts, self._settings(engine), engine
            return self._engine[2]

    @property
    def _pads(self) -> bool:
        return self.binding.device.type == "cpu" if self.invariant is None else self.invariant

    def moves(self) -> str | None:
        """Why a text's reward may have other bits beside other texts; None where a self-test says that it has not."""
        return self._moves(self.packed_engine())

    def _moves(self, engine: Engine | str | None) -> str | None:
        if not isinstance(engine, Engine):
            return "padded runs" if engine is None else f"padded runs: {engine}"
        return getattr(self.binding.program, "moves", None) or engine.moves()

    def expect_invariance(self, engine: Engine | str | None) -> None:
        """ValueError where texts must have the same bits in any batch, and may not have in runs of this engine.

        engine: None, or the reason why there is none, for padded runs and the model's own layers with hooks. Not inside
            of a session.
        """
        if self.invariant and (moves := self._moves(engine)):
            raise ValueError(f"Expected invariant=False: rewards may move with their batch here, {moves}")

    def uncaptured(self, engine: Engine | str | None) -> str | None:
        """Why runs can't be captured in CUDA graphs, engine as for `expect_invariance`; None where they can."""
        if not isinstance(engine, Engine):
            return "padded runs have a shape each" + (f" (not packed: {engine})" if engine else "")
        return engine.uncaptured()

    def _parts(self) -> tuple:
        """The body's modules, and what would make them run otherwise than they are: a key for its engine."""
        return tuple(
            (module, has_hooks(module), module.__dict__.get("forward"), type(module).forward)
            for module in modules_of(self.binding.body)
        )

    def _settings(self, engine: Engine | str) -> list[Any]:
        """What the engine has taken from the model: scales, windows, dtype, whether it lies on the CPU."""
        held = [*settings_of(self.binding.config), self.binding.stored, self.binding.device.type == "cpu"]
        if isinstance(engine, str):
            return held
        return [*held, *settings(engine.layers), *(leaf for module in engine.replaced for leaf in settings_of(module))]

    def _is_as_tried(self, parts: tuple) -> bool:
        """Whether the model is as the engine was made for; `parts` are its own now."""
        assert self._engine is not None
        tried, held, engine = self._engine
        return tried == parts and same_settings(held, self._settings(engine))

    def moved(self, binding: Binding, copies: Mapping[nn.Module, nn.Module] | None = None) -> Self:
        """The scorer of the same model under another binding, or of `copies` of its modules with other weights."""
        made = copy.copy(self)
        made.binding, made._engine = binding, None
        if self._engine is not None and self._is_as_tried(self._parts()):
            engine = self._engine[2]
            engine = engine if isinstance(engine, str) else engine.moved(binding, copies)
            made._engine = made._parts(), made._settings(engine), engine
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Without the engine, which is made anew on the machine and device that this is unpickled on."""
        return {**self.__dict__, "_engine": None}

    def __copy__(self) -> Self:
        """With the engine, which belongs to the model."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A scorer of a copy of the model, made while no other thread scores with it, which would leave its traces."""
        with lock_of(self.binding.root):
            made = memo[id(self)] = copy.copy(self)
            made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        if made.base is not None:  # parts of theirs are the same (`intervened`)
            share_lock(made.base.binding.root, made.binding.root)
        return made

    def expect_clamps_alone(self, positions: tuple[str, ...] = ("last", "all")) -> None:
        """ValueError under interventions that what is read in the model's layers would not show."""
        for part in () if self.interventions is None else self.interventions.parts:
            if getattr(part, "positions", None) not in positions:
                raise ValueError(
                    f"Expected a model under no interventions but clamps at {' or '.join(positions)} positions, got "
                    f"{part}: the runs that are read here would not show it"
                )

    def default_batch_tokens(self, engine: Engine | None) -> int:
        """Rows of a batch: as many as pay, and fit into free memory."""
        most = _BATCH_TOKENS.get(self.binding.device.type, _BATCH_TOKENS_ACCELERATOR)
        most *= 2 if self.binding.device.type == "cpu" and self.binding.width <= _TINY else 1
        return most if engine is None else min(most, engine.affordable_tokens())

    def explain(self) -> str:
        """Which engine scores this model and why, and which backend runs each op on its device."""
        packed = self.packed_engine()
        problem = self.uncaptured(packed) if self.cuda_graphs else None
        graphs = f"no run, since {problem}" if problem else "one for each shape of chunk" if self.cuda_graphs else None
        return explained(self.binding, packed, graphs, self.moves())

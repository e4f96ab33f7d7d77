"""TRL: a RewardTrainer with the losses of `rmfast.losses`, and reward models as reward functions of GRPO and RLOO."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rmfast import arguments, losses
from rmfast.binding.find import bind
from rmfast.engine.scorer import Scorer
from rmfast.integrations.completions import records
from rmfast.texts.chat import Chat
from rmfast.texts.forms import Forms
from rmfast.texts.inputs import InputError, encode, ids_of
from rmfast.training.values import common_prefix

try:
    import trl
    from datasets import Dataset
except ImportError as error:
    raise ImportError('rmfast.integrations.trl needs TRL: pip install "rmfast[trl]"') from error

__all__ = ["RewardConfig", "RewardTrainer", "rmfast_reward"]

LOSSES = ("bt", "tcrm", "crm", "tcrm+crm")
_STARTS = ("chosen_start", "rejected_start")


@dataclass
class RewardConfig(trl.RewardConfig):
    """TRL's RewardConfig, and which loss is trained.

    Attributes:
        loss: "bt" (TRL's own), "tcrm", "crm" or "tcrm+crm".
        smooth, lookahead, reduction: of TCRM, as for `rmfast.losses.tcrm_loss`.
        crm_weight: λ, the weight of `rmfast.losses.binned_mmd`, at least 0.
        factor: the spurious factor of CRM: numbers in the dataset's columns chosen_<factor> and rejected_<factor>.
            "length", where there are no such columns, is the number of the response's tokens.
        bins: the factor is cut into this many bins, quantiles of the training set; one of no more values than that has
            a bin for each.
        bin_edges: or at these numbers, in rising order; a streamed training set, whose quantiles aren't known, needs
            them.
        conditional: compare bins among the chosen and among the rejected responses, not among all together.
        bandwidth, unbiased: as for `rmfast.losses.binned_mmd`; bandwidth 0 is its "median".
    """

    loss: str = field(default="bt", metadata={"help": "bt, tcrm, crm or tcrm+crm"})
    smooth: float = field(default=0.1, metadata={"help": "TCRM: weight of the smoothness term"})
    lookahead: float = field(default=0.01, metadata={"help": "TCRM: weight of the lookahead term"})
    reduction: str = field(default="sum", metadata={"help": "TCRM: sum or mean over the tokens of a response"})
    crm_weight: float = field(default=1.0, metadata={"help": "CRM: weight of the MMD between bins"})
    factor: str = field(default="length", metadata={"help": "CRM: columns chosen_<factor> and rejected_<factor>"})
    bins: int = field(default=10, metadata={"help": "CRM: number of quantile bins"})
    bin_edges: list[float] | None = field(default=None, metadata={"help": "CRM: where bins end, in place of quantiles"})
    conditional: bool = field(default=False, metadata={"help": "CRM: chosen and rejected responses separately"})
    bandwidth: float = field(default=0.0, metadata={"help": "CRM: of the kernel; 0 is the median heuristic"})
    unbiased: bool = field(default=False, metadata={"help": "CRM: the unbiased estimator"})

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.word("loss", self.loss, LOSSES)
        arguments.word("reduction", self.reduction, losses.REDUCTIONS)
        arguments.instance("factor", self.factor, str)
        arguments.whole("bins", self.bins, 1)
        for name in ("smooth", "lookahead", "crm_weight", "bandwidth"):
            arguments.number(name, getattr(self, name), 0)
        for name in ("conditional", "unbiased"):
            arguments.flag(name, getattr(self, name))
        if self.bin_edges is not None and not (np.diff(arguments.finite("bin_edges", self.bin_edges, "n")) >= 0).all():
            raise ValueError(f"Expected bin_edges to rise, got {self.bin_edges}")


class RewardTrainer(trl.RewardTrainer):
    """TRL's RewardTrainer with `loss="tcrm"`, `"crm"` or both; `"bt"` is TRL's own loss.

    Arguments are TRL's, with `args` a `RewardConfig` of this module; so are checkpoints, resuming and PEFT. The model
    runs once a step, as for TRL: its head is applied to every token anyway, and the values are taken from there.

    What is trained on is what the trained model scores, token for token: the texts of a row are encoded as
    `RewardModel.score` encodes (prompt, chosen) and (prompt, rejected), strings with format="concat". Unlike TRL, that
    ends a string in EOS only where the tokenizer does.

    Where a response starts: at the dataset's columns chosen_start and rejected_start (an index of chosen_ids and
    rejected_ids) if it has them; else where its tokens first differ from those of the prompt alone, where there is a
    prompt column; else where chosen and rejected first differ. It ends at the token that the model's own score is read
    at, the last one that is no padding.

    Logged beside TRL's metrics: bradley_terry, smoothness and lookahead (before their weights), middle_accuracy (read
    halfway through the responses), and mmd.

    Raises:
        TypeError: args is no RewardConfig of this module.
        ValueError: "tcrm" for a model whose tokens see those behind them, or whose head is not applied to each token;
            quantiles of a streamed dataset; a factor that the dataset lacks.
    """

    args: Any  # to TRL a TrainingArguments
    model: Any

    def __init__(self, model: Any, args: RewardConfig | None = None, *rest: Any, **kw: Any) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = RewardConfig(f"{name.split('/')[-1]}-Reward")
        if not isinstance(args, RewardConfig):
            raise TypeError(
                f"Expected args to be a rmfast.integrations.trl.RewardConfig, got {type(args).__module__}."
                f"{type(args).__name__}"
            )
        super().__init__(model, args, *rest, **kw)
        if args.loss == "bt":
            return
        columns = None
        if _has(args, "crm"):
            columns = _factor_columns(args)
            self._edges = torch.tensor(args.bin_edges) if args.bin_edges is not None else self._quantiles(columns)
        if _has(args, "tcrm"):
            self._values = _Values(self.model)
        self.data_collator = _Collator(self.data_collator, columns)

    def _quantiles(self, columns: tuple[str, str]) -> Tensor:
        data = self.train_dataset
        if not isinstance(data, Dataset):
            raise ValueError(f"Expected bin_edges for a streamed dataset, a {type(data).__name__}, got None")
        z = torch.tensor([x for column in columns for x in data[column]], dtype=torch.float32)
        bins = losses.bin_factor(z, self.args.bins)
        return torch.stack([z[bins == b].min() for b in bins.unique()[1:]]) if (bins > 0).any() else z[:0]

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        columns = next(iter(dataset))
        # By the caller, from a prompt that nobody can tell; chosen_input_ids is TRL's older name.
        tokenized = not columns.keys().isdisjoint(("chosen_ids", "chosen_input_ids"))
        workers = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        if not tokenized:
            # Not by TRL, which ends strings in an EOS that no tokenizer adds when the trained model is to score them.
            with args.main_process_first():
                dataset = dataset.map(_encoded, with_indices=True, fn_kwargs={"tokenizer": processing_class}, **workers)
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if args.loss == "bt":
            return prepared

        def describe(example: dict[str, Any]) -> dict[str, Any]:
            chosen, rejected = example["chosen_ids"], example["rejected_ids"]
            starts: list[Any] = [example.get(name) for name in _STARTS]
            if None in starts:
                prompt = None if tokenized else _prompt_ids(processing_class, example)
                shared = [
                    common_prefix(a if prompt is None else prompt, b)
                    for a, b in ((rejected, chosen), (chosen, rejected))
                ]
                starts = [min(start, len(ids) - 1) for start, ids in zip(shared, (chosen, rejected))]
            row = dict(zip(_STARTS, starts))
            if _has(args, "crm"):
                for name, ids, start in zip(_factor_columns(args), (chosen, rejected), starts):
                    row[name] = _number(example, name, len(ids) - start if args.factor == "length" else None)
            return row

        with args.main_process_first():
            return prepared.map(describe, **workers)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns += [name for name in (*_STARTS, *_factor_columns(self.args)) if name not in columns]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        args = self.args
        if args.loss == "bt":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        start, factor = inputs.pop("response_start"), inputs.pop("factor", None)
        logged: dict[str, Tensor] = {}
        if _has(args, "tcrm"):
            with self._values.taken() as taken:
                _, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            loss, terms = self._tcrm(taken[0], inputs, start, logged)
            logged.update(terms)
            if args.center_rewards_coefficient is not None:
                both = sum(outputs.logits.squeeze(-1).chunk(2))
                loss = loss + args.center_rewards_coefficient * both.square().mean()
        else:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if factor is not None:
            rewards = outputs.logits.squeeze(-1).float()
            half = rewards.size(0) // 2
            mmd = losses.binned_mmd(
                rewards,
                torch.bucketize(factor, self._edges.to(factor), right=True),
                bandwidth=args.bandwidth or "median",
                unbiased=args.unbiased,
                groups=torch.arange(2 * half, device=rewards.device) // half if args.conditional else None,
                gather=self.accelerator.num_processes > 1,
            )
            loss = loss + args.crm_weight * mmd
            logged["mmd"] = mmd.detach()
        mode = "train" if self.model.training else "eval"
        for name, value in logged.items():
            self._metrics[mode][name].append(self.accelerator.gather_for_metrics(value).mean().item())
        return (loss, outputs) if return_outputs else loss

    def _tcrm(
        self, values: Tensor, inputs: dict[str, Any], start: Tensor, logged: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        args, ids = self.args, inputs["input_ids"]
        if values.numel() != ids.numel():
            raise ValueError(f"Expected the head to be applied to all {tuple(ids.shape)} tokens, got {values.shape}")
        values = values.reshape(ids.shape)
        first, last = _response(ids, inputs["attention_mask"], start, self.model.config.get_text_config().pad_token_id)
        # Padded as they are: the loss reads a response's tokens alone, and packing them would copy both ways.
        place = torch.arange(ids.size(1), device=ids.device)
        mask = (place >= first[:, None]) & (place <= last[:, None])
        middle = values.detach().gather(1, (first + last)[:, None] // 2)[:, 0]
        logged["middle_accuracy"] = (torch.gt(*middle.chunk(2))).float().mean()
        return losses.tcrm_loss(
            *values.chunk(2), *mask.chunk(2), smooth=args.smooth, lookahead=args.lookahead, reduction=args.reduction,
            margin=inputs.get("margin"),
        )  # fmt: skip


class _Values:
    """The head's output at every token, taken while the model runs as whatever wraps it (DDP, FSDP, PEFT) runs it."""

    def __init__(self, model: nn.Module) -> None:
        bound = bind(model)
        if not bound.head or not bound.causal:
            raise ValueError(
                f'Expected a model with a value at each token that sees none behind it for loss="tcrm", got '
                f"{type(bound.root).__name__}"
            )
        self.root, self.name = bound.root, bound.head_names[-1]
        self.found: list[Tensor] = []

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.found.append(out)

    @contextmanager
    def taken(self) -> Iterator[list[Tensor]]:
        # A hook for the time of a step alone: left in place it would keep `RewardModel` from the fused head.
        handle = self.root.get_submodule(self.name).register_forward_hook(self)
        try:
            yield self.found
        finally:
            handle.remove()
            self.found = []


@dataclass
class _Collator:
    """Adds response_start, and the factor, (2 B,): of the chosen responses, then of the rejected ones."""

    inner: Callable[[list[dict[str, Any]]], dict[str, Any]]
    factor: tuple[str, str] | None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        def both(columns: tuple[str, str]) -> list[Any]:
            return [example[column] for column in columns for example in examples]

        batch = self.inner(examples)
        batch["response_start"] = torch.tensor(both(_STARTS))
        if self.factor is not None:
            batch["factor"] = torch.tensor(both(self.factor), dtype=torch.float32)
        return batch


def _response(ids: Tensor, mask: Tensor, start: Tensor, pad: int | None) -> tuple[Tensor, Tensor]:
    """First and last place of each response in its row, (2 B,), wherever the padding is."""
    place = torch.arange(ids.size(1), device=ids.device)
    # The rightmost token that is no padding, as sequence classification reads it: where padding is EOS, a closing EOS
    # is not the token that is read, and a loss on its value would train what no score ever shows.
    real = mask.bool() if pad is None else ids != pad
    last = torch.where(real, place, 0).amax(1)
    return torch.minimum(mask.int().argmax(1) + start, last), last


def _has(args: RewardConfig, part: str) -> bool:
    return part in args.loss.split("+")


def _factor_columns(args: RewardConfig) -> tuple[str, str]:
    return f"chosen_{args.factor}", f"rejected_{args.factor}"


def _number(example: dict[str, Any], name: str, default: int | None) -> float:
    if name not in example and default is None:
        raise ValueError(f"Expected the dataset to have a column {name}, got {', '.join(example)}")
    value = example.get(name, default)
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise ValueError(f"Expected numbers in the dataset's column {name}, got {value!r}")
    return number


def _prompt_ids(tokenizer: Any, example: dict[str, Any]) -> Any:
    prompt = example.get("prompt")
    return None if prompt is None else ids_of(Forms(Chat(tokenizer).of(example), True).opening(prompt), tokenizer)


def _encoded(example: dict[str, Any], row: int, tokenizer: Any) -> dict[str, list[int]]:
    """The ids of both texts of a row, as `RewardModel.score` has them; strings without a template."""
    own = {name: example.get(name) for name in ("prompt", "tools", "chat_template_kwargs")}
    sides = [{**own, "response": example[side]} for side in ("chosen", "rejected")]
    # Ids that the embedding lacks are the model's to refuse, which may not be there yet.
    found = encode(sides, tokenizer, causal=True, vocab_size=sys.maxsize, format="concat", errors="return")
    for side, item in zip(("chosen", "rejected"), found):
        if isinstance(item, InputError):
            raise ValueError(f"row {row} of the dataset, {side}: {item.reason}") from item
    return {"chosen_ids": found[0].ids.tolist(), "rejected_ids": found[1].ids.tolist()}


def rmfast_reward(rm: Any, *, name: str = "rmfast_reward", **score: Any) -> Callable[..., list[float]]:
    """A reward function for TRL's GRPOTrainer and RLOOTrainer: `reward_funcs=rmfast_reward(rm)`.

    Args:
        rm: a `rmfast.RewardModel` of one label. TRL neither moves nor trains it.
        name: what TRL logs the reward as.
        **score: arguments of `rm.score`: batch_tokens, max_length, truncation, normalize, format, engine,
            chat_template_kwargs, tools.

    Returns:
        A function of prompts and completions, both strings or both lists of messages, that gives a reward for each.
        The dataset's columns tools and chat_template_kwargs go to the chat template, as RewardTrainer's do.
        As TRL does with reward models of its own, strings are scored as prompt + completion, whatever chat template
        there is (`format="chat"` makes turns of them), and messages by the model's chat template. Unlike TRL's, strings
        get the special tokens that their tokenizer adds (BOS), as RewardTrainer trains them.

    Raises:
        ValueError: the model has several labels.
    """
    if arguments.instance("rm", rm, Scorer).num_labels != 1:
        raise ValueError(f"Expected rm to have one label, got {rm.num_labels}")
    score = {"format": "concat", **score}

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        return rm.score(records(prompts, completions, columns), **score).tolist()

    reward.__name__ = name
    return reward

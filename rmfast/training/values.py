"""A reward model as its own critic: values of a response's tokens, and advantages by GAE over ragged sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmfast.arguments import finite, number, sequence, wholes
from rmfast.ops._library import expect, readable
from rmfast.plots import shown_table
from rmfast.texts.chat import Chat
from rmfast.texts.forms import Forms
from rmfast.texts.inputs import InputError, check_inputs, ids_of, listed
from rmfast.training.losses import expect_tensor, ragged, wide


@dataclass(frozen=True, eq=False)
class ResponseValues:
    """What `RewardModel.values_and_reward` gives: flat tensors over the tokens of all responses, one behind the other.

    Attributes:
        values: (N,), of each response token the value of the state in which it was chosen: read one token before it.
        rewards: (N,), per token: 0 but for the last, which has the response's reward, plus what the caller gave.
        advantages: (N,), by GAE.
        returns: (N,), advantages + values.
        cu_seqlens: int64 (B + 1,): 0, then the responses' ends.
        reward: (B,), of each response: what `score` gives.
        response_start: int64 (B,), the index of a response's first token in its text's `encode(...)[b].ids`.
    """

    values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    cu_seqlens: Tensor
    reward: Tensor
    response_start: Tensor

    def _repr_html_(self) -> str:
        """For notebooks: a row for each response, of at most 50."""
        names = ("response", "start", "tokens", "reward", "first value", "last value")
        rows = [
            (i, int(start), len(values), float(reward), *(float(values[at]) if len(values) else nan for at in (0, -1)))
            for i, (start, values, reward) in enumerate(
                zip(self.response_start[:50], self.split(self.values), self.reward)
            )
        ]
        return shown_table(names, rows, f"{len(self.reward)} responses, {len(self.values)} tokens")

    def split(self, flat: Tensor) -> list[Tensor]:
        """One of the flat tensors as a list, a tensor for each response."""
        expect_tensor(flat, "flat")
        tokens = len(self.values)
        expect(flat.dim() > 0 and len(flat) == tokens, "flat", f"of {tokens} tokens", tuple(flat.shape))
        return list(flat.split(self.cu_seqlens.diff().tolist()))


def gae(
    values: Tensor, rewards: Tensor, cu_seqlens: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438) over ragged sequences, which end where they end.

        δ_t = rewards_t + γ values_{t+1} − values_t,   A_t = Σ_{l≥0} (γλ)^l δ_{t+l}

    with a value of 0 behind a sequence's last token. The sum is taken by doubling: log2 of the longest sequence passes
    over all tokens, so that nothing is padded and no step waits for the one behind it.

    Args:
        values: (N,), of the state in which each token was chosen, all sequences one behind the other; float64,
            float32, bfloat16 or float16.
        rewards: (N,), of each token; any of these dtypes.
        cu_seqlens: int32 or int64 (B + 1,): 0, then the sequences' ends, the last of them N. They may be empty.
        gamma: the discount γ, from 0 to 1.
        lam: λ, from 0 (one step) to 1 (Monte Carlo).

    Returns:
        Advantages (N,) and returns (N,), their sum with the values; float32 (float64 where an input is), detached. A
        NaN reaches the tokens before it in its own sequence only.

    Raises:
        ValueError: a shape, device, gamma or lam that does not fit; cu_seqlens that fall or don't end at N.
        TypeError: a dtype that is not supported, or an argument that is no tensor.
    """
    values, rewards = wide(values, "values").detach(), wide(rewards, "rewards").detach()
    expect(values.dim() == 1, "values", "of shape (N,)", tuple(values.shape))
    expect(rewards.shape == values.shape, "rewards", f"of shape {tuple(values.shape)}", tuple(rewards.shape))
    expect_tensor(rewards, "rewards", values)
    expect_tensor(cu_seqlens, "cu_seqlens", values)
    gamma, lam = number("gamma", gamma, 0, 1), number("lam", lam, 0, 1)
    first, end = ragged(values.shape, cu_seqlens, "cu_seqlens")
    lengths = end - first
    if readable(cu_seqlens):
        expect(bool((lengths >= 0).all()), "cu_seqlens", "rising", cu_seqlens.tolist())
    dtype = torch.promote_types(values.dtype, rewards.dtype)
    values, rewards = values.to(dtype), rewards.to(dtype)
    n = values.size(0)
    left = torch.repeat_interleave(end, lengths, output_size=n) - torch.arange(n, device=values.device)
    following = torch.where(left > 1, values.roll(-1), 0)
    advantages = rewards + gamma * following - values
    # After the pass of `step`, a token has the terms of the 2 · step tokens from it on.
    step, scale, longest = 1, gamma * lam, int(lengths.max())
    while step < longest and scale > 0:
        advantages[:-step] += scale * torch.where(left[:-step] > step, advantages[step:], 0)
        step, scale = 2 * step, scale * scale
    return advantages, advantages + values


def values_and_reward(
    rm: Any,
    inputs: Sequence[Any],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    rewards: Sequence[Any] | None = None,
    response_start: Sequence[int] | None = None,
    batch_tokens: int | None = None,
    max_length: int | None = None,
    progress: bool = False,
    format: Any = None,
    chat_template_kwargs: Any = None,
    tools: Any = None,
    engine: Any = None,
) -> ResponseValues:
    """`RewardModel.values_and_reward`, which says what arguments and result are."""
    binding = rm.binding
    if rm.pools or not binding.causal or rm.num_labels != 1:
        raise ValueError(
            "Expected a causal model with a head of one label, which every token can be read with, got "
            f"{type(binding.root).__name__} with {rm.num_labels} labels"
        )
    gamma, lam = number("gamma", gamma, 0, 1), number("lam", lam, 0, 1)  # before the model runs
    items = listed(inputs) if callable(format) else check_inputs(inputs)
    encoded = rm.encode(
        items, max_length=max_length, format=format, chat_template_kwargs=chat_template_kwargs, tools=tools
    )
    if response_start is None:
        forms = Forms(Chat(rm.tokenizer, chat_template_kwargs, tools), True, format)
        starts = [_response_start(forms, item, i, items[i]) for i, item in enumerate(encoded)]
    else:
        starts = wholes("response_start", response_start, len(encoded))
    ends = [at + 1 for at in rm.positions(encoded)]
    for i, (start, end) in enumerate(zip(starts, ends)):
        if not 0 <= start < end:
            raise InputError(i, f"its response starts at token {start}, not among the {end} up to the one that is read")
    # From the token before the response, whose value is that of the state in which the first token was chosen.
    tokens = rm.token_values(encoded, batch_tokens=batch_tokens, progress=progress, engine=engine)
    found = [v[max(start - 1, 0) : end] for v, start, end in zip(tokens, starts, ends)]
    states = [v[:-1] if start else torch.cat((v[:1], v[:-1])) for v, start in zip(found, starts)]
    lengths = [end - start for start, end in zip(starts, ends)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    values = torch.cat(states) if states else torch.empty(0)
    reward = torch.stack([v[-1] for v in found]) if found else torch.empty(0)
    per_token = _given(rewards, lengths).to(values.dtype)
    per_token[cu_seqlens[1:] - 1] += reward
    advantages, returns = gae(values, per_token, cu_seqlens, gamma, lam) if encoded else (values, values)
    return ResponseValues(values, per_token, advantages, returns, cu_seqlens, reward, torch.tensor(starts).long())


def _given(rewards: Sequence[Any] | None, lengths: list[int]) -> Tensor:
    """What the caller adds to the rewards of all tokens, one text behind the other."""
    if rewards is None:
        return torch.zeros(sum(lengths))
    parts = sequence("rewards", rewards, f"a sequence of numbers for each of {len(lengths)} inputs", len(lengths))
    checked = [finite(f"rewards[{i}]", part, length) for i, (part, length) in enumerate(zip(parts, lengths))]
    return torch.from_numpy(np.concatenate(checked)) if checked else torch.zeros(0)


def common_prefix(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """How many leading tokens a and b share."""
    n = min(len(a), len(b))
    differ = np.asarray(a[:n]) != np.asarray(b[:n])
    return int(differ.argmax()) if differ.any() else n


def _response_start(forms: Forms, encoded: Any, index: int, item: Any) -> int:
    """The first token in which a text differs from its prompt alone (a template's assistant header is the prompt's)."""
    prompt = forms.prompt(item)
    if prompt is None:
        raise InputError(index, "it does not say where its response begins: give (prompt, response), or response_start")
    return common_prefix(encoded.ids, ids_of(prompt, forms.chat.tokenizer))

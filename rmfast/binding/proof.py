"""What a binding is held against: the model's own logits on a few tokens, with specials among them and states enlarged.

A reward is read at one token of a text and goes on from there; neither shows on ordinary tokens alone. A model that
reads before its first end token, or that bounds its logits, is found out here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rmfast.binding.binding import Binding
from rmfast.binding.modules import (
    active,
    call_arguments,
    entry_of,
    hidden_state_of,
    logits_of,
    plain_linear,
    text_config,
)
from rmfast.binding.norms import Call, gain_of
from rmfast.binding.session import of_this_thread, replaced_forward

_SPECIALS = ("pad", "bos", "eos", "sep", "cls", "decoder_start")
_MOST_SPECIALS = 8  # of a tokenizer's hundreds: those that the configuration names, and the first
_ENLARGED = 100.0  # times the hidden states: bounds on a reward (clamp, tanh) show; fp16 holds it


def special_ids(root: nn.Module) -> list[int]:
    """The special tokens that the model's configuration names."""
    found: list[Any] = []
    for name in _SPECIALS:
        value = getattr(text_config(root), f"{name}_token_id", None)
        found += value if isinstance(value, list | tuple) else [value]
    return list(dict.fromkeys(i for i in found if isinstance(i, int)))


def _last_but(ids: np.ndarray, pad: int | None) -> int:
    """As transformers does; of pads alone the first."""
    return len(ids) - 1 if ids[-1] != pad else int(np.append(0, np.flatnonzero(ids != pad))[-1])


# Where models read a text, by the name of the rule: of its ids, the pad token and the end tokens.
READINGS: dict[str, Callable[[np.ndarray, int | None, list[int]], int]] = {
    "last but pad": lambda ids, pad, ends: _last_but(ids, pad),
    "last": lambda ids, pad, ends: len(ids) - 1,
    "first end": lambda ids, pad, ends: int(np.append(np.flatnonzero(np.isin(ids, ends)), len(ids) - 1)[0]),
    "before pad": lambda ids, pad, ends: (int(np.append(np.flatnonzero(ids == pad), len(ids))[0]) - 1) % len(ids),
}


def reader(bound: Binding, rule: str | None = None) -> Callable[[np.ndarray], int]:
    """Where the model reads a text, by its rule or a given one: a function of its ids."""
    config, read = bound.config, READINGS[rule or bound.reading]  # 100 µs: not for each text
    pad, ends = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    found = ends if isinstance(ends, list) else [-1 if ends is None else ends]
    return lambda ids: read(ids, pad, found)


def record(
    model: nn.Module, root: nn.Module, ids: Tensor, names: Collection[str] | None = None
) -> tuple[list[Call], Any]:
    """Run the model on one text; every module's call (or those of some names), in the order in which they returned, and
    the output."""
    calls: list[Call] = []
    named = root.named_modules() if names is None else [(name, root.get_submodule(name)) for name in names]
    name_of = {module: name for name, module in named}

    def hook(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()), None)
        calls.append(Call(name_of[module], module, given, out))

    seen = of_this_thread(hook)
    with ExitStack() as stack:
        for module in name_of:
            stack.callback(module.register_forward_hook(seen, with_kwargs=True).remove)
        try:
            out = model(**call_arguments(root, ids, torch.ones_like(ids), None))
        except Exception as error:
            raise ValueError(
                f"{type(root).__name__} could not be run on {ids.numel()} tokens to find its parts: "
                f"{type(error).__name__}: {error}"
            ) from error
    return calls, out


def precision(calls: list[Call], own: Tensor) -> float:
    """The eps in which logits were made by the head's calls: under autocast coarser than that of their own dtype."""
    made = [own, *(call.result for call in calls if isinstance(call.result, Tensor))]
    return max(torch.finfo(x.dtype).eps for x in made if x.is_floating_point())


def agree(bound: Binding, values: Tensor, expected: Tensor, eps: float) -> bool:
    """Whether rewards (M, K) are the model's own logits, which were made in that precision.

    The same rows went into both, so only rounding differs: at most a few of the logits' last bits, or of TF32's.
    """
    tolerance = max(2e-3, 2 * eps) * reward_scale(bound, values)
    atol = tolerance if tolerance < torch.inf else 0.0  # weights that are not finite: rewards are NaN, as the logits
    return torch.allclose(values, expected.to(values).reshape(values.shape), rtol=0.0, atol=atol, equal_nan=True)


def reward_scale(bound: Binding, values: Tensor) -> float:
    """How large rewards of this head can get: the reward scale ‖γ⊙w‖ of a linear head, else the largest value seen."""
    linear = plain_linear(bound.head)
    largest = float(values.detach().abs().max())
    if linear is None or bound.norm_kind is None:
        return largest
    weight = gain_of(active(bound.norm)) if bound.norm is not None else None
    w = linear.weight.float()
    if weight is not None:
        gain = weight.to(w)
        w = w * (1 + gain if bound.norm_kind in ("gemma_rms", "layer_1p") else gain)
    return max(largest, float(w.norm(dim=-1).max()))


def check_bounds(bound: Binding, ids: Tensor) -> bool:
    """Whether the head gives the model's logits (read at the last token, or all) on large hidden states, too."""

    def enlarge(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (_ENLARGED * args[0], *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: _ENLARGED * kwargs[name]}

    handle = bound.head[0].register_forward_pre_hook(of_this_thread(enlarge), with_kwargs=True)
    try:
        values, own, eps = _values(bound, ids)
    finally:
        handle.remove()
    return agree(bound, values if own.numel() == values.numel() else values[-1:], own, eps)


@contextmanager
def drawn_states(bound: Binding, given: Any) -> Iterator[None]:
    """Has the body give states drawn at random, as large as those in what it gave, in place of running its layers.

    How a model reads a text and bounds its rewards is in what it makes of the body's states, whichever they are; a run
    of the layers reads every weight. The rest of what the body gives is None: a model that looks at it stumbles.
    """
    states = hidden_state_of(given)
    seen = states[0].double().cpu()
    scale = seen[seen.isfinite().all(-1)].square().mean(0).sqrt()

    def forward(input_ids: Tensor, *args: Any, **kw: Any) -> Any:
        # No larger than the scale, so that what was finite is, enlarged too.
        drawn = torch.rand(*input_ids.shape, len(scale), dtype=scale.dtype, generator=torch.Generator().manual_seed(0))
        return type(given)(last_hidden_state=((2 * drawn - 1) * scale).to(states))

    with replaced_forward(bound.body, forward):
        yield


def find_reading(bound: Binding, ids: Tensor) -> None:
    """Tries the rules by which models read a token on texts with special tokens inside and at their ends.

    Sets `bound.reading`.

    Raises:
        ValueError: with pooling="auto" the model's own code reads by none of them.
    """
    words, pooling = ids[0].tolist(), bound.pooling
    if isinstance(pooling, int):
        text = ids.new_tensor([[*words[:2], pooling, *words[2:4], pooling, words[4]]])
        values, own, eps = _values(bound, text)
        first, last = (agree(bound, values[i : i + 1], own, eps) for i in (2, 5))
        bound.reading = "first" if first and not last else "last"
        return
    if pooling != "auto":
        return
    named = [i for i in special_ids(bound.root) if 0 <= i < bound.vocab_size]
    known = list(dict.fromkeys([*named, *(i for i in bound.avoid if 0 <= i < bound.vocab_size)]))[:_MOST_SPECIALS]
    inside = [words[0], *known, words[1], *known, words[2]]
    rules = list(READINGS)
    for tokens in (inside, [*inside, *known, *known[:1]], *([*words[:3], i] for i in named)):
        values, own, eps = _values(bound, ids.new_tensor([tokens]))
        at = {rule: reader(bound, rule)(np.array(tokens)) for rule in rules}
        rules = [rule for rule in rules if agree(bound, values[at[rule] :][:1], own, eps)]
        if not rules:
            raise ValueError(
                f"{type(bound.root).__name__} reads {tokens}, a text with special tokens {known}, at none of "
                f'the tokens where pooling="auto" looks: {at}. Give "last", or the id of the token at which it reads'
            )
    bound.reading = rules[0]


def _values(bound: Binding, ids: Tensor) -> tuple[Tensor, Tensor, float]:
    """Rewards (T, K) that the head gives at each token of one text (1, T), the model's own logits and their eps."""
    parts = [bound.body_name, *bound.head_names]
    calls, out = record(entry_of(bound.outermost, bound.root), bound.root, ids, parts)
    own = logits_of(out)
    assert own is not None
    states = next(hidden_state_of(call.result) for call in calls if call.name == bound.body_name)
    eps = precision([call for call in calls if call.name in bound.head_names], own)
    values = bound.apply_head(states.to(next((p.dtype for p in bound.head[0].parameters()), states.dtype)))
    return values.reshape(ids.numel(), -1), own, eps

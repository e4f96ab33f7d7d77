"""Binding to a transformers model: its body, final norm and head, found by following the tensors of one tiny forward.

No class names are listed. The model is run once on a few tokens with hooks that record what every module took and gave:

- the *body* is the outermost module that returns a `last_hidden_state`;
- the *final norm* is the module whose output is that hidden state, and its kind is whichever formula reproduces it;
- the *head* is the chain of modules after the body that turns the hidden state into the logits.

What was found is then run in place of the model's own forward and must give its logits, also of texts with special
tokens inside and of large hidden states (`rmfast.binding.proof`), so a model with rules of its own (gates, logit
scaling, another pooling) is refused when it is bound rather than scored wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.backends import BackendError
from rmfast.binding.binding import Binding
from rmfast.binding.modules import (
    PASSIVE,
    active,
    calls_of,
    entry_of,
    expect_bare_compiled,
    hidden_state_of,
    input_embedding,
    is_untouched,
    logits_of,
    settings_of,
    unwrap,
)
from rmfast.binding.norms import Call, norm_kind
from rmfast.binding.proof import agree, check_bounds, drawn_states, find_reading, precision, record, special_ids
from rmfast.binding.refusals import expect_own_attention, rule_of
from rmfast.binding.rope import kept_rope, rope_modules
from rmfast.binding.session import eval_mode, lock_of, on_the_host, uncompiled_calls

_PROBE_TOKENS = 7
_CHANGED = 3  # of them, the last ones, by which it is tried whether earlier tokens see later ones
_ROUNDING = 1e-3  # of the distance of texts: beyond it padding is said to change rewards
_PROBES = 3  # tries at tokens whose logits are finite


def bind(model: nn.Module, pooling: str | int = "auto", avoid: tuple[int, ...] = (), program: Any = None) -> Binding:
    """Find a reward model's parts.

    Args:
        model: a transformers model with a reward head; may be wrapped by peft or torch.compile.
        pooling: as for `rmfast.RewardModel`; a token id is put last in the probe.
        avoid: special token ids kept out of the probe for parts, and put into that for the reading rule.
        program: a head (`rmfast.heads.Head`) in place of the model's own, which may be a bare body.

    Raises:
        ValueError: no body or head was found, or they do not reproduce the model's own logits.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected model to be a torch.nn.Module, got {type(model).__name__}")
    root = unwrap(model)
    expect_bare_compiled(model)
    with (
        lock_of(root),
        on_the_host(),
        torch.inference_mode(),
        eval_mode(root),
        kept_rope(rope_modules(root)),
        uncompiled_calls(model),
    ):
        return _bind(root, model, pooling, avoid, program)


def _bind(root: nn.Module, outermost: nn.Module, pooling: str | int, avoid: tuple[int, ...], program: Any) -> Binding:
    if not callable(getattr(root, "get_input_embeddings", None)):
        raise ValueError(
            f"{type(root).__name__} is not a transformers model: rmfast looks for get_input_embeddings(), a body that "
            "returns last_hidden_state, and a head"
        )
    expect_own_attention(root)
    where = f"{type(root).__name__} (top-level modules: {', '.join(name for name, _ in root.named_children())})"
    embedding = input_embedding(root)
    if embedding is None:
        raise ValueError(f"No input embedding found in {where}: neither it nor a part of it names one")
    vocab_size = int(getattr(embedding, "num_embeddings", 0) or embedding.weight.shape[0])
    read_id = pooling if isinstance(pooling, int) else None
    if read_id is not None and not 0 <= read_id < vocab_size:
        raise ValueError(f"Expected pooling to be a token id in [0, {vocab_size}), got {read_id}")
    device = torch.device("cpu") if embedding.weight.device.type == "meta" else embedding.weight.device
    for shift in range(_PROBES):
        ids = probe_ids(root, vocab_size, read_id, avoid, shift).to(device)
        calls, own = record(entry_of(outermost, root), root, ids)
        if (seen := logits_of(own)) is None or seen.isfinite().all():
            break
    else:
        if all(p.isfinite().all() for p in root.parameters() if p.is_floating_point() and not p.is_meta):
            dtype = str(next(p.dtype for p in root.parameters() if p.is_floating_point())).removeprefix("torch.")
            raise ValueError(
                f"The logits of {type(root).__name__} are not finite on ordinary tokens, although its weights are, so "
                f"that its parts can't be told: its activations overflow in {dtype}. Give it another dtype, bfloat16 "
                "or float32"
            )

    body = _find_body(calls)
    bare = body is None and getattr(own, "last_hidden_state", None) is not None
    if bare and program is not None:
        body = calls[-1]
    elif bare:
        raise ValueError(
            f"{type(root).__name__} is a body without a head: it returns hidden states, and no reward. Expected a "
            "model with a reward head, as AutoModelForSequenceClassification makes it (or, where the head is in the "
            "checkpoint's own code, AutoModel with trust_remote_code=True)"
        )
    if body is None:
        raise ValueError(
            f"No body found in {where}: rmfast looks for a module inside it that returns last_hidden_state (B, T, d)"
        )
    logits = logits_of(own)
    if program is not None:
        logits = None if logits is None else logits.reshape(-1, logits.size(-1))
    elif logits is None:
        raise ValueError(
            f"No logits found in what {where} returns: rmfast looks for .logits, or a tensor, of shape (B, K) or "
            f"(B, T, K); got {type(own).__name__}"
        )
    elif logits.numel() > 4096 * _PROBE_TOKENS or logits.size(-1) == vocab_size:
        raise ValueError(
            f"{where} is a language model, not a reward model: its logits have shape {tuple(logits.shape)}. rmfast "
            "looks for a head with a few outputs (sequence or token classification)"
        )
    states = hidden_state_of(body.result)
    norm = _find_norm(calls, body, states)
    chain = None if program is not None else _find_head(calls, body, states)
    bound = Binding(
        find=bind,
        root=root,
        body_name=body.name,
        norm_name=None if norm is None else norm.name,
        head_names=[],
        num_labels=0,
        causal=True,
        width=states.size(-1),
        outermost=outermost,
        pooling=pooling,
        avoid=avoid,
        reading="last but pad" if pooling == "auto" else "last",
    )
    bound.tried_forward = bound.own_forward()
    if norm is not None:
        used = active(norm.module)
        bound.tried_norm = (used, *calls_of(used)), settings_of(used), norm_kind(norm)
    # One more tiny run, of the body as it will be run: the probe, and the probe with other tokens at its end, before
    # which the hidden states tell a decoder from an encoder.
    other = ids.clone()
    other[0, _PROBE_TOKENS - _CHANGED :] = ids[0, :_CHANGED]
    both = torch.cat([ids, other])
    hidden = bound.hidden(both, torch.ones_like(both))
    rows = norm.given if norm is not None and bound.leaves_norm_out else states
    if norm is not None and not _near(hidden[:1], rows):
        # Leaving it out changes more than the last step, as where one norm serves several places.
        bound.norm_name, rows = None, states
    bound.causal = _is_causal(bound, both, hidden)
    if program is not None:
        bound = _with_program(bound, program, rows, logits)
        bound.padded = bound.causal or _padding_error(bound, ids, _last_rewards(bound)) <= _ROUNDING
        return bound
    assert logits is not None
    if chain is not None and _try_head(bound, chain, logits, rows):
        if logits.isfinite().all():
            _try_rules(bound, ids, logits, body)
        bound.padded = bound.causal or _padding_error(bound, ids, _last_rewards(bound)) <= _ROUNDING
        return bound
    bound.norm_name = None
    bound.head_names = []
    # Without rows to score, K is the model's own, and its own pooling must not depend on what shares the batch.
    bound.num_labels = logits.numel()
    if logits.dim() == 2 and logits.size(0) == 1 and not bound.causal:
        error = _padding_error(bound, ids, bound.pooled)
        bound.padded = error <= _ROUNDING
        if error <= 0.1:
            return bound
    tail = ", ".join(call.name for call in chain) if chain else "none that starts at the hidden state"
    rule = rule_of(_called_after(calls, body), states, logits)
    if rule is not None:
        raise ValueError(f"The head of {where} is not one that rmfast scores: {rule}")
    raise ValueError(
        f"The head of {where} is not one that rmfast knows: it looks for modules that turn each hidden state into its "
        f"logits (a Linear, or an MLP as one module), read at the last token, or for an encoder that pools by itself. "
        f"Body: {body.name}; final norm: {norm.name if norm else 'none'}; head: {tail}. Running these did not give the "
        "model's own logits"
    )


def _with_program(bound: Binding, program: Any, hidden: Tensor, logits: Tensor | None) -> Binding:
    """The binding with a program as its head, given the hidden states (1, T, d) of the probe, and a model's own logits
    (T, vocabulary)."""
    at = torch.arange(hidden.size(-2), device=hidden.device)
    rows = bound.normed(hidden, at)[0]
    bound.program = program.on(rows, logits if logits is not None and len(logits) == len(rows) else None)
    bound.num_labels = bound.program.num_labels
    if bound.pooling == "auto":
        bound.reading = program.reading
    return bound


def _try_rules(bound: Binding, ids: Tensor, logits: Tensor, body: Call) -> None:
    """ValueError for a rule of the model's own that the first probe can't show."""
    if is_untouched(body.module):
        try:
            with drawn_states(bound, body.result):
                return _try_rules_on_runs(bound, ids, logits)
        except Exception:  # the model looks at more than the states, or is refused: its own run tells
            pass
    _try_rules_on_runs(bound, ids, logits)


def _try_rules_on_runs(bound: Binding, ids: Tensor, logits: Tensor) -> None:
    if not check_bounds(bound, ids):
        raise ValueError(
            f"{type(bound.root).__name__} has a rule of its own behind its head ({', '.join(bound.head_names)}): on "
            "large hidden states it gives other logits, as where they are clamped"
        )
    if logits.numel() == bound.num_labels:  # of one token
        find_reading(bound, ids)


def probe_ids(root: nn.Module, vocab_size: int, read_id: int | None, avoid: tuple[int, ...], shift: int = 0) -> Tensor:
    """(1, T) distinct ordinary token ids; others for another shift."""
    special = {*avoid, *special_ids(root)}
    step = max(1, vocab_size // (_PROBE_TOKENS + 2))
    chosen: list[int] = []
    for i in (j % vocab_size for j in range(step + shift, step + shift + 8 * vocab_size, step + 1)):
        if i not in special and i not in chosen:
            chosen.append(i)
        if len(chosen) == _PROBE_TOKENS:
            break
    if len(chosen) < _PROBE_TOKENS:
        raise ValueError(f"Expected a vocabulary of at least {_PROBE_TOKENS} ordinary tokens, got {vocab_size}")
    if read_id is not None:
        chosen[-1] = read_id
    return torch.tensor([chosen])


def _find_body(calls: list[Call]) -> Call | None:
    found = [
        call
        for call in calls
        if call.name
        and isinstance(state := getattr(call.result, "last_hidden_state", None), Tensor)
        and state.dim() == 3
        and state.size(1) == _PROBE_TOKENS
        and callable(getattr(call.module, "get_input_embeddings", None))
    ]
    return min(found, key=lambda call: call.name.count("."), default=None)


def _find_norm(calls: list[Call], body: Call, states: Tensor) -> Call | None:
    """The call whose output is the body's, if its module is a norm: (1, T, d) -> (1, T, d). Outermost first, so that a
    wrapper that switches between norms (peft) is it."""
    inside = [call for call in calls if call.name.startswith(body.name + "." if body.name else "") and call is not body]
    for call in reversed(inside):
        module = active(call.module)
        if not isinstance(call.result, Tensor) or not _same(call.result, states) or isinstance(module, PASSIVE):
            continue
        if any(True for _ in module.children()) or not isinstance(call.given, Tensor):
            continue  # a layer that ends in its norm (BERT): the norm's own call is further back
        weight = getattr(module, "weight", None)
        per_feature = weight is None or tuple(weight.shape) == (states.size(-1),)
        return call if per_feature and call.given.shape == states.shape else None
    return None


def _called_after(calls: list[Call], body: Call) -> list[Call]:
    """The outermost modules called after the body."""
    done = next(i for i, call in enumerate(calls) if call is body)
    after = [call for call in calls[done + 1 :] if not (body.name + ".").startswith(call.name + ".") and call.name]
    names = {call.name for call in after}
    return [call for call in after if not any(call.name.startswith(name + ".") for name in names)]


def _find_head(calls: list[Call], body: Call, states: Tensor) -> list[Call] | None:
    """What was called after the body, as a chain from the hidden state; None where it has a gap."""
    tail = _called_after(calls, body)
    given: Tensor = states
    for call in tail:
        if not isinstance(call.given, Tensor) or not isinstance(call.result, Tensor):
            return None
        first = given is states
        if not (_same(call.given, given) or (first and _is_row(call.given, states))):
            return None
        given = call.result
    return tail or None


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    return a.numel() == b.numel() and torch.equal(a.reshape(-1).to(b.device, b.dtype), b.reshape(-1))


def _is_row(x: Tensor, states: Tensor) -> bool:
    """Whether x is one row of the hidden states, gathered before the head."""
    return x.numel() == states.size(-1) and any(_same(x, row) for row in states[0])


def _try_head(bound: Binding, chain: list[Call], logits: Tensor, hidden: Tensor) -> bool:
    """Whether norm and head, applied to each row, give the model's logits (at the last token); if so they are bound."""
    rows = torch.arange(_PROBE_TOKENS, device=hidden.device)
    bound.head_names = [call.name for call in chain]
    try:
        x = hidden
        if bound.leaves_norm_out and bound.norm is not None:
            x = bound.norm(x)
        out = bound.apply_head(x.reshape(1, _PROBE_TOKENS, -1))
        bound.num_labels = out.numel() // _PROBE_TOKENS
        if bound.num_labels == 0 or out.numel() % _PROBE_TOKENS:
            return False
        values = bound.rewards(hidden, rows)
    except BackendError:  # it says what was asked for, and nothing of the head
        raise
    except (RuntimeError, IndexError, TypeError, ValueError):
        return False  # not a head for rows: it picks tokens by itself
    expected = logits.to(values)
    if logits.numel() == values.numel():
        expected = expected.reshape(values.shape)
    elif logits.numel() == bound.num_labels:
        values = values[-1:]
        expected = expected.reshape(1, -1)
    else:
        return False
    return agree(bound, values, expected, precision(chain, logits))


def _near(a: Tensor, b: Tensor) -> bool:
    """Whether two runs of the model agree. A wrong run is off by the whole; low precision, and quantised activations
    whose scales depend on what shares the batch, by a few percent. Rows that are not finite tell nothing."""
    a, b = (x.double().to(a.device).reshape(-1, x.size(-1)) for x in (a, b))
    finite = b.isfinite().all(-1)
    return bool((a[finite] - b[finite]).norm() <= 0.1 * b[finite].norm())


def _is_causal(bound: Binding, both: Tensor, hidden: Tensor) -> bool:
    """Whether the states of two texts (2, T) are the same before the tokens in which they differ, as a decoder's are.

    But for rounding: at other rows of the batch, with other tokens beside it at its experts, a BLAS may add up in
    another order (12 layers of Mixtral in fp32: 3 eps). In 16 bits an encoder's need not differ by more than that, as
    where it has just been initialised. There a text is held against the other in the same place of a batch, where a
    decoder's states have the same bits, or (experts) move as they do when only the other text of the batch changes.
    """
    same = both.size(1) - _CHANGED
    finite = hidden[:, :same].isfinite().all(-1).all(0)  # the first token's may overflow where others' do not

    def states(first: Tensor, second: Tensor) -> Tensor:
        two = torch.stack([first, second])
        return bound.hidden(two, torch.ones_like(two))[0, :same][finite].double()

    a, b = hidden[:, :same][:, finite].double()
    if not len(a):
        return False
    change = (a - b).abs().max()
    if change == 0 or torch.finfo(hidden.dtype).eps < 1e-5:
        return bool(change <= 1e-5 * a.abs().max())
    one, other = both
    b = states(other, one)
    noise = [(a - states(one, company)).abs().max() for company in (one, other, one.flip(0), other.flip(0))]
    return bool((a - b).abs().max() <= 4 * max(noise))


def _last_rewards(bound: Binding) -> Callable[[Tensor, Tensor], Tensor]:
    """Rewards (B, K) at the last tokens of right-padded texts, by the body and the head."""

    def rewards(ids: Tensor, mask: Tensor) -> Tensor:
        ends = mask.sum(1) - 1 + torch.arange(len(mask), device=mask.device) * mask.size(1)
        return bound.rewards(bound.hidden(ids, mask), ends)

    return rewards


def _padding_error(bound: Binding, ids: Tensor, rewards: Callable[[Tensor, Tensor], Tensor]) -> float:
    """How far texts' rewards are from those that they have alone when they are right-padded beside a longer one, but
    for rounding; as a part of how far texts differ, since a bias may be larger than all that."""
    lengths = torch.arange(2, _PROBE_TOKENS + 1, device=ids.device)
    mask = (torch.arange(_PROBE_TOKENS, device=ids.device) < lengths[:, None]).long()
    padded = torch.where(mask.bool(), ids, bound.pad_id)
    try:
        alone = torch.cat([rewards(ids[:, :n], torch.ones_like(ids[:, :n])) for n in lengths.tolist()])
        error = float((rewards(padded, mask) - alone).norm())
    except BackendError:
        raise
    except (RuntimeError, IndexError, TypeError, ValueError):
        return math.inf
    dtype = next(p.dtype for p in bound.root.parameters() if p.is_floating_point())
    beyond = error - 8 * torch.finfo(dtype).eps * float(alone.norm())
    spread = float((alone - alone.mean(0)).norm())
    return 0.0 if beyond <= 0 else beyond / spread if spread else math.inf

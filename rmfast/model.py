"""Binding to a transformers model: its body, final norm and head, found by following the tensors of one tiny forward.

No class names are listed. The model is run once on a few tokens with hooks that record what every module took and gave:

- the *body* is the outermost module that returns a `last_hidden_state`;
- the *final norm* is the module whose output is that hidden state, and its kind is whichever formula reproduces it;
- the *head* is the chain of modules after the body that turns the hidden state into the logits.

What was found is then run in place of the model's own forward and must give its logits, so a model with rules of its
own (gates, logit scaling, another pooling) is refused when it is bound rather than scored wrongly.
"""

from __future__ import annotations

import hashlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rmfast.ops import reward_head

_PROBE_TOKENS = 7
_PASSIVE = (nn.Dropout, nn.Identity, nn.Flatten)  # modules that change no value in eval mode


@dataclass
class Call:
    """One module's call during the probe."""

    name: str
    module: nn.Module
    given: Any
    result: Any


@dataclass(frozen=True, eq=False)
class Clamp:
    """Output channels of a module that are set to values while the model runs: (j,) int64 and (j,).

    Attributes:
        last: only at the rows that are read (`reading`), not at all.
    """

    name: str
    indices: Tensor
    values: Tensor
    last: bool


@dataclass(frozen=True, eq=False)
class Removal:
    """Orthonormal directions (J, d) of which a row loses `strength` times its part: h − strength Σ (p·h) p."""

    directions: Tensor
    strength: float

    def of(self, x: Tensor) -> Tensor:
        """(..., d), in x's dtype, computed in fp32 at least."""
        wide = x if x.dtype == torch.float64 else x.float()
        p = self.directions.to(wide)
        return (wide - self.strength * (wide @ p.T) @ p).to(x.dtype)


@dataclass(eq=False)
class Binding:
    """A model's parts, and the two steps of scoring: `hidden` runs the body, `rewards` the norm and head.

    Attributes:
        root: the model with wrappers (peft, torch.compile) taken off; its adapters stay inside its layers.
        body: the module that returns the hidden states.
        norm: the final norm, left out of the body's run, or None where there is none to leave out.
        norm_kind: "rms", "gemma_rms" or "layer"; None where `norm` is none of these or its weights can't be read, and
            the module itself is then run on the rows that are scored.
        head: the modules that are applied, one after the other, to the normed rows. Empty for a model that pools by
            itself (BERT's pooler), whose own forward is then run.
        num_labels: K.
        causal: whether a token sees only those before it.
        vocab_size: rows of the embedding.
        clamps: outputs of modules that are set to values in every session.
        before, after: what rows lose before the final norm, and between it and the head.
    """

    root: nn.Module
    body_name: str
    norm_name: str | None
    norm_kind: str | None
    head_names: list[str]
    num_labels: int
    causal: bool
    vocab_size: int
    _rope: list[nn.Module] = field(default_factory=list)
    clamps: tuple[Clamp, ...] = ()
    before: Removal | None = None
    after: Removal | None = None

    # Looked up by name each time, so that modules replaced since (a new head, adapters put in) are the ones used.
    @property
    def body(self) -> nn.Module:
        return self.root.get_submodule(self.body_name)

    @property
    def norm(self) -> nn.Module | None:
        return None if self.norm_name is None else self.root.get_submodule(self.norm_name)

    @property
    def head(self) -> list[nn.Module]:
        return [self.root.get_submodule(name) for name in self.head_names]

    @property
    def config(self) -> Any:
        """The text model's configuration."""
        return text_config(self.root)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the embedding's device (accelerate moves them where its weights are offloaded)."""
        weight = self.body.get_input_embeddings().weight  # type: ignore[operator]
        return torch.device("cpu") if weight.device.type == "meta" else weight.device

    @contextmanager
    def session(self, grad: bool = False, clamped: bool = True) -> Iterator[None]:
        """Scoring state: no dropout, autograd on with `grad` alone, `clamps` in force unless not `clamped`; everything
        is put back at the end. One thread at a time."""
        # inference_mode(False) turns autograd on, also inside of no_grad.
        with (
            _lock(self.root),
            torch.inference_mode(not grad),
            _eval_mode(self.root),
            _kept_rope(self._rope),
            _clamped(self.root, self.clamps if clamped else ()),
        ):
            yield

    @property
    def clamps_last(self) -> bool:
        """Whether the run of a text depends on the token that is read."""
        return any(clamp.last for clamp in self.clamps)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Run the body on a right-padded batch.

        Args: input_ids, attention_mask and, for encoders, token_type_ids: (B, T) int64.
        Returns: (B, T, d) hidden states, before the final norm where `leaves_norm_out` holds, else after it.
        """
        # No position ids: for right-padded rows the model's own default is what each text gets alone, also where it
        # does not start at 0 (RoBERTa), and it needs no support for the argument.
        _fresh_rope(self._rope)
        inputs = _arguments(self.body, input_ids, attention_mask, token_type_ids)
        with _identity(self.norm) if self.leaves_norm_out else ExitStack():
            out = self.body(**inputs)
        return _hidden_state(out)

    @property
    def leaves_norm_out(self) -> bool:
        """Whether `hidden` gives rows before the norm. A user's hooks on the norm or body keep the norm in place."""
        return self.norm is not None and not any(map(_hooked, (self.norm, active(self.norm), self.body)))

    def rewards(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Rewards (M, K) of the flat rows (M,) int64 of hidden (B, T, d); fp32, or fp64 for fp64 hidden states."""
        if self.before is not None and not self.leaves_norm_out:
            raise ValueError("Expected a final norm without hooks, for directions to be removed before it")
        linear = plain_linear(self.head)
        if linear is not None and (not self.leaves_norm_out or (self.norm_kind and _readable(active(self.norm)))):
            on = hidden.device
            removed: dict[str, Any] = {}
            # Taking a part of the normed row away is taking it from the head.
            weight = linear.weight
            if self.after is not None:
                weight = self.after.of(weight if weight.dtype == torch.float64 else weight.float())
            if self.before is not None:
                p = self.before.directions.to(on)
                removed = {"directions": p, "strengths": p.new_full((1, p.size(0)), self.before.strength)}
            out = reward_head(
                hidden,
                weight.to(on),
                None if linear.bias is None else linear.bias.to(on),
                rows=rows,
                **self.norm_arguments(on),
                **removed,
            )
            return out if self.before is None else out[:, 0]
        out = self._chain(self.normed(hidden, rows)).reshape(rows.numel(), self.num_labels)
        return out if out.dtype == torch.float64 else out.float()

    def normed(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """The flat rows (M,) of hidden (B, T, d) as the head is given them: (1, M, d)."""
        x = hidden.reshape(-1, hidden.size(-1))[rows][None]
        x = x if self.before is None else self.before.of(x)
        if self.leaves_norm_out:
            assert self.norm is not None
            x = self.norm(x)
        return x if self.after is None else self.after.of(x)

    def norm_arguments(self, device: torch.device) -> dict[str, Any]:
        """`reward_head`'s norm arguments for hidden states from `hidden`, read from the model now."""
        if not self.leaves_norm_out:
            return {"norm": None}
        assert self.norm is not None and self.norm_kind is not None
        norm = active(self.norm)
        weight, bias = _gain(norm), getattr(norm, "bias", None)
        return {
            "norm": self.norm_kind,
            "norm_weight": None if weight is None else weight.to(device),
            "norm_bias": bias.to(device) if self.norm_kind == "layer" and bias is not None else None,
            "eps": _eps(norm),
        }

    def pooled(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Rewards (B, K) of a model that pools by itself, from its own forward."""
        _fresh_rope(self._rope)
        out = _logits(self.root(**_arguments(self.root, input_ids, attention_mask, token_type_ids)))
        assert out is not None
        out = out.reshape(input_ids.size(0), self.num_labels)
        return out if out.dtype == torch.float64 else out.float()

    def length_group(self, length: int) -> tuple[int, ...]:
        """Texts may share a batch when this is equal: rotary frequencies that depend on the longest text then agree."""
        return _length_group(self.config, length)

    def _chain(self, x: Tensor) -> Tensor:
        for module in self.head:
            x = module(x)
        return x


def bind(model: nn.Module, read_id: int | None = None, avoid: tuple[int, ...] = ()) -> Binding:
    """Find a reward model's parts.

    Args:
        model: a transformers model with a reward head; may be wrapped by peft or torch.compile.
        read_id: a token id that the model's own pooling looks for, put last in the probe.
        avoid: special token ids kept out of the probe.

    Raises:
        ValueError: no body or head was found, or they do not reproduce the model's own logits.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected model to be a torch.nn.Module, got {type(model).__name__}")
    root = unwrap(model)
    with _lock(root), torch.inference_mode(), _eval_mode(root), _kept_rope(_rope_modules(root)):
        return _bind(root, read_id, avoid)


def _bind(root: nn.Module, read_id: int | None, avoid: tuple[int, ...]) -> Binding:
    if not callable(getattr(root, "get_input_embeddings", None)):
        raise ValueError(
            f"{type(root).__name__} is not a transformers model: rmfast looks for get_input_embeddings(), a body that "
            "returns last_hidden_state, and a head"
        )
    embedding: Any = root.get_input_embeddings()  # type: ignore[operator]
    vocab_size = int(getattr(embedding, "num_embeddings", 0) or embedding.weight.shape[0])
    if read_id is not None and not 0 <= read_id < vocab_size:
        raise ValueError(f"Expected pooling to be a token id in [0, {vocab_size}), got {read_id}")
    device = torch.device("cpu") if embedding.weight.device.type == "meta" else embedding.weight.device
    ids = _probe_ids(root, vocab_size, read_id, avoid).to(device)
    calls, own = _record(root, ids)
    where = f"{type(root).__name__} (top-level modules: {', '.join(name for name, _ in root.named_children())})"

    body = _find_body(calls)
    if body is None:
        raise ValueError(
            f"No body found in {where}: rmfast looks for a module inside it that returns last_hidden_state (B, T, d)"
        )
    logits = _logits(own)
    if logits is None:
        raise ValueError(
            f"No logits found in what {where} returns: rmfast looks for .logits, or a tensor, of shape (B, K) or "
            f"(B, T, K); got {type(own).__name__}"
        )
    if logits.numel() > 4096 * _PROBE_TOKENS or logits.size(-1) == vocab_size:
        raise ValueError(
            f"{where} is a language model, not a reward model: its logits have shape {tuple(logits.shape)}. rmfast "
            "looks for a head with a few outputs (sequence or token classification)"
        )
    states = _hidden_state(body.result)
    norm = _find_norm(calls, body, states)
    chain = _find_head(calls, body, states)
    bound = Binding(
        root=root,
        body_name=body.name,
        norm_name=None if norm is None else norm.name,
        norm_kind=None if norm is None else _norm_kind(norm),
        head_names=[],
        num_labels=0,
        causal=True,
        vocab_size=vocab_size,
        _rope=_rope_modules(body.module),
    )
    # One more tiny run, of the body as it will be run: the probe, and the probe with another last token, whose first
    # hidden state tells a decoder from an encoder.
    other = ids.clone()
    other[0, -1] = ids[0, 0]
    both = torch.cat([ids, other])
    hidden = bound.hidden(both, torch.ones_like(both))
    rows = norm.given if norm is not None and bound.leaves_norm_out else states
    if norm is not None and not _near(hidden[:1], rows):
        # Leaving it out changes more than the last step, as where one norm serves several places.
        bound.norm_name, bound.norm_kind, rows = None, None, states
    first = hidden[:, 0].float()
    bound.causal = bool((first[0] - first[1]).abs().max() <= torch.finfo(hidden.dtype).eps * first.abs().max())

    if chain is not None and _try_head(bound, [call.name for call in chain], logits, rows):
        return bound
    bound.norm_name = bound.norm_kind = None
    bound.head_names = []
    # Without rows to score, K is the model's own, and its own pooling must not depend on what shares the batch.
    bound.num_labels = logits.numel()
    if logits.dim() == 2 and logits.size(0) == 1 and not bound.causal and _pools_safely(bound, ids):
        return bound
    tail = ", ".join(call.name for call in chain) if chain else "none that starts at the hidden state"
    raise ValueError(
        f"The head of {where} is not one that rmfast knows: it looks for modules that turn each hidden state into its "
        f"logits (a Linear, or an MLP as one module), read at the last token, or for an encoder that pools by itself. "
        f"Body: {body.name}; final norm: {norm.name if norm else 'none'}; head: {tail}. Running these did not give the "
        "model's own logits"
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile and peft wrappers. Adapters live in its layers and stay active."""
    model = getattr(model, "_orig_mod", model)
    peft: Any = model
    if hasattr(peft, "peft_config") and callable(getattr(peft, "get_base_model", None)):
        for config in peft.peft_config.values():
            if getattr(config, "is_prompt_learning", False):
                raise ValueError(
                    f"peft's {getattr(config.peft_type, 'value', config.peft_type)} adds tokens outside of the model's "
                    "layers, which rmfast does not run; adapters inside the layers (LoRA and its kin) work"
                )
        return peft.get_base_model()
    return model


def text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def active(module: Any) -> nn.Module:
    """The module in use: what peft's ModulesToSaveWrapper has switched to, else the module itself."""
    if not (hasattr(module, "modules_to_save") and hasattr(module, "original_module")):
        return module
    adapters = module.active_adapters
    if module.disable_adapters or not adapters or adapters[0] not in module.modules_to_save:
        return module.original_module
    return module.modules_to_save[adapters[0]]


def plain_linear(head: list[nn.Module]) -> nn.Linear | None:
    """The one Linear that the head consists of, if its weight can be read: then norm and head are one fused op.

    Looked up at every call, since peft switches the modules it saved between adapters.
    """
    modules = [module for module in head if not isinstance(module, _PASSIVE)]
    if len(modules) != 1 or any(_hooked(module) for module in head):
        return None
    module = active(modules[0])
    if type(module) is not nn.Linear or _hooked(module):
        return None
    return module if _readable(module) else None


def _readable(module: nn.Module) -> bool:
    """Whether its parameters are ordinary numbers in memory: not offloaded to meta, not quantised tensor subclasses."""
    return all(type(p.data) is Tensor and p.is_floating_point() and not p.is_meta for p in module.parameters())


def _arguments(module: nn.Module, input_ids: Tensor, attention_mask: Tensor, types: Tensor | None) -> dict[str, Any]:
    accepted = inspect.signature(type(module).forward).parameters
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    if types is not None and "token_type_ids" in accepted:
        inputs["token_type_ids"] = types
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def _hidden_state(out: Any) -> Tensor:
    state = getattr(out, "last_hidden_state", None)
    if state is None:
        state = out[0] if isinstance(out, tuple | list) else out
    return state


def _logits(out: Any) -> Tensor | None:
    found = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    return found if isinstance(found, Tensor) and found.dim() >= 1 else None


def _probe_ids(root: nn.Module, vocab_size: int, read_id: int | None, avoid: tuple[int, ...]) -> Tensor:
    """(1, T) distinct ordinary token ids."""
    config = text_config(root)
    special: set[int | None] = set(avoid)
    for name in ("pad", "bos", "eos", "sep", "cls", "decoder_start"):
        value = getattr(config, f"{name}_token_id", None)
        special.update(value if isinstance(value, list | tuple) else [value])
    step = max(1, vocab_size // (_PROBE_TOKENS + 2))
    chosen: list[int] = []
    for i in (j % vocab_size for j in range(step, step + 8 * vocab_size, step + 1)):
        if i not in special and i not in chosen:
            chosen.append(i)
        if len(chosen) == _PROBE_TOKENS:
            break
    if len(chosen) < _PROBE_TOKENS:
        raise ValueError(f"Expected a vocabulary of at least {_PROBE_TOKENS} ordinary tokens, got {vocab_size}")
    if read_id is not None:
        chosen[-1] = read_id
    return torch.tensor([chosen])


def _record(root: nn.Module, ids: Tensor) -> tuple[list[Call], Any]:
    """Run the model on the probe; every module's call, in the order in which they returned, and the output."""
    calls: list[Call] = []
    with ExitStack() as stack:
        for name, module in root.named_modules():

            def hook(module: nn.Module, args: tuple, kwargs: dict, out: Any, name: str = name) -> None:
                given = args[0] if args else next(iter(kwargs.values()), None)
                calls.append(Call(name, module, given, out))

            handle = module.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        try:
            out = root(**_arguments(root, ids, torch.ones_like(ids), None))
        except Exception as error:
            raise ValueError(
                f"{type(root).__name__} could not be run on {ids.numel()} tokens to find its parts: "
                f"{type(error).__name__}: {error}"
            ) from error
    return calls, out


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
    """The call whose output is the body's, if its module is a norm: (1, T, d) -> (1, T, d)."""
    inside = [call for call in calls if call.name.startswith(body.name + ".")]
    for call in reversed(inside):
        module = active(call.module)
        if not isinstance(call.result, Tensor) or not _same(call.result, states) or isinstance(module, _PASSIVE):
            continue
        if any(True for _ in module.children()) or not isinstance(call.given, Tensor):
            continue  # a layer that ends in its norm (BERT): the norm's own call is further back
        weight = getattr(module, "weight", None)
        per_feature = weight is None or tuple(weight.shape) == (states.size(-1),)
        return call if per_feature and call.given.shape == states.shape else None
    return None


def _find_head(calls: list[Call], body: Call, states: Tensor) -> list[Call] | None:
    """The outermost modules called after the body, as a chain from the hidden state; None where it has a gap."""
    done = next(i for i, call in enumerate(calls) if call is body)
    after = [call for call in calls[done + 1 :] if not (body.name + ".").startswith(call.name + ".") and call.name]
    names = {call.name for call in after}
    tail = [call for call in after if not any(call.name.startswith(name + ".") for name in names)]
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


def _try_head(bound: Binding, names: list[str], logits: Tensor, hidden: Tensor) -> bool:
    """Whether norm and head, applied to each row, give the model's logits (at the last token); if so they are bound."""
    rows = torch.arange(_PROBE_TOKENS, device=hidden.device)
    bound.head_names = names
    try:
        x = hidden
        if bound.leaves_norm_out and bound.norm is not None:
            x = bound.norm(x)
        out = bound._chain(x.reshape(1, _PROBE_TOKENS, -1))
        bound.num_labels = out.numel() // _PROBE_TOKENS
        if bound.num_labels == 0 or out.numel() % _PROBE_TOKENS:
            return False
        values = bound.rewards(hidden, rows)
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
    # The same rows went into both, so only rounding differs: at most a few of the logits' last bits, or of TF32's.
    tolerance = max(2e-3, 2 * torch.finfo(logits.dtype).eps) * _scale(bound, values)
    atol = tolerance if tolerance < torch.inf else 0.0  # weights that are not finite: rewards are NaN, as the logits
    return torch.allclose(values, expected, rtol=0.0, atol=atol, equal_nan=True)


def _scale(bound: Binding, values: Tensor) -> float:
    """How large rewards of this head can get: the reward scale ‖γ⊙w‖ of a linear head, else the largest value seen."""
    linear = plain_linear(bound.head)
    largest = float(values.detach().abs().max())
    if linear is None or bound.norm_kind is None:
        return largest
    weight = _gain(active(bound.norm)) if bound.norm is not None else None
    w = linear.weight.float()
    if weight is not None:
        gain = weight.to(w)
        w = w * (1 + gain if bound.norm_kind == "gemma_rms" else gain)
    return max(largest, float(w.norm(dim=-1).max()))


def _near(a: Tensor, b: Tensor) -> bool:
    """Whether two runs of the model agree. A wrong run is off by the whole; low precision, and quantised activations
    whose scales depend on what shares the batch, by a few percent."""
    a, b = a.double(), b.double().to(a.device)
    return bool((a - b).norm() <= 0.1 * b.norm()) or not bool(b.isfinite().all())


def _pools_safely(bound: Binding, ids: Tensor) -> bool:
    """Whether the model's own forward gives texts the same logits alone and right-padded beside a longer one."""
    lengths = torch.arange(2, _PROBE_TOKENS + 1, device=ids.device)
    mask = (torch.arange(_PROBE_TOKENS, device=ids.device) < lengths[:, None]).long()
    padded = torch.where(mask.bool(), ids, pad_id(bound))
    try:
        alone = torch.cat([bound.pooled(ids[:, :n], torch.ones_like(ids[:, :n])) for n in lengths.tolist()])
        error = (bound.pooled(padded, mask) - alone).norm()
    except (RuntimeError, IndexError, TypeError, ValueError):
        return False
    # Judged by how far texts differ, since a bias may be larger than all that; and by rounding where they don't.
    dtype = next(p.dtype for p in bound.root.parameters() if p.is_floating_point())
    rounding = 8 * torch.finfo(dtype).eps * alone.norm()
    return bool(error <= 0.1 * (alone - alone.mean(0)).norm() + rounding)


def pad_id(bound: Binding) -> int:
    """The id that fills padding: the model's own where it has an embedding (RoBERTa counts positions by it), else 0."""
    pad = getattr(bound.config, "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < bound.vocab_size else 0


# The final norm -------------------------------------------------------------------------------------------------------


def _gain(norm: nn.Module) -> Tensor | None:
    return getattr(norm, "weight", None)


def _eps(norm: nn.Module) -> float:
    for name in ("variance_epsilon", "eps", "epsilon", "norm_eps"):
        value = getattr(norm, name, None)
        if isinstance(value, int | float):
            return float(value)
    weight = _gain(norm)
    return torch.finfo(torch.float32 if weight is None else weight.dtype).eps  # torch.nn.RMSNorm(eps=None)


def _norm_kind(call: Call) -> str | None:
    """The formula that reproduces the norm's output, on the rows it was given and on rows small enough to show eps."""
    norm, seen = active(call.module), call.given
    eps = _eps(norm)
    if not _readable(norm) or not eps > 0:
        return None
    noise = torch.randn(seen.shape, generator=torch.Generator().manual_seed(0)).to(seen)
    tests = [seen, noise, noise * eps**0.5, noise + 3]
    atol = 1e-4 if seen.dtype in (torch.float32, torch.float64) else 0.05
    wide = [x.double() for x in tests]
    outs = [norm(x).double() for x in tests]
    weight, bias = (None if p is None else p.double() for p in (_gain(norm), getattr(norm, "bias", None)))
    gain = 1.0 if weight is None else weight
    offset = 0.0 if bias is None else bias

    def rms(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    formulas: dict[str, Callable[[Tensor], Tensor]] = {
        "layer": lambda x: rms(x - x.mean(-1, keepdim=True)) * gain + offset
    }
    if bias is None:
        formulas["rms"] = lambda x: rms(x) * gain
        if weight is not None:
            formulas["gemma_rms"] = lambda x: rms(x) * (1 + weight)
    for kind, formula in formulas.items():
        wanted = [formula(x) for x in wide]
        if all(torch.allclose(a, b, rtol=atol, atol=atol * float(b.abs().max())) for a, b in zip(outs, wanted)):
            return kind
    return None


# Running the model without leaving a trace ----------------------------------------------------------------------------

_locks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def _lock(module: nn.Module) -> Any:
    """One re-entrant lock per model, kept outside of it so that the model can still be copied and pickled."""
    with _locks_guard:
        return _locks.setdefault(module, threading.RLock())


def share_lock(module: nn.Module, copied: nn.Module) -> None:
    """One lock for a model and one made of its parts, whose configuration and submodules a session changes."""
    lock = _lock(module)
    with _locks_guard:
        _locks[copied] = lock


def _plain(module: nn.Module) -> bool:
    """Whether nobody put anything around its forward: hooks, or one set on the instance (accelerate, kernels)."""
    return not _hooked(module) and "forward" not in module.__dict__


def out_of_memory(error: RuntimeError) -> bool:
    """The CPU's allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _hooked(module: nn.Module) -> bool:
    """Whether it has forward hooks that do something.

    The first call with output_hidden_states or output_attentions leaves transformers' own on all layers for good; they
    do nothing in a run that did not ask for these outputs.
    """
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Gives a module another forward, for this thread."""
    own = module.__dict__.get("forward")  # accelerate and kernel libraries set one on the instance
    original, thread = module.forward, threading.get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:
        return (forward if threading.get_ident() == thread else original)(*args, **kwargs)

    module.forward = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


def _identity(norm: nn.Module | None) -> AbstractContextManager[None]:
    """Makes the norm give back what it is given: no normalised copy of all the tokens is written."""
    assert norm is not None
    return replaced_forward(norm, lambda x, *args, **kwargs: x)


@contextmanager
def _eval_mode(root: nn.Module) -> Iterator[None]:
    training = [module for module in root.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


# Outputs set to values ------------------------------------------------------------------------------------------------


@dataclass
class _Reads:
    total: int  # rows of the run
    rows: Tensor | None  # those that are read; None: all
    seen: set[str] = field(default_factory=set)  # modules whose outputs at these rows have come by


_reads: ContextVar[_Reads | None] = ContextVar("rmfast_reads", default=None)


@contextmanager
def reading(total: int, rows: Tensor | None) -> Iterator[None]:
    """Says for one run of the body which of its rows (flat, (m,) int64; None: all) are read."""
    token = _reads.set(_Reads(total, rows))
    try:
        yield
    finally:
        _reads.reset(token)


def rows_read() -> Tensor | None:
    """The flat rows (m,) of the body's run that are read; None: all."""
    reads = _reads.get()
    return None if reads is None else reads.rows


def read_rows(name: str, out: Tensor) -> Tensor | slice | None:
    """Where the rows that are read are in a module's output, flat (r, m); None where it is not of the tokens."""
    reads = _reads.get()
    if reads is None:
        raise ValueError(f"Expected a run that says which tokens are read, for {name} to be clamped there alone")
    if name in reads.seen:  # DeBERTa projects its relative positions by the same module, after the tokens
        return None
    reads.seen.add(name)
    count = out.numel() // out.size(-1)
    if count == reads.total:
        return slice(None) if reads.rows is None else reads.rows.to(out.device)
    if reads.rows is not None and count == reads.rows.numel():
        return slice(None)  # the last layer, which need not run others
    raise ValueError(
        f'Expected {name} to give a row for each of {reads.total} tokens, got {count}: a clamp with positions="last" '
        'can\'t tell which of them is read; positions="all" needs not'
    )


@contextmanager
def _clamped(root: nn.Module, clamps: tuple[Clamp, ...]) -> Iterator[None]:
    """Runs the clamped modules with their outputs set."""
    by_name: dict[str, list[Clamp]] = {}
    for clamp in clamps:
        by_name.setdefault(clamp.name, []).append(clamp)
    with ExitStack() as stack:
        for name, some in by_name.items():
            module = root.get_submodule(name)
            stack.enter_context(replaced_forward(module, _setting(name, module.forward, some)))
        yield


def _setting(name: str, original: Callable, clamps: list[Clamp]) -> Callable:
    def forward(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        out = out.clone() if out.requires_grad else out.contiguous()
        for clamp in clamps:
            at, values = clamp.indices.to(out.device), clamp.values.to(out)
            if not clamp.last:
                out[..., at] = values
                continue
            rows = read_rows(name, out)
            if isinstance(rows, slice):
                out[..., at] = values
            elif rows is not None:
                out.view(-1, out.size(-1))[rows[:, None], at] = values
        return out

    return forward


def fingerprint(root: nn.Module) -> str:
    """Of an architecture and a sample of its weights: 64 to 127 values of each parameter (or all of fewer), in bf16.

    In bf16, so that what was made with a model in fp32 is known as the same one's in bf16.
    """
    digest = hashlib.sha256(type(root).__name__.encode())
    for name, p in root.named_parameters():
        digest.update(f"{name} {tuple(p.shape)}".encode())
        if p.numel() and not p.is_meta and p.is_floating_point():
            some = p.detach().reshape(-1)[:: max(1, p.numel() // 64)].bfloat16().double().cpu().numpy()
            digest.update(np.ascontiguousarray(some).tobytes())
    return digest.hexdigest()


# Rotary embeddings whose frequencies depend on the longest text -------------------------------------------------------


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of a configuration: one, or one for each layer type."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict)] if isinstance(found, dict) else []
    return nested or ([found] if isinstance(found, dict) else [])


def _length_group(config: Any, length: int) -> tuple[int, ...]:
    key = []
    for parameters in _rope_parameters(config):
        kind = parameters.get("rope_type") or parameters.get("type") or ""
        if kind in ("longrope", "su"):  # two sets of frequencies
            limit = parameters.get("original_max_position_embeddings") or config.original_max_position_embeddings
            key.append(int(length > limit))
        elif "dynamic" in kind:  # a set for each length above the limit
            key.append(length if length > config.max_position_embeddings else 0)
    return tuple(key)


def _rope_modules(body: nn.Module) -> list[nn.Module]:
    """Dynamic-NTK modules: they keep the frequencies of the longest text seen so far."""
    return [module for module in body.modules() if _dynamic_prefixes(module)]


def _dynamic_prefixes(module: nn.Module) -> list[str]:
    kind = getattr(module, "rope_type", None)
    if isinstance(kind, dict):
        return [f"{layer}_" for layer, name in kind.items() if "dynamic" in name]
    return [""] if isinstance(kind, str) and "dynamic" in kind else []


def _fresh_rope(modules: list[nn.Module]) -> None:
    """Forget earlier texts, as if the model had just been loaded."""
    for module in modules:
        for prefix in _dynamic_prefixes(module):
            setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


@contextmanager
def _kept_rope(modules: list[nn.Module]) -> Iterator[None]:
    names = ("inv_freq", "original_inv_freq", "max_seq_len_cached")
    saved = [
        (module, prefix + name, getattr(module, prefix + name))
        for module in modules
        for prefix in _dynamic_prefixes(module)
        for name in names
        if hasattr(module, prefix + name)
    ]
    try:
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)

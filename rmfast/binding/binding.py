"""`Binding`: a model's body, final norm and head, and the two steps of scoring, `hidden` and `rewards`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.binding.compute import LOW, Fp32, chosen, holds
from rmfast.binding.modules import (
    Snapshot,
    active,
    call_arguments,
    calls_of,
    fingerprint,
    hidden_state_of,
    input_embedding,
    is_readable,
    is_untouched,
    logits_of,
    modules_of,
    plain_linear,
    same_settings,
    settings_of,
    text_config,
    unwrap,
    wrappers,
)
from rmfast.binding.norms import head_arguments, known_kind
from rmfast.binding.products import is_product, row_product
from rmfast.binding.rope import fresh_rope, kept_rope, length_groups, rope_modules
from rmfast.binding.session import (
    Clamp,
    eval_mode,
    lock_of,
    on_the_host,
    passing_through,
    uncompiled_calls,
    with_clamps,
)
from rmfast.ops import reward_head, rms_norm

_NO_NORM = "Expected a final norm that nothing is put on, for directions to be removed before it"


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
        norm_kind: "rms", "gemma_rms", "layer" or "layer_1p" (gain 1 + γ); None where `norm` is none of these or its
            weights can't be read, and the module itself is then run on the rows that are scored.
        head: the modules that are applied, one after the other, to the normed rows. Without them and a program the
            model pools by itself (BERT's pooler), and its own forward is run.
        program: a head as data (`rmfast.heads.Head`), in place of modules.
        num_labels: K.
        causal: whether a token sees only those before it.
        width: d, of the hidden states that the head is given.
        outermost: the model in its wrappers, as it was given.
        pooling, avoid: as they were given to `rmfast.binding.find.bind`.
        reading: the rule by which the model reads a text's token: a name in `rmfast.binding.proof.READINGS`, or for a
            token id as pooling which of its occurrences, "first" or "last".
        compute: "native" for linear layers in the weights' own dtype, "fp32" (`rmfast.binding.compute`), or "auto".
        padded: whether texts of several lengths may share a batch; where padding would change rewards they may not.
        clamps: outputs of modules that are set to values in every session.
        before, after: what rows lose before the final norm, and between it and the head.
    """

    root: nn.Module
    body_name: str
    norm_name: str | None
    head_names: list[str]
    num_labels: int
    causal: bool
    width: int
    outermost: nn.Module
    find: Callable[..., Binding]  # what made it, `rmfast.binding.find.bind`
    program: Any = None
    pooling: str | int = "auto"
    avoid: tuple[int, ...] = ()
    reading: str = "last"
    compute: str = "native"
    padded: bool = True
    clamps: tuple[Clamp, ...] = ()
    before: Removal | None = None
    after: Removal | None = None
    copied_from: Snapshot | None = None  # of the model that `root` is a copy of
    tried_norm: tuple[tuple, list, str | None] | None = None  # the norm last held against the formulas; its kind
    tried_forward: tuple | None = None  # what the model's own forward was when it was last tried

    # Looked up by name each time, so that modules replaced since (a new head, adapters put in) are the ones used.
    @property
    def body(self) -> nn.Module:
        return self.root.get_submodule(self.body_name)

    @property
    def norm(self) -> nn.Module | None:
        return None if self.norm_name is None else self.root.get_submodule(self.norm_name)

    @property
    def norm_kind(self) -> str | None:
        if self.norm is None:
            return None
        norm = active(self.norm)
        which, settings = (norm, *calls_of(norm)), settings_of(norm)
        if (
            self.tried_norm is None
            or self.tried_norm[0] != which  # another adapter's, or put in since
            or not same_settings(self.tried_norm[1], settings)
        ):
            with torch.inference_mode():
                dtype = next((p.dtype for p in norm.parameters() if p.is_floating_point()), torch.float32)
                self.tried_norm = which, settings, known_kind(norm, self.width, dtype)
        return self.tried_norm[2]

    @property
    def head(self) -> list[nn.Module]:
        return [self.root.get_submodule(name) for name in self.head_names]

    @property
    def fingerprint(self) -> str:
        """Of the architecture and a sample of the weights, a program's included."""
        return fingerprint(self.root, None if self.program is None else self.program.tensors())

    @property
    def reads_rows(self) -> bool:
        """Whether rewards are made of tokens' rows, by the head's modules or a program."""
        return self.program is not None or bool(self.head_names)

    @property
    def rope(self) -> list[nn.Module]:
        """Modules of the body whose rotary frequencies go by the longest text seen."""
        return rope_modules(self.body)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        embedding = input_embedding(self.root)
        return int(getattr(embedding, "num_embeddings", 0) or embedding.weight.shape[0])

    @property
    def config(self) -> Any:
        """The text model's configuration."""
        return text_config(self.root)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the embedding's device (accelerate moves them where its weights are offloaded)."""
        weight = input_embedding(self.body).weight
        return torch.device("cpu") if weight.device.type == "meta" else weight.device

    @property
    def pad_id(self) -> int:
        """What fills padding: the model's own id where it has an embedding (RoBERTa counts positions by it), else 0."""
        pad = getattr(self.config, "pad_token_id", None)
        return pad if isinstance(pad, int) and 0 <= pad < self.vocab_size else 0

    @contextmanager
    def session(self, grad: bool = False, clamped: bool = True) -> Iterator[None]:
        """Scoring state: no dropout, autograd on with `grad` alone, `clamps` in force unless not `clamped`; everything
        is put back at the end. One thread at a time.

        Raises:
            ValueError: the model's own forward has changed, and its parts do not give its logits any more.
        """
        with lock_of(self.root):
            self.renew()
            # inference_mode(False) turns autograd on, also inside of no_grad.
            with (
                on_the_host(),
                torch.inference_mode(not grad),
                eval_mode(self.root),
                kept_rope(self.rope),
                self._arithmetic(),
                with_clamps(self.root, self.clamps if clamped else ()),
            ):
                yield

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        if not self.in_fp32 or holds():
            yield
            return
        with uncompiled_calls(self.root), Fp32():
            yield

    @property
    def in_fp32(self) -> bool:
        """Whether sessions run in fp32, whatever the weights are stored in; looked up anew, since those may change."""
        return chosen(self.compute, self.root)[0]

    @property
    def stream_dtype(self) -> torch.dtype:
        """Of the hidden states that the body's own modules give in a session."""
        return torch.float32 if self.in_fp32 else self.stored

    @property
    def stored(self) -> torch.dtype:
        """Of the model's first weights, as a rule the embedding."""
        return next(p.dtype for p in self.root.parameters() if p.is_floating_point())

    def own_forward(self) -> tuple:
        """What the model's own forward runs around its parts, and which tokens it reads and sees, as a key."""
        own = unwrap(self.outermost)  # of which `root` may be a copy
        around = [self.outermost, *wrappers(self.outermost, own), own, self.root]
        ids = (getattr(self.config, f"{name}_token_id", None) for name in ("pad", "eos"))
        return (
            *(calls_of(module) for module in dict.fromkeys(around)),
            *(tuple(each) if isinstance(each, list) else each for each in ids),
            getattr(self.config, "is_causal", None),
            getattr(self.config, "_attn_implementation_internal", None),  # SDPA drops a softcap
            *(module.__dict__.get("is_causal") for module in modules_of(self.body)),
        )

    @property
    def changed(self) -> bool:
        """Whether the model's own forward must be tried again."""
        return bool(self.head_names) and self.own_forward() != self.tried_forward

    def renew(self) -> None:
        """Tries the model's own forward again where that has changed since: hooks on the model, torch's global ones, a
        forward set on the instance, the special tokens by which it may read, attention no longer causal. What is
        put on the body, its final norm or the head takes part without, but not in a copy made before."""
        if self.copied_from is not None and self.copied_from.changed:
            raise ValueError(
                f"Expected {type(self.root).__name__} to have the modules, hooks, forwards, settings, adapters "
                "and clamped matrices that it had when interventions were put on a copy: call with_interventions again"
            )
        if not self.changed:
            return
        changed = f"What the forward of {type(self.root).__name__} runs has changed since the model was bound"
        around = "hooks, a forward set on it, its special tokens, its attention or is_causal"
        try:
            found = self.find(self.outermost, self.pooling, self.avoid)
        except ValueError as error:
            raise ValueError(f"{changed} ({around}). {error}") from error
        was, now = (
            (each.body_name, each.head_names, each.num_labels, each.causal, each.width) for each in (self, found)
        )
        if now != was:
            raise ValueError(
                f"{changed} ({around}): expected body, head, labels, causal and width {was}, got {now}. Make a new "
                "RewardModel of the model"
            )
        self.reading, self.padded, self.tried_forward = found.reading, found.padded, self.own_forward()

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
        fresh_rope(self.rope)
        inputs = call_arguments(self.body, input_ids, attention_mask, token_type_ids)
        with passing_through(self.norm) if self.leaves_norm_out else ExitStack():
            out = self.body(**inputs)
        return hidden_state_of(out)

    @property
    def leaves_norm_out(self) -> bool:
        """Whether `hidden` gives rows before the norm. Hooks, or a forward set on the instance, of the norm or the body
        keep the norm in place."""
        return self.norm is not None and all(map(is_untouched, (self.norm, active(self.norm), self.body)))

    def rewards(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Rewards (M, K) of the flat rows (M,) int64 of hidden (B, T, d); fp32, or fp64 for fp64 hidden states.

        Raises:
            ValueError: the head is a program that reads more of a text than one token.
        """
        if self.program is not None:
            return self._labelled(self.program.rewards(self.row_values(hidden, rows)), rows.numel())
        linear = plain_linear(self.head)
        if linear is not None and self._fuses_norm:
            return self._labelled(self._fused(hidden, rows, linear.weight, linear.bias), rows.numel())
        if self.before is not None and not self.leaves_norm_out:
            raise ValueError(_NO_NORM)
        return self._labelled(self.apply_head(self.normed(hidden, rows)), rows.numel())

    def row_values(self, hidden: Tensor, rows: Tensor, gates: Tensor | None = None) -> Tensor:
        """(M, V), what the program keeps of the flat rows (M,) of hidden (B, T, d).

        gates: (G,) int64, which of `rows` the gate of a gated head reads; None: any. Of others its values are 0.
        """
        values = self.program.values(
            lambda weight, bias: self.linear(hidden, rows, weight, bias), lambda: self.normed(hidden, rows)[0]
        )
        if not self.program.gated:
            return values
        at = rows if gates is None else rows[gates]
        made = self.program.gate_values(lambda weight, bias: self.linear(hidden, at, weight, bias))
        if gates is not None:
            made = made.new_zeros(len(rows), made.size(1)).index_copy(0, gates, made)
        return torch.cat([values, made], 1)

    @property
    def _fuses_norm(self) -> bool:
        return not self.leaves_norm_out or bool(self.norm_kind and is_readable(active(self.norm)))

    def linear(self, hidden: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(M, C) of the flat rows (M,) of hidden (B, T, d): weight (C, d) and bias (C,) or None, norm and removals
        included; one op where the norm is known."""
        if not self._fuses_norm:
            return row_product(self.normed(hidden, rows)[0], weight, bias)
        removes = self.before is not None or self.after is not None
        if not (removes or torch.is_grad_enabled()) and is_product(weight, hidden.device, hidden.dtype):
            norm = self.norm_arguments(hidden.device)
            kind = norm["norm"]
            if kind != "layer":  # of which there is no op that gives rows
                x = hidden.reshape(-1, hidden.size(-1))[rows].float()
                if kind is None:
                    return row_product(x, weight, bias)
                y = rms_norm(x, norm["norm_weight"], eps=norm["eps"], gemma=kind == "gemma_rms")
                return row_product(y, weight, bias)  # type: ignore[arg-type]  # one tensor without a residual
        return self._fused(hidden, rows, weight, bias)

    def _fused(self, hidden: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.before is not None and not self.leaves_norm_out:
            raise ValueError(_NO_NORM)
        on = hidden.device
        removed: dict[str, Any] = {}
        # Taking a part of the normed row away is taking it from the head.
        if self.after is not None:
            weight = self.after.of(weight if weight.dtype == torch.float64 else weight.float())
        if self.before is not None:
            p = self.before.directions.to(on)
            removed = {"directions": p, "strengths": p.new_full((1, p.size(0)), self.before.strength)}
        out = reward_head(
            hidden,
            weight.to(on),
            None if bias is None else bias.to(on),
            rows=rows,
            **self.norm_arguments(on),
            **removed,
        )
        return out if self.before is None else out[:, 0]

    def _labelled(self, out: Tensor, count: int) -> Tensor:
        """(count, K), in fp32 at least; ValueError where the head gives another number of labels than it did."""
        if out.numel() != count * self.num_labels:
            raise ValueError(
                f"Expected the head of {type(self.root).__name__} to give {self.num_labels} for each of {count} rows, "
                f"as when the model was bound, got {tuple(out.shape)}: make a new RewardModel of the model"
            )
        out = out.reshape(count, self.num_labels)
        return out if out.dtype == torch.float64 else out.float()

    def normed(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """The flat rows (M,) of hidden (B, T, d) as the head is given them: (1, M, d)."""
        x = hidden.reshape(-1, hidden.size(-1))[rows][None]
        x = x if self.before is None else self.before.of(x)
        if self.leaves_norm_out:
            assert self.norm is not None
            x = self.norm(self._as_modules_give(x))
        return x if self.after is None else self.after.of(x)

    def _as_modules_give(self, x: Tensor) -> Tensor:
        """Rows as the final norm takes them as a module, and modules of the head what it gives: rounded, where the
        stream is fp32 between 16-bit blocks. Not by the norm's weights: it may have none (OLMo), or fp32 ones."""
        own = self.stream_dtype
        return x.to(own) if x.dtype == torch.float32 and own in LOW else x

    def norm_arguments(self, device: torch.device) -> dict[str, Any]:
        """`reward_head`'s norm arguments for hidden states from `hidden`, read from the model now."""
        if not self.leaves_norm_out:
            return {"norm": None}
        assert self.norm is not None and self.norm_kind is not None
        return head_arguments(active(self.norm), self.norm_kind, device)

    def pooled(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Rewards (B, K) of a model that pools by itself, from its own forward."""
        fresh_rope(self.rope)
        out = logits_of(self.root(**call_arguments(self.root, input_ids, attention_mask, token_type_ids)))
        assert out is not None
        return self._labelled(out, input_ids.size(0))

    @property
    def length_group(self) -> Callable[[int], tuple[int, ...]]:
        """A function of lengths. Texts may share a batch when it is equal: rotary frequencies that depend on the
        longest text then agree, and nothing is padded where that would change rewards."""
        if not self.padded:
            return lambda length: (length,)
        return length_groups(self.body, self.config)

    def apply_head(self, x: Tensor) -> Tensor:
        """The head's modules, one after the other."""
        for module in self.head:
            x = module(x)
        return x

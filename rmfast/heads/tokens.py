"""Token rows of a language model's head: judges, process rewards by "+" and "-", rerankers, Nemotron-70B-Reward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.arguments import flag, is_whole, shown
from rmfast.binding.modules import active, is_readable, is_untouched, text_config
from rmfast.heads import rowwise
from rmfast.heads.head import Apply, Head, LinearMap


class TokenHead:
    """The reward as a language model's logits of one or several tokens.

    Args:
        tokens: ids, or tokens as they stand in the vocabulary ("▁+" and "+" are two of SentencePiece's), or else text
            that is one token.
        difference: whether the reward is the first of two tokens' logit less the second's, of which the sigmoid is the
            probability of the first among the two. Default for two tokens; else each logit is a reward, K of them.

    Raises:
        TypeError, ValueError: no tokens, or a difference of other than two.
    """

    def __init__(self, *tokens: int | str, difference: bool | None = None):
        if not tokens or not all(is_whole(token) or isinstance(token, str) for token in tokens):
            raise TypeError(f"Expected tokens to be ids or tokens, at least one, got {shown(tokens)}")
        if len(set(tokens)) < len(tokens):
            raise ValueError(f"Expected tokens to be different, got {shown(tokens)}")
        self.tokens = tokens
        self.difference = len(tokens) == 2 if difference is None else flag("difference", difference)
        if self.difference and len(tokens) != 2:
            raise ValueError(f"Expected two tokens for a difference, got {len(tokens)}")

    def __repr__(self) -> str:
        return f"TokenHead({', '.join(map(repr, self.tokens))}, difference={self.difference})"

    def of(self, model: nn.Module, tokenizer: Any) -> TokenRows:
        """The head of a language model (without wrappers).

        Raises:
            ValueError: the model has no readable head over a vocabulary, or a token is none of its.
        """
        get: Any = getattr(model, "get_output_embeddings", None)
        module = get() if callable(get) else None
        if module is None:
            raise ValueError(
                f"Expected a language model for {self}, with a head over its vocabulary, got {type(model).__name__}"
            )
        used = active(module)
        weight = getattr(used, "weight", None)
        if not isinstance(weight, Tensor) or not is_readable(used) or not is_untouched(used):
            raise ValueError(
                f"Expected the head of {type(model).__name__} to have readable weights and no hooks, for {self}, got "
                f"{type(used).__name__}"
            )
        config = text_config(model)
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
        ids = self.ids(tokenizer, weight.size(0))
        cap = getattr(config, "final_logit_softcapping", None)
        names = tuple(map(str, self.tokens))
        names = (" - ".join(names),) if self.difference else names
        return TokenRows(module=module, ids=ids, difference=self.difference, cap=cap, scale=scale, names=names)

    def ids(self, tokenizer: Any, vocabulary: int) -> list[int]:
        """The tokens' ids; ValueError for one that is not among the tokenizer's, or the vocabulary's rows."""
        return [self._id(token, tokenizer, vocabulary) for token in self.tokens]

    def _id(self, token: int | str, tokenizer: Any, vocabulary: int) -> int:
        if isinstance(token, str):
            if tokenizer is None:
                raise ValueError(f"Expected ids in {self}: there is no tokenizer to look {token!r} up")
            known = tokenizer.get_vocab()
            ids = [known[token]] if token in known else tokenizer.encode(token, add_special_tokens=False)
            if len(ids) != 1:
                raise ValueError(f"Expected tokens of {self} to be one token each, got {token!r}, which is {len(ids)}")
            token = ids[0]
        found = int(token)
        if not 0 <= found < vocabulary:
            raise ValueError(f"Expected tokens of {self} to be in [0, {vocabulary}), got {found}")
        return found


@dataclass(eq=False, kw_only=True)
class TokenRows(Head):
    """A `TokenHead` of a model, whose weights it reads where they are.

    Attributes:
        module: the model's head.
        ids: of the tokens.
        difference: as for `TokenHead`.
        cap, scale: what the model makes of its logits, cap · tanh(scale · logit / cap); None for no cap.
    """

    module: nn.Module
    ids: list[int]
    difference: bool
    cap: float | None = None
    scale: float = 1.0

    def _rows(self) -> tuple[Tensor, Tensor | None]:
        used: Any = active(self.module)
        if not is_untouched(used):
            raise ValueError(f"Expected {type(used).__name__}, whose rows are the head, to be without hooks, as it was")
        bias = getattr(used, "bias", None)
        wide = torch.promote_types(used.weight.dtype, torch.float32)
        weight = used.weight[self.ids].to(wide) * self.scale
        bias = None if bias is None else bias[self.ids].to(wide) * self.scale
        if not self.difference or self.cap is not None:
            return weight, bias
        return weight[:1] - weight[1:], None if bias is None else bias[:1] - bias[1:]

    @property
    def num_labels(self) -> int:
        return 1 if self.difference else len(self.ids)

    @property
    def width(self) -> int:
        return active(self.module).weight.size(1)  # type: ignore[operator, union-attr, return-value]

    @property
    def step_activation(self) -> str | None:
        return "sigmoid" if self.difference else None

    def to(self, device: torch.device) -> TokenRows:
        return self  # its weights stay where the model's are

    def on(self, rows: Tensor, logits: Tensor | None) -> TokenRows:
        super().on(rows, logits)
        if logits is not None:
            own = logits[:, self.ids].double()
            own = own[:, :1] - own[:, 1:] if self.difference else own
            got = self.rewards(self.values(lambda weight, bias: rowwise.linear(rows, weight, bias), lambda: rows))
            eps = torch.finfo(logits.dtype).eps
            if not (got - own.to(got)).abs().max() <= max(2e-3, 4 * eps) * max(1.0, float(logits.abs().max())):
                raise ValueError(
                    f"The logits of {type(self.module).__name__}'s tokens {self.ids} are not the model's own: it has a "
                    "rule of its own behind its head"
                )
        return self

    def values(self, apply: Apply, rows: Callable[[], Tensor]) -> Tensor:
        out = apply(*self._rows())
        if self.cap is None:
            return out
        cap = self.cap
        return rowwise.each(lambda x: cap * torch.tanh(x / cap), out)

    def rewards(self, values: Tensor, gates: Tensor | None = None) -> Tensor:
        return values[:, :1] - values[:, 1:] if self.difference and self.cap is not None else values

    def linear(self) -> LinearMap | None:
        if self.cap is not None:
            return None
        weight, bias = self._rows()
        return LinearMap(weight=weight, bias=bias)

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self._rows()[0]}

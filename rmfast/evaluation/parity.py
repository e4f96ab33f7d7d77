"""Is a score the text's own? The same texts alone, in other batches, and through transformers' own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rmfast import arguments
from rmfast.evaluation.evaluate import expect_scorer
from rmfast.evaluation.layout import expect_one_reward
from rmfast.evaluation.result import lined
from rmfast.plots import shown_table

if TYPE_CHECKING:
    from torch import Tensor

    from rmfast.engine.scorer import Scorer
    from rmfast.texts.inputs import Encoded

_BATCH = 8  # texts of a padded batch of transformers


class Way(NamedTuple):
    """How far scores of n texts move in one way to score them: `moved` of them, at most by `largest`, that of `text`.

    `why` says why a way can't be tried; largest is then NaN.
    """

    way: str
    largest: float
    text: int
    moved: int
    n: int
    why: str


@dataclass(frozen=True, eq=False)
class Parity:
    """Differences of scores between ways to score the same texts. `str()` is a table.

    Attributes:
        rows: a `Way` each.
        spread: the standard deviation of the scores, beside which differences are large or small.
    """

    rows: list[Way]
    spread: float

    @property
    def largest(self) -> float:
        """Of all ways that were tried."""
        return max(row.largest for row in self.rows if not row.why)

    def _repr_html_(self) -> str:
        """For notebooks: the rows as a table."""
        return shown_table(Way._fields, self.rows, f"standard deviation of the scores {self.spread:.3g}")

    def __getitem__(self, way: str) -> Way:
        return next(row for row in self.rows if row.way == way)

    def __str__(self) -> str:
        cells = [["scored", "", "largest difference", "of text", "moved", "n"]]
        for row in self.rows:
            numbers = [f"{row.largest:.3g}", str(row.text), str(row.moved)] if not row.why else ["-", "-", "-"]
            cells.append([row.way, row.why and f"({row.why})", *numbers, str(row.n)])
        first = f"largest difference {self.largest:.3g}, standard deviation of the scores {self.spread:.3g}"
        return "\n".join([first, *lined(cells)])


def parity(rm: Scorer, inputs: Sequence[Any], *, scores: Any = None, batch_tokens: int | None = None,
           **encoding: Any) -> Parity:  # fmt: skip
    """How far scores of the same texts move between ways to score them.

    Alone, one call for each; in small batches, in the reverse order; by the padded engine; and by the model's own
    forward in transformers (of a head that transformers lacks, its body's, and the head by torch's products), each text
    alone without padding and in right-padded batches of eight, which is how most tools score. The last shows what
    another tool's scores may differ by for its batch size.

    Args:
        rm: a model of one reward.
        inputs: texts in any form that `score` takes.
        scores: (n,) those that the others are compared with; default of all texts in one call.
        batch_tokens: of that call.
        encoding: max_length, truncation, format, chat_template_kwargs, tools.

    Raises:
        ValueError: no inputs, or the model has several rewards.
        InputError: a text can't be scored.
    """
    expect_scorer(rm)
    expect_one_reward(rm)
    encoded = rm.encode(inputs, **encoding)
    score = partial(rm.score, max_length=encoding.get("max_length"))  # else one over the model's own limit is refused
    if not encoded:
        raise ValueError("Expected inputs with at least one text, got none")
    if scores is None:
        scores = score(encoded, batch_tokens=batch_tokens)
    base = arguments.finite("scores", scores, len(encoded))
    longest = max(map(len, encoded))

    def of(way: str, scored: Callable[[], Any], why: str | None = None) -> Way:
        if why is not None:
            return Way(way, float("nan"), -1, 0, len(encoded), why)
        off = np.abs(arguments.finite("scores", scored(), len(encoded)) - base)
        return Way(way, float(off.max()), int(off.argmax()), int((off > 0).sum()), len(encoded), "")

    unpacked = isinstance(rm.packed_engine(), str)
    why = _not_plain(rm)
    rows = [
        of("alone", lambda: [float(score([item])) for item in encoded]),
        of("in small batches, reversed", lambda: score(encoded[::-1], batch_tokens=2 * longest).flip(0)),
        of(
            "padded engine", lambda: score(encoded, engine="padded"),
            "the only one that this model has" if unpacked else "it promises no equal bits" if rm.invariant else None,
        ),
        of("transformers, alone", lambda: plain(rm, encoded, 1), why),
        of("transformers, batches of 8", lambda: plain(rm, encoded, _BATCH), why or _not_padded(rm)),
    ]  # fmt: skip
    return Parity(rows, float(base.std()))


def plain(rm: Scorer, encoded: Sequence[Encoded], size: int) -> list[float]:
    """The rewards by transformers' own forward, of right-padded batches of `size` texts in their order.

    A head that is data or a function is put on the last hidden states of the body's own forward, by torch's products.
    """
    import torch

    from rmfast.binding.modules import call_arguments, hidden_state_of, logits_of
    from rmfast.binding.rope import fresh_rope
    from rmfast.binding.session import eval_mode, lock_of

    binding, found = rm.binding, []
    run = binding.root if binding.program is None else binding.body
    with torch.no_grad(), lock_of(binding.root), eval_mode(binding.root):
        for start in range(0, len(encoded), size):
            batch = encoded[start : start + size]
            fresh_rope(binding.rope)
            ids, mask, *types = [torch.from_numpy(array).to(binding.device) for array in _padded(rm, batch)]
            out = run(**call_arguments(run, ids, mask, types[0] if types else None))
            if binding.program is not None:
                states = hidden_state_of(out)
                found += [_of_program(rm, states[i, : len(item)], item, start + i) for i, item in enumerate(batch)]
                continue
            logits: Any = logits_of(out)
            if logits.dim() == 3:
                at = [rm.position(item.ids, start + i) for i, item in enumerate(batch)]
                logits = logits[list(range(len(batch))), at]
            found += logits.reshape(len(batch)).double().tolist()
    return found


def _of_program(rm: Scorer, states: Tensor, item: Encoded, index: int) -> float:
    """The reward of a text's normed states (T, d) by a head that is no module of the model."""
    import torch

    from rmfast.engine.programs import gate_position

    program = rm.binding.program
    if program.pools:
        return float(program.of_text(states))

    def apply_to(rows: Tensor) -> Callable[[Tensor, Any], Tensor]:
        def apply(weight: Tensor, bias: Any) -> Tensor:
            dtype = torch.promote_types(torch.promote_types(rows.dtype, weight.dtype), torch.float32)
            return torch.nn.functional.linear(
                rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            )

        return apply

    row = states[rm.position(item.ids, index)][None]
    values = program.values(apply_to(row), lambda: row)
    if not program.gated:
        return float(program.rewards(values))
    gate = program.gate_values(apply_to(states[gate_position(rm.binding, item, index)][None]))
    # A text's values are the attributes and behind them the gate's, of which each of the two rows has its own.
    both = torch.cat([values, gate], 1)
    return float(program.rewards(both, both))


def _padded(rm: Scorer, batch: Sequence[Encoded]) -> Iterator[np.ndarray]:
    """Ids, attention mask and, of an encoder's texts that have them, token types."""
    longest, binding = max(map(len, batch)), rm.binding

    def rows(of: Callable[[Encoded], np.ndarray], fill: int) -> np.ndarray:
        return np.stack([np.pad(of(item), (0, longest - len(item)), constant_values=fill) for item in batch])

    yield rows(lambda item: item.ids, binding.pad_id)
    yield rows(lambda item: np.ones(len(item), np.int64), 0)
    if not binding.causal and all(item.types is not None for item in batch):
        yield rows(lambda item: item.types if item.types is not None else item.ids, 0)


def _not_plain(rm: Scorer) -> str | None:
    """Why the model's own forward does not give its rewards."""
    if rm.interventions is not None:
        return "it knows no interventions"
    return (
        None
        if rm.pooling == "auto" or rm.binding.program is not None
        else f"it does not read at pooling={rm.pooling!r}"
    )


def _not_padded(rm: Scorer) -> str | None:
    """Why it can't take texts of several lengths at once."""
    if rm.binding.causal and getattr(rm.binding.config, "pad_token_id", None) is None:
        return "the model has no pad_token_id"
    return None

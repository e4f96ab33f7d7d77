"""Runs of heads that are programs: gates at the prompt's end, functions of all tokens, several bindings at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmfast.binding.binding import Binding
from rmfast.heads.given import last_occurrence
from rmfast.texts.inputs import Encoded, InputError

# Numbers of hidden states that are held at once for functions of all tokens: 256 MiB in fp32.
_NUMBERS = 1 << 26

Running = tuple[int | None, bool, str | None]  # batch_tokens, progress, engine


def run_heads(
    scorer: Any, bindings: Sequence[Binding], encoded: list[Encoded], read: list[np.ndarray], running: Running
) -> list[Tensor]:
    """Rewards (len(read[i]), B · K) of each text at its tokens, of B bindings that differ in what they do to rows."""
    program = scorer.binding.program
    if program is not None and program.pools:
        made = [_run_pooled(scorer, binding, encoded, running) for binding in bindings]
        return [torch.cat(parts, 1) for parts in zip(*made)]
    if program is None or not program.gated:
        return scorer.run(encoded, read, *running, _together([binding.rewards for binding in bindings]))
    pairs = run_gated(scorer, encoded, read, running, _together([binding.row_values for binding in bindings]))
    if not pairs:
        return []
    own, of_gate = (x.unflatten(1, (len(bindings), -1)) for x in _rows_of(pairs))
    rewards = [binding.program.rewards(own[:, i], of_gate[:, i]) for i, binding in enumerate(bindings)]
    return list(torch.cat(rewards, 1).split([len(values) for values, _ in pairs]))


def _rows_of(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Values (n, V) of the rows of all texts, and beside each those of its text's gate."""
    return torch.cat([values for values, _ in pairs]), torch.cat(
        [gate.expand(len(values), -1) for values, gate in pairs]
    )


def _together(heads: list[Callable[..., Tensor]]) -> Callable[..., Tensor]:
    return heads[0] if len(heads) == 1 else lambda *given: torch.cat([head(*given) for head in heads], 1)


def gate_position(binding: Binding, item: Encoded, index: int) -> int:
    """The token of a text (index among the inputs, for its error) that the gate of a gated head reads.

    Raises:
        InputError: the text lacks the pattern that ends a prompt.
    """
    at = last_occurrence(item.ids, binding.program.pattern)
    if at is None:
        raise InputError(
            index,
            f"the ids {list(binding.program.pattern)}, which stand between a prompt and its response, are not in it, "
            f"and the gate of {binding.program.kind} reads where they begin",
        )
    return at


def run_gated(
    scorer: Any, encoded: list[Encoded], read: list[np.ndarray], running: Running, head: Callable[..., Tensor],
    told: bool = True,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """What `head` makes of each text's rows read[i], and of the one that the gate of a gated head reads, (1, ...).

    Where prefixes are shared, a prompt is a text of its own, which costs a row for all of its responses.

    Args:
        told: whether the head is given which rows are the gates' (`Scorer.run`), as `Binding.row_values` may be.
    """
    binding = scorer.binding
    gates = [gate_position(binding, item, i) for i, item in enumerate(encoded)]

    def run(texts: list[Encoded], rows: list[np.ndarray], marks: list[np.ndarray]) -> list[Tensor]:
        return scorer.run(texts, rows, *running, head, marks if told else None)

    if binding.clamps_last:  # what a clamp does at the token that is read is not done at the gate's
        free = scorer.moved(replace(binding, clamps=tuple(clamp for clamp in binding.clamps if not clamp.last)))
        values = scorer.run(encoded, read, *running, head)
        return list(zip(values, free.run(encoded, [np.array([gate]) for gate in gates], *running, head)))
    if any(len(rows) != 1 for rows in read):  # all tokens, the gate's among them
        every = [np.arange(len(item)) for item in encoded]
        values = run(encoded, every, [rows == gate for rows, gate in zip(every, gates)])
        return [(value[rows], value[gate : gate + 1]) for value, rows, gate in zip(values, read, gates)]
    if running[2] == "padded" or isinstance(scorer.packed_engine(), str):
        two = [np.append(gate, rows) for gate, rows in zip(gates, read)]
        values = run(encoded, two, [np.array([True, False])] * len(two))
        return [(value[1:], value[:1]) for value in values]
    texts: list[Encoded] = []
    rows: list[np.ndarray] = []
    for item, own, gate in zip(encoded, read, gates):  # a prompt beside its texts, as texts are planned in windows
        texts += [item, replace(item, ids=item.ids[: gate + 1])]
        rows += [own, np.array([gate])]
    values = run(texts, rows, [np.array([False]), np.array([True])] * len(encoded))
    return list(zip(values[::2], values[1::2]))


def _run_pooled(scorer: Any, binding: Binding, encoded: list[Encoded], running: Running) -> list[Tensor]:
    """(1, K) of each text, by a head that is a function of all its rows."""
    results: list[Tensor] = []
    while len(results) < len(encoded):
        start, numbers = len(results), np.cumsum([len(item) * binding.width for item in encoded[len(results) :]])
        some = encoded[start : start + max(1, int(np.searchsorted(numbers, _NUMBERS, side="right")))]
        read = [np.arange(len(item)) for item in some]
        rows = scorer.run(some, read, *running, lambda hidden, rows: binding.normed(hidden, rows)[0])
        with binding.session():
            made = [binding.program.of_text(x.to(binding.device))[None].cpu() for x in rows]
        results += [x.to(torch.promote_types(x.dtype, torch.float32)).clone() for x in made]
    return results


def outputs(scorer: Any, encoded: list[Encoded], read: list[np.ndarray], running: Running) -> dict[str, Any]:
    """The named parts of the rewards: see `RewardModel.score` with output="all"."""
    program, labels = scorer.binding.program, scorer.num_labels
    if program is None or program.pools:
        values = scorer.run(encoded, read, *running)
        found = {"rewards": torch.cat(values) if values else torch.empty(0, labels)}
    elif program.gated:
        pairs = run_gated(scorer, encoded, read, running, scorer.binding.row_values)
        found = program.outputs(*(_rows_of(pairs) if pairs else (_no_values(scorer.binding),) * 2))
    else:
        values = scorer.run(encoded, read, *running, scorer.binding.row_values) or [_no_values(scorer.binding)]
        found = program.outputs(torch.cat(values))
    scores = found.pop("scores", found["rewards"])
    count = found["rewards"].size(1)
    names = _labels(scorer.binding, count) if program is None else program.names
    names = names or tuple(map(str, range(count)))
    return {"scores": scores[:, 0] if labels == 1 else scores, **found, "names": list(names)}


def _labels(binding: Binding, count: int) -> tuple[str, ...]:
    """The configuration's names of a model's own labels, where it has given them some."""
    known = getattr(binding.config, "id2label", None) or {}
    names = tuple(str(known.get(i)) for i in range(count))
    given = len(known) == count and not all(name in (f"LABEL_{i}", "None") for i, name in enumerate(names))
    return names if given else ()


def _no_values(binding: Binding) -> Tensor:
    """The values of no rows."""
    with binding.session():
        hidden = torch.zeros(1, 1, binding.width, device=binding.device)
        values = binding.row_values(hidden, torch.zeros(0, dtype=torch.int64, device=hidden.device)).cpu()
    return values.clone()

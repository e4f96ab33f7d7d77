"""Padded runs: batches of texts of about one length, right-padded, through the model's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from rmfast.binding.binding import Binding
from rmfast.binding.session import reading
from rmfast.engine.memory import out_of_memory
from rmfast.texts.inputs import Encoded

# What starting another batch costs, in tokens: the weights are read once more (a 135M fp32 model on 2 cores: 27 ms, as
# long as 27 tokens) and on a GPU a few hundred kernels are launched (30 ms, as long as 750 tokens of an 8B model).
_BATCH_COST = {"cpu": 64}
_BATCH_COST_ACCELERATOR = 1024


def run_padded(
    binding: Binding, encoded: list[Encoded], read: list[np.ndarray], batch_tokens: int, bar: tqdm, head: Callable,
    marks: list[np.ndarray] | None = None,
) -> list[Tensor]:  # fmt: skip
    """What `head` makes of each text's rows read[i], on the device; inside `binding.session()`."""
    results: list[Any] = [None] * len(encoded)
    cost = _BATCH_COST.get(binding.device.type, _BATCH_COST_ACCELERATOR)
    pending = list(batches([len(item) for item in encoded], batch_tokens, cost, binding.length_group))[::-1]
    while pending:
        batch = pending.pop()
        try:
            marked = None if marks is None else [marks[i] for i in batch]
            values = run_batch(binding, [encoded[i] for i in batch], [read[i] for i in batch], head, marked)
        except RuntimeError as error:
            if len(batch) == 1 or not out_of_memory(error):
                raise
            pending += [batch[len(batch) // 2 :], batch[: len(batch) // 2]]
            continue
        # Results stay on their device until the end: a copy to the host would wait for each batch.
        for i, value in zip(batch, values.split([len(read[i]) for i in batch])):
            results[i] = value
        bar.update(len(batch))
    return results


def batches(lengths: list[int], batch_tokens: int, cost: int, group: Callable[[int], tuple]) -> Iterator[list[int]]:
    """Batches of indices, longest text first (memory runs out at once or never), of one length group each.

    A batch ends at the budget, or where its padding would come to cost more tokens than another batch does.
    """
    batch: list[int] = []
    padding = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch:
            longest = lengths[batch[0]]
            padding += longest - lengths[i]
            full = (len(batch) + 1) * longest > batch_tokens
            if full or padding > cost or group(lengths[i]) != group(longest):
                yield batch
                batch, padding = [], 0
        batch.append(i)
    if batch:
        yield batch


def run_batch(
    binding: Binding, items: list[Encoded], read: list[np.ndarray], head: Callable[..., Tensor],
    marks: list[np.ndarray] | None = None,
) -> Tensor:  # fmt: skip
    """Rewards (sum of len(read), K) of one right-padded batch."""
    longest = max(map(len, items))
    device = binding.device
    ids = np.full((len(items), longest), binding.pad_id, np.int64)
    mask = np.zeros((len(items), longest), np.int64)
    types = np.zeros((len(items), longest), np.int64)
    for i, item in enumerate(items):
        ids[i, : len(item)] = item.ids
        mask[i, : len(item)] = 1
        if item.types is not None:
            types[i, : len(item)] = item.types
    # A decoder that takes token types (GPT-2) looks them up as words; only encoders have them in their inputs.
    typed = not binding.causal and any(item.types is not None for item in items)
    args = [torch.from_numpy(x).to(device) for x in (ids, mask, *([types] if typed else []))]
    if not binding.reads_rows:
        return binding.pooled(*args)
    rows = torch.from_numpy(np.concatenate([i * longest + r for i, r in enumerate(read)])).to(device)
    with reading(ids.size, rows):
        hidden = binding.hidden(*args)
    return head(hidden, rows.to(hidden.device), *marked_rows(marks, hidden.device))


def marked_rows(marks: list[np.ndarray] | None, device: torch.device) -> list[Tensor]:
    """Where the marks of some rows are set, (G,) int64, for a head that is told of them."""
    return [] if marks is None else [torch.from_numpy(np.flatnonzero(np.concatenate(marks))).to(device)]

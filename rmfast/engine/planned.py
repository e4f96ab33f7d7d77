"""Texts by the suffix engine: planned a window at a time, run chunk by chunk, in smaller ones where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from rmfast.binding.binding import Binding
from rmfast.engine.memory import out_of_memory
from rmfast.engine.packed import Engine
from rmfast.engine.padded import marked_rows
from rmfast.engine.planner import plan, windows
from rmfast.texts.inputs import Encoded

# A budget that is halved each time memory runs out stops here.
_LEAST_BATCH_TOKENS = 64


def run_packed(
    engine: Engine,
    binding: Binding,
    encoded: list[Encoded],
    read: list[np.ndarray],
    batch_tokens: int,
    bar: tqdm,
    head: Callable,
    marks: list[np.ndarray] | None = None,
) -> list[Tensor]:
    """What `head` makes of each text's rows read[i], on the device; inside `binding.session()`."""
    results: list[Any] = [None] * len(encoded)
    for todo, longest in planning_windows(binding, encoded):
        while todo:
            ids = np.concatenate([encoded[i].ids for i in todo], dtype=np.int32)
            cu = np.cumsum([0, *(len(encoded[i]) for i in todo)])
            one = all(len(read[i]) == 1 for i in todo)
            positions = np.array([read[i][0] for i in todo]) if one else "all"
            shared = ids
            if binding.clamps_last:
                # A clamped row is no other text's: to the planner the token that is read has an id of its own.
                shared = ids.copy()
                shared[cu[:-1] + positions] += binding.vocab_size
            kept = None if engine.graphs is None else 0
            planned = plan(shared, cu, batch_tokens=batch_tokens, keep_tokens=kept, read=positions)  # type: ignore[arg-type]
            values: list[Tensor] = []
            marked = None
            if marks is not None:  # a row may be several texts'
                marked = np.zeros(planned.cu_reads[-1], bool)
                np.logical_or.at(marked, planned.read_index, np.concatenate([marks[i] for i in todo]))
            try:
                chunks = engine.run(ids, planned, longest)
                for (first, last), (chunk, hidden) in zip(pairwise(planned.cu_reads), chunks):
                    rows = torch.arange(hidden.size(0), device=hidden.device)
                    told = marked_rows(None if marked is None else [marked[first:last]], hidden.device)
                    values.append(head(hidden[None], rows, *told)[: len(chunk.read_rows)])
                    bar.update(len(chunk.inputs))
            except RuntimeError as error:
                if batch_tokens <= _LEAST_BATCH_TOKENS or not out_of_memory(error):
                    raise
                batch_tokens = max(_LEAST_BATCH_TOKENS, batch_tokens // 2)
            done = planned.cu_inputs[len(values)]
            finished = planned.order[:done]
            spans = [(i, i + 1) if one else (cu[i], cu[i + 1]) for i in finished]
            at = np.concatenate([planned.read_index[a:b] for a, b in spans]) if spans else np.zeros(0, np.int64)
            if len(at):
                out = torch.cat(values)
                out = out[torch.from_numpy(at).to(out.device)]
                for i, value in zip(finished, out.split([b - a for a, b in spans])):
                    results[todo[i]] = value
            todo = [todo[i] for i in np.sort(planned.order[done:])]
    return results


def planning_windows(binding: Binding, encoded: list[Encoded]) -> Iterator[tuple[list[int], int]]:
    """Inputs to plan together, and the longest text by which their rotary frequencies go (0 for none)."""
    groups: dict[tuple, list[int]] = {}
    group_of = binding.length_group
    for i, item in enumerate(encoded):
        groups.setdefault(group_of(len(item)), []).append(i)
    for key, group in groups.items():
        lengths = [len(encoded[i]) for i in group]
        # Of one key above 0 all are as long as the group's frequencies need.
        longest = max(lengths) if any(key) else 0
        for window in windows(lengths):
            yield [group[i] for i in window], longest

"""HFRuntime's head inputs, of which it makes scores and prefix scores: packed texts, shared prefixes run once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmfast.engine.memory import out_of_memory
from rmfast.engine.planner import plan, windows
from rmfast.engine.scorer import Scorer
from rmfast.integrations.reward_lens.bound import bound_model, packed_engine
from rmfast.integrations.reward_lens.theirs import Outside, token_ids


def final_head_inputs(original: Any, self: Any, tokenized: Sequence[Any], batch_size: int | None = None) -> Tensor:
    return _head_inputs(self, [token_ids(each) for each in tokenized], every=False)


def full_head_inputs(original: Any, self: Any, batch: Any) -> tuple[Tensor, list[list[int]]]:
    """Rows of padding are 0; reward-lens has there what the model makes of padding, and reads none of it."""
    mask = batch.attention_mask.bool().cpu()
    columns = torch.arange(mask.size(1))
    if "tokenized" not in batch.meta or "offsets" not in batch.meta:
        raise Outside("a batch that its collate did not make")
    offsets = torch.tensor(batch.meta["offsets"])
    if not torch.equal(mask, columns >= offsets[:, None]):
        raise Outside("a batch whose attention mask leaves tokens out")
    ids = batch.input_ids.cpu().numpy()
    flat = _head_inputs(self, [row[keep] for row, keep in zip(ids, mask.numpy())], every=True)
    out = flat.new_zeros(*mask.shape, flat.size(-1))
    out[mask.to(out.device)] = flat
    return out, [columns[keep].tolist() for keep in mask]


def _head_inputs(runtime: Any, texts: list[np.ndarray], every: bool) -> Tensor:
    """What the head is given at each text's last token (n, d), or at all tokens (T₁ + T₂ + ..., d), in its dtype."""
    rm = bound_model(runtime)
    binding, engine, lengths = rm.binding, packed_engine(rm), [len(ids) for ids in texts]
    if len(binding.head) != 1 or binding.head[0] is not runtime.head_module:
        raise Outside("the head is not one module")
    _same_alone(rm, lengths)
    found = []
    try:
        with binding.session():
            for some in windows(lengths):
                ids = np.concatenate([texts[i] for i in some], dtype=np.int32)
                cu = np.cumsum([0, *(lengths[i] for i in some)])
                read: Any = "all" if every else np.array([lengths[i] - 1 for i in some])
                planned = plan(ids, cu, batch_tokens=rm.default_batch_tokens(engine), read=read)
                rows = torch.cat([
                    binding.normed(hidden[None], torch.arange(len(chunk.read_rows), device=hidden.device))[0]
                    for chunk, hidden in engine.run(ids, planned, 0)
                ])  # fmt: skip
                found.append(rows[torch.from_numpy(planned.read_index).to(rows.device)])
            flat = torch.cat(found)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise Outside("out of memory") from error
    return flat.clone()  # outside of inference mode: an ordinary tensor


def _same_alone(rm: Scorer, lengths: Sequence[int]) -> None:
    """Outside where a text gets other numbers in reward-lens' left-padded batch than alone, as it is run here."""
    if not lengths or min(lengths) == 0:
        raise Outside("an empty text")
    if any(rm.binding.length_group(max(lengths))):
        raise Outside("rotary frequencies that depend on the longest text")
    if rm.table is not None and min(lengths) < max(lengths):
        raise Outside("positions are learned, and padding on the left shifts them")

"""Runs on device `meta` in a GPU's place: what goes to the device, what is read back, and which operands lie elsewhere.

A copy from pageable memory and a value that the host reads both hold it up until all kernels before have run, and the
device then waits for the host; on a CPU neither shows.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter

import models as M
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from rmfast import RewardModel, backends
from rmfast.engine.packed import Engine
from rmfast.engine.planner import plan
from rmfast.patching.patcher import patcher_of
from rmfast.patching.sites import KINDS, Edits
from rmfast.patching.suffix_chunk import Chunk
from rmfast.patching.suffix_plan import Plan, sizes

META = torch.device("meta")
OPS = {
    "_reward_head": ["reward_head"],
    "_suffix_attention": ["suffix_attention"],
    "_token_wise": ["rms_norm", "rotary", "gated_activation"],
    "_patch_rows": ["patch_rows"],
}


class Watched(TorchDispatchMode):
    """Counts uploads, and lists what reads back and what mixes devices."""

    def __init__(self):
        super().__init__()
        self.uploads, self.faults = 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.dim()}
        name, to = str(function), str(kwargs.get("device"))
        if "_to_copy" in name and devices == {"cpu"} and to == "meta":
            self.uploads += 1
        elif len(devices) > 1:
            self.faults[f"{name} on {devices}"] += 1
        if "_local_scalar" in name or "nonzero" in name or ("_to_copy" in name and "meta" in devices and to == "cpu"):
            self.faults[f"{name} reads back"] += 1
        return function(*args, **kwargs)


def on_meta(monkeypatch, rm: RewardModel) -> None:
    """Moves the model of a RewardModel there, and has ops give tensors that hold nothing."""
    fakes = {
        name: getattr(importlib.import_module(f"rmfast.ops.{module}"), f"_{name}_fake")
        for module, names in OPS.items()
        for name in names
    }
    choose = backends.choose
    monkeypatch.setattr(backends, "choose", lambda op, device: fakes[op] if device == "meta" else choose(op, device))
    monkeypatch.setattr(type(rm.binding), "device", property(lambda self: META))
    monkeypatch.setattr(Engine, "tile", 4)
    rm.binding.root.to(META)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_a_chunk_is_sent_at_once_and_read_only_at_its_end(family, monkeypatch):
    rm = RewardModel(M.decoder(family))
    engine = rm.packed_engine()
    assert engine.mode == "fused"
    prompt = M.token_ids([40])[0]
    texts = [np.array(prompt + ids) for ids in M.token_ids([5, 9, 7, 30], 4)]
    flat, cu = np.concatenate(texts).astype(np.int32), np.cumsum([0, *map(len, texts)])
    planned = plan(flat, cu, batch_tokens=64, min_shared=2, read=np.array([len(text) - 1 for text in texts]))
    on_meta(monkeypatch, rm)
    with rm.binding.session(), Watched() as watched:
        for chunk, hidden in engine.run(flat, planned, 0):
            assert hidden.device == META and len(hidden) >= len(chunk.read_rows)
            rm.binding.rewards(hidden[None], torch.arange(hidden.size(0), device=META))
    assert len(planned) > 1 and watched.uploads <= len(planned) and not watched.faults, watched.faults


def edits(layers: int, units: dict[str, int], tokens: int) -> Edits:
    """Every kind in every layer at every position, of the last unit."""
    cells = [(kind, layer, at) for kind in units for layer in range(layers) for at in range(tokens)]
    kind, layer, at = (np.array(column) for column in zip(*[(KINDS.index(k), m, t) for k, m, t in cells]))
    unit = np.array([units[k] - 1 for k, _, _ in cells])
    return Edits(
        kind.astype(np.int8), layer.astype(np.int32), at.astype(np.int32), unit.astype(np.int32), np.eye(tokens) > 0
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_chunk_of_a_sweep_is_sent_at_once_and_read_only_at_its_end(family, monkeypatch):
    rm = RewardModel(M.decoder(family))
    clean, corrupted = rm.encode(M.token_ids([9, 9], 4))
    patcher = patcher_of(rm)
    with rm.binding.session():
        base, other = (patcher.record(text, 8, set(KINDS)) for text in (clean, corrupted))
    on_meta(monkeypatch, rm)
    fields = [field.name for field in dataclasses.fields(base)]
    for record in (base, other):
        for name in fields:
            moved = tree_map(lambda x: x.to(META) if isinstance(x, torch.Tensor) else x, getattr(record, name))
            setattr(record, name, moved)
    some = edits(patcher.layers, {kind: patcher.units(kind)[0] for kind in KINDS}, 9)
    rows, entry = sizes(base, some, patcher.layers, every=False)
    order = np.lexsort((-rows, entry))
    layers = [layer for _, layer in patcher.engine.layers]
    with rm.binding.session(), Watched() as watched:
        plan = Plan(base, some[order], entry[order], len(layers), 4, frozen_patterns=False, every=False)
        rewards = Chunk(rm.binding, layers, plan, other.activations).run()
    assert rewards.shape == (len(some), 1) and rewards.device == META
    assert watched.uploads <= 1 and not watched.faults, watched.faults

"""Rows of reward-lens with the integration on, against itself with it off: the component grid and the head grid.

Both run PatchGrid on one pair: the rejected text's activations in the chosen one, at all positions. Where reward-lens
is not installed there are none; `PYTHONPATH=build/reward-lens-3.1.0` after `make test-reward-lens` lays a version over.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from bench import scoring
from bench.registry import Benchmark, Maker
from bench.sweep import LLAMA, TINY, Some, Sweep
from rmfast.integrations import reward_lens as integration


def grid(on: bool) -> Maker:
    def make(p: Sweep) -> Callable[[Any], Some]:
        from reward_lens.measure.base import Context, run
        from reward_lens.measure.battery.patch import PatchGrid
        from reward_lens.signals.loaders import wrap_hf_model

        tokenizer = scoring.numbers()  # token ids come to it as words
        tokenizer.chat_template = "{{ messages[1]['content'] }}"
        signal = wrap_hf_model(p.model, tokenizer, device=str(p.device), conformance_quickcheck=False)
        rejected, chosen = (" ".join(map(str, ids)) for ids in p.inputs[0])
        observable = PatchGrid("head" if p.grids == ["heads"] else "component")
        base = float(signal.score([("", chosen)]).value.values[0])

        def measured(texts: Any) -> Some:
            with integration.enable() if on else nullcontext():
                value = run(observable, Context(signal=signal, view=[("", chosen, rejected)])).value
                if on:
                    assert "PatchGrid.measure: 1 × rmfast" in integration.explain(), integration.explain()
            effects = torch.tensor(value["per_pair_effect"][0], dtype=torch.float64)
            if p.grids == ["components"]:  # its order is attention, MLP, layer by layer
                effects = effects.reshape(-1, 2).T.flatten()
            return list(range(len(p.sites))), base - effects

        return measured

    return make


def _row(name: str, grids: str) -> Benchmark:
    shape = {
        "model": json.dumps({**LLAMA, "num_hidden_layers": 8}),
        "tokens": 128, "shared": 0, "grids": grids, "dtype": "float32",
    }  # fmt: skip
    return Benchmark(
        f"reward-lens/{name}",
        shape,
        quick=shape | {"model": TINY, "tokens": 6},
        problem=Sweep,
        ours=grid(on=True),
        baselines={"reward-lens": {"": grid(on=False)}},
        limit={"cpu": "gemm", "cuda": "gemm"},
        targets={"cpu": {"reward-lens": 2}},
        rounds=(3, 20),
    )


BENCHMARKS = (
    [_row("component-grid-fp32", "components"), _row("head-grid-fp32", "heads")]
    if importlib.util.find_spec("reward_lens")
    else []
)

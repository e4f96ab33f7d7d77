"""Every Triton kernel with its programs in random order: the same bits, and no two programs that write one place."""

from __future__ import annotations

import pytest
import test_suffix_attention as attention
import torch

triton = pytest.importorskip("triton", minversion="3.6")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1, in a process of its own", allow_module_level=True)

import triton.language as tl  # noqa: E402
from shuffled import shuffled  # noqa: E402

from rmfast.kernels.binned_mmd import triton as binned_mmd  # noqa: E402
from rmfast.kernels.neuron_stats import triton as neuron_stats  # noqa: E402
from rmfast.kernels.patch_rows import triton as patch_rows  # noqa: E402
from rmfast.kernels.reward_head import reference  # noqa: E402
from rmfast.kernels.reward_head import triton as reward_head  # noqa: E402
from rmfast.kernels.suffix_attention import triton as suffix_attention  # noqa: E402
from rmfast.kernels.tcrm import triton as tcrm  # noqa: E402
from rmfast.kernels.token_wise import triton as token_wise  # noqa: E402
from rmfast.kernels.topk_encode import triton as topk_encode  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
BF16 = torch.bfloat16


def draw(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape))).to(dtype)


def head(heads: int, directions: int = 0, rows: int = 150):
    some = (draw(directions, 40), draw(3, directions), draw(3, directions, seed=1)) if directions else (None,) * 3
    return reward_head.forward(
        draw(2, rows, 40, dtype=BF16), draw(heads, 40), draw(heads), reference.LAYER, draw(40), draw(40), 1e-5, None,
        *some, None,
    )  # fmt: skip


def head_gradient(heads: int):
    return reward_head.backward(
        draw(400, heads), draw(2, 200, 40, dtype=BF16), draw(heads, 40), reference.RMS, draw(40), 1e-5, None, True, True
    )


def attended(case: str):
    q, k, v, cu_seqlens, *pool = attention.CASES[case].inputs()
    return suffix_attention.forward(q, k, v, cu_seqlens, None, *pool, 0.2, True, 0.0, 0)


def rotated():
    return token_wise.rotary(
        draw(5, 9, 64), draw(5, 3, 64, seed=1), draw(5, 64), draw(5, 64, seed=1), draw(64), draw(64), 1e-6, False
    )


def mmd(features: int):
    x, rows = draw(70, features), draw(70).abs()
    bins = torch.arange(70) // 35 * 35
    ranges = torch.stack([bins, bins + 35, torch.zeros_like(bins), torch.full_like(bins, 70)])
    return binned_mmd.forward(x, ranges, rows, rows, torch.tensor([0.5, 2.0]), True)


def loss(backward: bool):
    bounds = torch.tensor([[0, 7], [7, 20], [0, 5], [5, 20]])
    args = draw(20), draw(20, seed=1), bounds, None, 0.1, 0.01, True
    return tcrm.backward(torch.ones(()), *args) if backward else tcrm.forward(*args)


INDEX = torch.arange(70) % 3
CALLS = {
    "reward_head, few": lambda: head(2),
    "reward_head, many": lambda: head(19),
    "reward_head, interventions": lambda: head(2, 3),
    "reward_head, many with interventions": lambda: head(4, 20, 20),
    "reward_head_backward, fused": lambda: head_gradient(1),
    "reward_head_backward, split": lambda: head_gradient(19),
    "suffix_attention": lambda: attended("prefixes"),
    "suffix_attention, rows of many suffixes": lambda: attended("nested prefixes"),
    "rms_norm": lambda: token_wise.rms_norm(draw(33, 64), draw(64), draw(33, 64, seed=1), draw(64), 1e-5, False),
    "rotary": rotated,
    "gated_activation": lambda: token_wise.gated_activation(draw(5, 1100), draw(5, 1100, seed=1), 0),
    "patch_rows": lambda: patch_rows.patch_rows(draw(3, 40), draw(3, 40), INDEX, INDEX - 1, draw(40), 1e-5, False),
    "neuron_stats": lambda: neuron_stats.neuron_stats(
        draw(9, 130), torch.arange(18, dtype=torch.int32).view(9, 2), torch.ones(2, dtype=torch.float64)
    ),
    "topk_encode": lambda: topk_encode.topk_encode(draw(70, 33), draw(33, 300), None, 5, None, True),
    "binned_mmd of rewards": lambda: mmd(1),
    "binned_mmd of rows": lambda: mmd(8),
    "tcrm": lambda: loss(False),
    "tcrm_backward": lambda: loss(True),
}


def results(call) -> list[torch.Tensor]:
    got = call()
    return [got] if isinstance(got, torch.Tensor) else list(got)


@pytest.mark.parametrize("call", CALLS)
def test_programs_in_any_order_give_the_same_bits_and_write_no_place_twice(call):
    want = results(CALLS[call])
    with shuffled(seed=1) as launches:
        got = results(CALLS[call])
    assert launches.programs > 1 and launches.conflicts == 0
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, want))


@triton.jit
def _everybody_writes_one_place(p_x):
    tl.store(p_x + tl.program_id(0) // 2, tl.program_id(0))


def test_two_programs_that_write_one_place_are_found():
    with shuffled(seed=0) as launches:
        _everybody_writes_one_place[(6,)](torch.zeros(3, dtype=torch.int32))
    assert launches.programs == 6 and launches.conflicts == 3

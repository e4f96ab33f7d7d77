"""Losses of TCRM as the paper writes them, and what tests of losses draw and measure by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from ways import backends_of

import rmfast.ops  # noqa: F401  # so that tcrm has its backends

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TERMS = ("bradley_terry", "smoothness", "lookahead")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
every_tcrm = pytest.mark.parametrize("backend", backends_of("tcrm"))
sum_and_mean = pytest.mark.parametrize("reduction", ["sum", "mean"])


def normal(*shape: int, seed: int = 0, dtype=torch.float64, device="cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def ends(lengths: list[int], device="cpu", dtype=torch.int32) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(dtype)


def written_out(chosen: list[Tensor], rejected: list[Tensor], smooth, lookahead, reduction="sum", margin=None):
    """The loss as the paper writes it, one response and one token at a time, SG a detach; and its terms."""

    def over_tokens(terms: list[Tensor]) -> Tensor:
        if not terms:
            return chosen[0].new_zeros(())
        return torch.stack(terms).sum() if reduction == "sum" else torch.stack(terms).mean()

    sums = [0, 0, 0]
    for b, (w, r) in enumerate(zip(chosen, rejected)):
        gap = w[-1] - r[-1] - (0 if margin is None else margin[b])
        sums[0] = sums[0] - logsigmoid(gap)
        for v in (w, r):
            sums[1] = sums[1] + over_tokens([(v[k - 1] - v[k].detach()) ** 2 for k in range(1, len(v))])
            sums[2] = sums[2] + over_tokens([(v[k] - v[-1].detach()) ** 2 for k in range(len(v) - 1)])
    terms = [term / len(chosen) for term in sums]
    return terms[0] + smooth * terms[1] + lookahead * terms[2], dict(zip(TERMS, terms))


def close(got: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """fp32 sums of what was rounded to the dtype before; gradients are rounded to it once more."""
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-6}.get(got.dtype, torch.finfo(got.dtype).eps)
    scale = truth.abs().max()
    torch.testing.assert_close(got.cpu().double(), truth.cpu().double(), rtol=0, atol=float(tolerance * scale))


def peak_bytes(call) -> int:
    """The most that PyTorch's allocator on the CPU held during a call, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.cumsum(0).max())

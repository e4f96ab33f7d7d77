"""What Triton compiles anew: not each eps, number of heads or number of directions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import pytest
import torch

triton = pytest.importorskip("triton", minversion="3.6")
if triton.knobs.runtime.interpret:
    pytest.skip("compiles kernels, so it needs a process without TRITON_INTERPRET=1", allow_module_level=True)

from aot import build, launches  # noqa: E402
from specialisation import key_of  # noqa: E402

from rmfast.kernels.patch_rows import triton as patch_rows  # noqa: E402
from rmfast.kernels.reward_head import reference  # noqa: E402
from rmfast.kernels.reward_head import triton as reward_head  # noqa: E402
from rmfast.kernels.token_wise import triton as token_wise  # noqa: E402

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def of(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def kernels(calls: Iterable[Callable[[], object]]) -> Counter[str]:
    """How many kernels of each name the calls compile in all."""
    return Counter(name for name, _ in {key_of(launch) for call in calls for launch in launches(call)})


def head(dtype, heads: int, directions: int = 0, index: bool = False, eps: float = 1e-6):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    given = [of(directions, 256, dtype=acc), *[of(4, directions, dtype=acc)] * 2] if directions else [None] * 3
    place = of(64, dtype=torch.int64) if index else None
    hidden, weight, gain = of(1, 64, 256, dtype=dtype), of(heads, 256, dtype=acc), of(256, dtype=acc)
    return lambda: reward_head.forward(
        hidden, weight, None, reference.RMS, gain, None, eps, None, *given, place if directions else None
    )


def head_gradient(dtype, heads: int, d: int = 256, eps: float = 1e-6):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    grad, hidden, weight = of(64, heads, dtype=acc), of(1, 64, d, dtype=dtype), of(heads, d, dtype=acc)
    return lambda: reward_head.backward(grad, hidden, weight, reference.LAYER, None, eps, None, True, True)


@every_dtype
@pytest.mark.parametrize("index", [False, True], ids=["all", "index"])
@pytest.mark.parametrize("heads", [1, 3, 16])
def test_directions_share_the_kernels_of_a_padded_tile(dtype, heads, index):
    found = kernels(head(dtype, heads, directions, index) for directions in range(1, 9))
    assert max(found.values()) == 4, found  # for 1, 2, 4 and 8 directions
    found = kernels(head(dtype, heads, directions, index) for directions in range(17, 28))
    assert max(found.values()) == 1, found  # with the heads no multiple of 16, which stores 16 bytes at once


@every_dtype
def test_heads_share_the_kernels_of_a_padded_tile(dtype):
    assert max(kernels(head(dtype, heads) for heads in range(17, 32)).values()) == 1
    assert max(kernels(head(dtype, heads, 40) for heads in range(17, 24)).values()) == 1
    assert max(kernels(head_gradient(dtype, heads) for heads in range(17, 32)).values()) == 1


NORMS = {
    "reward_head few": lambda dtype, eps: head(dtype, 1, eps=eps),
    "reward_head few, interventions": lambda dtype, eps: head(dtype, 1, 2, eps=eps),
    "reward_head many": lambda dtype, eps: head(dtype, 16, eps=eps),
    "reward_head many, interventions": lambda dtype, eps: head(dtype, 16, 8, index=True, eps=eps),
    "reward_head gradient": lambda dtype, eps: head_gradient(dtype, 1, eps=eps),
    "reward_head gradient of many": lambda dtype, eps: head_gradient(dtype, 16, 1024, eps=eps),
    "rms_norm": lambda dtype, eps: lambda: token_wise.rms_norm(
        of(64, 256, dtype=dtype), of(256, dtype=dtype), None, None, eps, False
    ),
    "rotary": lambda dtype, eps: lambda: token_wise.rotary(
        of(64, 4, 64, dtype=dtype), of(64, 2, 64, dtype=dtype), *[of(64, 64, dtype=dtype)] * 2,
        *[of(64, dtype=dtype)] * 2, eps, False,
    ),
    "patch_rows": lambda dtype, eps: lambda: patch_rows.patch_rows(
        *[of(64, 256, dtype=dtype)] * 2, *[of(64, dtype=torch.int64)] * 2, of(256, dtype=dtype), eps, False
    ),
}  # fmt: skip


@every_dtype
@pytest.mark.parametrize("op", NORMS)
def test_every_eps_shares_a_kernel(op, dtype):
    few, several = (kernels(NORMS[op](dtype, eps) for eps in some) for some in ([1e-6], [1e-5, 1e-6, 1.0, 0.1, 16.0]))
    assert several == few and few


@pytest.mark.parametrize("op", ["reward_head few", "reward_head gradient", "rms_norm"])
def test_eps_reaches_a_kernel_in_fp64(op, tmp_path):
    """A float of Python is an fp32 to Triton where nothing says otherwise: 1e-6 would be off by 3e-8 of it."""
    for dtype in DTYPES:
        taking = [launch for launch in launches(NORMS[op](dtype, 1e-6)) if "eps" in launch[0].arg_names]
        assert taking
        for launch in taking:
            made = build(launch, 90, tmp_path)
            parameter = launch[0].params[launch[0].arg_names.index("eps")]
            assert parameter.annotation_type == "fp64"
            assert ("arith.truncf" in made.ttgir and "cvt.rn.f32.f64" in made.ptx) == (dtype != torch.float64)

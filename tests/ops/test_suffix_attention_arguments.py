"""suffix_attention: what it refuses, by name."""

from __future__ import annotations

import re

import pytest
import torch
from test_suffix_attention import Case

from rmfast.ops import suffix_attention


def ok() -> dict:
    case = Case([3, 2], [(0, 4), (1, 2)])
    names = ("q", "k", "v", "cu_seqlens", "prefix_k", "prefix_v", "prefix_start", "prefix_len")
    return dict(zip(names, case.inputs()))


ERRORS = {
    "q is no tensor": ("q", [1.0], TypeError, "Expected q to be a torch.Tensor, got list"),
    "q of integers": ("q", torch.ones(5, 4, 32, dtype=torch.int32), TypeError, "Expected q to have dtype"),
    "q of two dimensions": ("q", torch.ones(5, 128), ValueError, "Expected q to be of shape (N, Hq, D)"),
    "odd head size": ("q", torch.ones(5, 4, 36), ValueError, "Expected q.size(2), the head size, to be a multiple"),
    "large head size": ("q", torch.ones(5, 4, 264), ValueError, "Expected q.size(2), the head size, to be"),
    "strided q": ("q", torch.ones(5, 4, 64)[..., ::2], ValueError, "Expected q.stride(-1) to be 1, got 2"),
    "strided k": ("k", torch.ones(5, 2, 64)[..., ::2], ValueError, "Expected k.stride(-1) to be 1, got 2"),
    "rows of k": ("k", torch.ones(4, 2, 32), ValueError, "Expected k to have shape (5, *, 32), got (4, 2, 32)"),
    "heads": (
        "k", torch.ones(5, 3, 32), ValueError, "the number of key heads, to be a divisor of the 4 heads of q",
    ),
    "dtype of v": ("v", torch.ones(5, 2, 32).half(), TypeError, "Expected v to have dtype torch.float32"),
    "float cu_seqlens": (
        "cu_seqlens", torch.ones(3), TypeError, "Expected cu_seqlens to have dtype int32 or int64",
    ),
    "no cu_seqlens": ("cu_seqlens", torch.ones(0, dtype=torch.int32), ValueError, "Expected cu_seqlens to be of"),
    "cu_seqlens starts late": ("cu_seqlens", torch.tensor([1, 3, 5]), ValueError, "Expected cu_seqlens[0] to be 0"),
    "cu_seqlens ends early": (
        "cu_seqlens", torch.tensor([0, 3, 4]), ValueError, "cu_seqlens[-1] to be 5, the rows",
    ),
    "cu_seqlens falls": (
        "cu_seqlens", torch.tensor([0, 6, 5]), ValueError, "cu_seqlens not to fall, got [6, 5] at 1",
    ),
    "float cu_queries": (
        "cu_queries", torch.ones(3), TypeError, "Expected cu_queries to have dtype int32 or int64",
    ),
    "cu_queries of more rows": (
        "cu_queries", torch.tensor([0, 1, 5]), ValueError, "to give suffix 1 at most its",
    ),
    "cu_queries ends early": (
        "cu_queries", torch.tensor([0, 1, 2]), ValueError, "cu_queries[-1] to be 5, the rows of q",
    ),
    "half a prefix": ("prefix_v", None, ValueError, "Expected prefix_v to be a tensor, as the other prefix"),
    "heads of the pool": (
        "prefix_k", torch.ones(9, 4, 32), ValueError, "Expected prefix_k to have shape (*, 2, 32)",
    ),
    "prefix_start of one": (
        "prefix_start", torch.tensor([0]), ValueError, "Expected prefix_start to be of shape (2,)",
    ),
    "prefix outside": (
        "prefix_len", torch.tensor([1, 99]), ValueError, "to stay in the 7 rows of prefix_k, got start 1",
    ),
    "prefix before": (
        "prefix_start", torch.tensor([-1, 0]), ValueError, "Expected prefix_start and prefix_len to stay",
    ),
    "negative length": (
        "prefix_len", torch.tensor([1, -1]), ValueError, "Expected prefix_start and prefix_len to stay",
    ),
    "scale": ("scale", 0.0, ValueError, "Expected scale to be finite and above 0, got 0.0"),
    "scale of text": ("scale", "1", TypeError, "Expected scale to be a float, got str"),
    "softcap": ("softcap", -1.0, ValueError, "Expected softcap to be finite and above 0, got -1.0"),
    "window": ("window", 0, ValueError, "Expected window to be at least 1, got 0"),
    "sinks of other heads": ("sinks", torch.ones(2), ValueError, "Expected sinks to have shape (4), got (2,)"),
    "integer sinks": ("sinks", torch.ones(4, dtype=torch.int64), TypeError, "Expected sinks to have dtype float64"),
    "alibi with positions": ("alibi", torch.ones(4, 9), ValueError, "Expected alibi to have shape (4), got (4, 9)"),
    "alibi is no tensor": ("alibi", 0.5, TypeError, "Expected alibi to be a torch.Tensor, got float"),
    "grad of sinks": ("sinks", torch.ones(4).requires_grad_(), ValueError, "Expected sinks not to require grad"),
    "float window": ("window", 2.0, TypeError, "Expected window to be an int, got float"),
    "grad": ("k", torch.ones(5, 2, 32).requires_grad_(), ValueError, "Expected k not to require grad"),
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_bad_input_names_the_argument(error):
    argument, value, kind, message = ERRORS[error]
    with pytest.raises(kind, match=re.escape(message)):
        suffix_attention(**(ok() | {argument: value}))


def test_inputs_that_require_grad_are_fine_without_gradients():
    args = ok()
    want = suffix_attention(**args)
    args["q"] = args["q"].clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(suffix_attention(**args)[0], want[0])


def test_asking_the_registered_op_for_a_gradient_raises():
    args = list(ok().values())
    args[0] = args[0].clone().requires_grad_()
    out, _ = torch.ops.rmfast.suffix_attention(*args[:4], None, *args[4:], 1.0, True, 0.0, 0)
    with pytest.raises(RuntimeError, match="suffix_attention has no gradient"):
        out.sum().backward()

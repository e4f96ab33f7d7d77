"""`linear_value_loss`: TCRM from hidden states is that of the head's values, without copies of them."""

from __future__ import annotations

import pytest
import torch
from losses import TERMS, ends, every_tcrm, normal, peak_bytes, written_out
from torch import Tensor
from ways import backends_of

from rmfast.losses import linear_value_loss


def head(norm: str | None, d: int, dtype=torch.float64, device="cpu") -> dict:
    """Arguments of `reward_head` that a model with this norm has."""
    out = {"weight": normal(1, d, seed=5) / d**0.5, "bias": normal(1, seed=6), "norm": norm}
    if norm is not None:
        out["norm_weight"] = normal(d, seed=7)
    if norm == "layer":
        out["norm_bias"] = normal(d, seed=8)
    return {k: v.to(device, dtype).requires_grad_() if isinstance(v, Tensor) else v for k, v in out.items()}


def leaves(*values: Tensor | str | None) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor)]


@pytest.mark.parametrize("norm", [None, "rms", "gemma_rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@every_tcrm
def test_linear_value_loss_is_tcrm_of_the_heads_values_with_all_gradients(backend, dtype, norm, use_backend):
    device = use_backend(backend)
    lengths = [4, 1, 9, 2, 6, 3]  # three chosen, three rejected
    hidden = normal(25, 40, dtype=dtype, device=device).requires_grad_()
    parameters = head(norm, 40, dtype, device)
    margin = normal(3, seed=9, device=device)
    loss, terms = linear_value_loss(hidden, cu_seqlens=ends(lengths, device), **parameters, margin=margin)
    got = torch.autograd.grad(loss, leaves(hidden, *parameters.values()))

    wide = [v.detach().cpu().double().requires_grad_() for v in leaves(hidden, *parameters.values())]
    x, weight, bias, *norms = wide
    if norm == "layer":
        x = torch.nn.functional.layer_norm(x, (40,), *norms, eps=1e-6)
    elif norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        x = x * (norms[0] + (1 if norm == "gemma_rms" else 0))
    parts = list((x @ weight.T + bias)[:, 0].split(lengths))
    truth, true_terms = written_out(parts[:3], parts[3:], 0.1, 0.01, margin=margin.cpu())
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(loss.cpu().double(), truth, rtol=tolerance, atol=0)
    for name in TERMS:
        torch.testing.assert_close(terms[name].cpu().double(), true_terms[name], rtol=tolerance, atol=0)
    for a, b in zip(got, torch.autograd.grad(truth, wide)):
        torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=tolerance * float(b.abs().max()))


def test_linear_value_loss_takes_padded_batches_with_a_vector_of_weights():
    hidden, weight = normal(25, 40, dtype=torch.float32), normal(40, seed=1, dtype=torch.float32)
    lengths, start = [4, 1, 9, 2, 6, 3], torch.tensor([1, 0, 3, 0, 5, 1])
    options = {"norm": "rms", "smooth": 0.2, "lookahead": 0.3, "reduction": "mean", "response_start": start}
    want, _ = linear_value_loss(hidden, weight, ends(lengths), **options)
    grid = torch.zeros(6, 11, 40)
    mask = torch.zeros(6, 11, dtype=torch.bool)
    for row, part in enumerate(hidden.split(lengths)):
        grid[row, 11 - len(part) :] = part
        mask[row, 11 - len(part) :] = True
    got, _ = linear_value_loss(grid, weight[None], mask, **options)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_linear_value_loss_in_16_bits_is_that_of_the_rounded_inputs(dtype):
    hidden, parameters = normal(25, 64, dtype=dtype), head("rms", 64, dtype)
    lengths = ends([4, 1, 9, 2, 6, 3])
    got, _ = linear_value_loss(hidden, cu_seqlens=lengths, **parameters)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in parameters.items()}
    want, _ = linear_value_loss(hidden.double(), cu_seqlens=lengths, **wide)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", [param for param in backends_of("tcrm") if param.values[0][1] == "cpp"])
def test_linear_value_loss_needs_little_beside_its_gradients(backend, use_backend):
    use_backend(backend)
    hidden = normal(8192, 512, dtype=torch.bfloat16).requires_grad_()
    parameters = head("rms", 512, torch.bfloat16)
    limits = ends([512] * 16)

    def run():
        loss, _ = linear_value_loss(hidden, cu_seqlens=limits, **parameters)
        return torch.autograd.grad(loss, leaves(hidden, *parameters.values()))

    run()
    assert peak_bytes(run) <= 1.05 * hidden.nbytes

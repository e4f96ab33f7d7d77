"""Gradients of the op reward_head, against fp64 autograd of its definition and finite differences."""

from __future__ import annotations

import pytest
import torch
from test_reward_head import case, each_dtype, each_norm, gradients, parameter_names
from ways import DEVICES, backends_of

import rmfast
from rmfast.kernels.reward_head import reference
from rmfast.ops import reward_head

backward_everywhere = pytest.mark.parametrize("where", backends_of("reward_head_backward"))


@backward_everywhere
@each_norm
@each_dtype
@pytest.mark.parametrize("K", [1, 3, 40])
def test_gradients_match_fp64_autograd_of_the_definition(where, norm, dtype, K, use_backend):
    device = use_backend(where)
    for d, rows in ((40, None), (111, None), (576, [3, 0, 14, 3])):
        hidden, kw = case(d=d, K=K, norm=norm, dtype=dtype, device=device)
        if rows:
            kw["rows"] = torch.tensor(rows, device=device)
        got = gradients(hidden, kw, parameter_names(norm))
        with rmfast.backend("eager"):  # itself checked by gradcheck below
            wide = {
                k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kw.items()
            }
            want = gradients(hidden.double(), wide, parameter_names(norm))
        for name in want:
            scale = want[name].abs().max()
            # Each of two equal rows is rounded to hidden's dtype, and so is their sum.
            rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-9}.get(dtype, 0) if name == "hidden" else 0
            tolerance = (1e-12 if got[name].dtype == torch.float64 else 1e-5) + rounding
            error = (got[name].double() - want[name]).abs().max() / scale
            assert error <= tolerance, f"{name}: {error:.2e}"
            assert got[name].dtype == (dtype if name == "hidden" else kw[name].dtype)


@backward_everywhere
def test_gradients_that_nobody_asks_for_are_not_computed(where, use_backend):
    device = use_backend(where)
    hidden, kw = case(device=device)
    full = gradients(hidden, kw, parameter_names("rms"))
    assert torch.equal(gradients(hidden, kw, [])["hidden"], full["hidden"])
    weight = kw["weight"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(reward_head(hidden, **(kw | {"weight": weight})).sum(), weight)
    assert grad.shape == weight.shape


@backward_everywhere
def test_gradients_are_the_same_bits_twice(where, use_backend):
    device = use_backend(where)
    rows = torch.tensor([3, 3, 9, 0, 3], device=device)
    hidden, kw = case(d=200, shape=(300,), K=5, dtype=torch.bfloat16, device=device, rows=rows)
    first, second = (gradients(hidden, kw, parameter_names("rms")) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@backward_everywhere
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("where_nan", ["grad", "weight", "norm_weight"])
def test_a_nan_stays_one_when_a_gradient_is_rounded(where, K, where_nan, use_backend):
    device = use_backend(where)
    hidden, kw = case(d=40, K=K, norm="rms", dtype=torch.bfloat16, device=device)
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).to(device)  # rounding up would give -0
    if where_nan != "grad":
        kw[where_nan][..., 7] = nan
    out = reward_head(hidden.requires_grad_(), **kw)
    (grad,) = torch.autograd.grad(out, hidden, nan.expand(out.shape) if where_nan == "grad" else torch.ones_like(out))
    assert grad.isnan().all()


@backward_everywhere
def test_large_gradients_are_written_whole(where, use_backend):
    device = use_backend(where)  # above 16 MiB the C++ kernels ask for other pages
    hidden, kw = case(d=2048, shape=(2100,), K=1, device=device)
    last = hidden[-7:].clone()
    whole, part = (torch.autograd.grad(reward_head(x.requires_grad_(), **kw).sum(), x)[0] for x in (hidden, last))
    assert whole.isfinite().all()
    assert torch.allclose(whole[-7:], part, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["eager", None])
@each_norm
@pytest.mark.parametrize("kind", ["plain", "rows", "interventions", "index"])
def test_gradcheck(device, backend, norm, kind):
    extra = {}
    if kind in ("rows", "index"):
        extra["rows"] = torch.tensor([3, 0, 14, 3])
    if kind == "index":
        extra["intervention_index"] = torch.tensor([0, -1, 1, 0])
    J = 2 if kind in ("interventions", "index") else 0
    hidden, kw = case(d=9, J=J, I=2 if J else 0, norm=norm, dtype=torch.float64, device=device, **extra)
    kw = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kw.items()}
    names = parameter_names(norm)

    def call(hidden, *values):
        return reward_head(hidden, **(kw | dict(zip(names, values))))

    leaves = [hidden, *(kw[name] for name in names)]
    with rmfast.backend(backend):
        assert torch.autograd.gradcheck(call, [leaf.detach().requires_grad_() for leaf in leaves])


def test_the_reference_itself_is_differentiable():
    hidden, kw = case(d=6, J=2, I=2, norm="layer", dtype=torch.float64)
    wide = [
        kw[k].double() for k in ("weight", "bias", "norm_weight", "norm_bias", "directions", "strengths", "targets")
    ]

    def call(hidden, weight, bias, gain, shift):
        return reference.forward(hidden, weight, bias, 3, gain, shift, 1e-6, None, *wide[4:], None)

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in (hidden, *wide[:4])])


def test_a_second_derivative_raises():
    hidden, kw = case(dtype=torch.float64)
    hidden.requires_grad_()
    (first,) = torch.autograd.grad(reward_head(hidden, **kw).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.sum(), hidden)


@pytest.mark.parametrize("name", ["directions", "strengths", "targets"])
def test_asking_for_a_gradient_of_an_intervention_raises(name):
    hidden, kw = case(J=2, I=1)
    kw[name].requires_grad_()
    with pytest.raises(ValueError, match=f"Expected {name} not to require grad"):
        reward_head(hidden, **kw)
    with torch.no_grad():
        reward_head(hidden, **kw)

"""The op reward_head: numbers against fp64 truth, contracts; on every backend that runs here."""

from __future__ import annotations

import pytest
import torch
from ways import DEVICES, backends_of

from rmfast.ops import reward_head

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NORMS = [None, "rms", "gemma_rms", "layer"]
everywhere = pytest.mark.parametrize("where", backends_of("reward_head"))
each_norm = pytest.mark.parametrize("norm", NORMS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def case(d=64, shape=(3, 5), K=3, J=0, I=0, norm="rms", dtype=torch.float32, device="cpu", seed=0, **extra):  # noqa: E741
    """hidden and keyword arguments of one call; the stream has a mean well off zero and one row in three is large."""
    g = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    hidden = (randn(*shape, d) + 1.5).to(dtype)
    hidden[..., ::3, :] *= 8
    kw = {"weight": randn(K, d).float(), "bias": randn(K).float(), "norm": norm}
    if norm is not None:
        kw["norm_weight"] = randn(d).float()
    if norm == "layer":
        kw["norm_bias"] = randn(d).float()
    if J:
        kw["directions"] = randn(J, d).float() / d**0.5
        kw["strengths"] = torch.rand(I, J, generator=g)
        kw["targets"] = randn(I, J).float()
    kw = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in (kw | extra).items()}
    return hidden.to(device), kw


def truth(hidden, weight, bias=None, norm=None, norm_weight=None, norm_bias=None, eps=1e-6, rows=None, directions=None,
          strengths=None, targets=None, intervention_index=None):  # fmt: skip
    """The definition, in fp64 and without algebra: subtract, normalise, project."""

    def wide(t):
        return None if t is None else t.detach().double()

    h = wide(hidden).reshape(-1, hidden.size(-1))
    h = h if rows is None else h[rows]

    def head(x):
        if norm == "layer":
            x = torch.nn.functional.layer_norm(x, x.shape[-1:], wide(norm_weight), wide(norm_bias), eps)
        elif norm is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            gain = wide(norm_weight)
            x = x if gain is None else x * (1 + gain if norm == "gemma_rms" else gain)
        out = x @ wide(weight).T
        return out if bias is None else out + wide(bias)

    lead = hidden.shape[:-1] if rows is None else rows.shape
    if directions is None:
        return head(h).reshape(*lead, -1)
    P, out = wide(directions), []
    for i in range(strengths.size(0)):
        target = 0 if targets is None else wide(targets)[i]
        out.append(head(h - (wide(strengths)[i] * (h @ P.T - target)) @ P))
    if intervention_index is None:
        return torch.stack(out, 1).reshape(*lead, strengths.size(0), -1)
    plain, index = head(h), intervention_index.reshape(-1)
    rows_out = [plain[n] if i < 0 else out[i][n] for n, i in enumerate(index.tolist())]
    return torch.stack(rows_out).reshape(*lead, -1)


def naive(hidden, **kw):
    """What eager PyTorch gives in hidden's dtype: parameters and every step rounded to it."""
    kw = {k: v.to(hidden.dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kw.items()}
    h = hidden.reshape(-1, hidden.size(-1))
    h = h if kw.get("rows") is None else h[kw["rows"]]
    norm, gain, bias, eps = kw["norm"], kw.get("norm_weight"), kw.get("bias"), kw.get("eps", 1e-6)

    def head(x):
        if norm == "layer":
            x = torch.nn.functional.layer_norm(x, x.shape[-1:], gain, kw.get("norm_bias"), eps)
        elif norm is not None:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
            x = wide.to(x.dtype) * (1 + gain if norm == "gemma_rms" else gain)
        return torch.nn.functional.linear(x, kw["weight"], bias)

    if kw.get("directions") is None:
        return head(h)
    P, target = kw["directions"], kw.get("targets")
    return torch.stack(
        [head(h - (a * (h @ P.T - (0 if target is None else target[i]))) @ P) for i, a in enumerate(kw["strengths"])], 1
    )


def reward_scale(kw) -> float:
    gain = kw.get("norm_weight")
    weight = kw["weight"].double()
    return (weight if gain is None else weight * gain.double()).norm(dim=-1).max().item()


def assert_close_to_truth(got, hidden, kw, atol=2e-6):
    """Error at most twice that of eager PyTorch in the same dtype plus atol of the reward scale."""
    want = truth(hidden, **kw)
    assert got.shape == want.shape
    assert got.dtype == (torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    scale = max(reward_scale(kw), want.abs().max().item())
    if kw.get("intervention_index") is None:
        eager = (naive(hidden, **kw).reshape(want.shape).double() - want).abs().max().item() / scale
    else:
        eager = 0.0
    atol = 1e-13 if hidden.dtype == torch.float64 else atol
    error = (got.double() - want).abs().max().item() / scale
    assert error <= 2 * eager + atol, f"error {error:.2e}, eager's {eager:.2e}"


@everywhere
@each_norm
@each_dtype
@pytest.mark.parametrize("K", [1, 2, 3, 7, 19, 200])
def test_rewards_match_fp64_truth(where, norm, dtype, K, use_backend):
    device = use_backend(where)
    for d in (1, 40, 59, 111, 128, 576, 1025):
        hidden, kw = case(d=d, K=K, norm=norm, dtype=dtype, device=device)
        assert_close_to_truth(reward_head(hidden, **kw), hidden, kw)


@everywhere
@each_norm
@each_dtype
@pytest.mark.parametrize(("K", "J", "I"), [(1, 1, 1), (2, 3, 2), (16, 32, 8), (1, 300, 1)])
def test_interventions_match_the_explicit_form(where, norm, dtype, K, J, I, use_backend):  # noqa: E741
    device = use_backend(where)
    for d in (7, 111, 576):
        hidden, kw = case(d=d, K=K, J=J, I=I, norm=norm, dtype=dtype, device=device)
        assert_close_to_truth(reward_head(hidden, **kw), hidden, kw, atol=5e-6)
        kw["targets"] = None
        assert_close_to_truth(reward_head(hidden, **kw), hidden, kw, atol=5e-6)


@everywhere
@each_norm
def test_each_row_takes_its_own_intervention(where, norm, use_backend):
    device = use_backend(where)
    index = torch.tensor([0, -1, 1, 1, 0, -1, 0], device=device)
    rows = torch.tensor([14, 0, 3, 3, 8, 1, 14], device=device)
    hidden, kw = case(J=4, I=2, norm=norm, device=device, rows=rows, intervention_index=index)
    assert_close_to_truth(reward_head(hidden, **kw), hidden, kw)


@everywhere
def test_an_index_has_the_rows_shape_or_is_flat(where, use_backend):
    device = use_backend(where)
    index = torch.arange(15, device=device).reshape(3, 5) % 3 - 1
    hidden, kw = case(J=2, I=2, device=device, intervention_index=index)
    flat = reward_head(hidden, **(kw | {"intervention_index": index.reshape(-1)}))
    assert torch.equal(reward_head(hidden, **kw), flat)


@everywhere
@each_norm
def test_a_zero_strength_gives_the_plain_reward(where, norm, use_backend):
    device = use_backend(where)
    hidden, kw = case(J=3, I=2, norm=norm, device=device)
    kw["strengths"][1] = 0
    plain = {k: v for k, v in kw.items() if k not in ("directions", "strengths", "targets")}
    torch.testing.assert_close(reward_head(hidden, **kw)[..., 1, :], reward_head(hidden, **plain), rtol=1e-6, atol=1e-6)


@everywhere
@each_norm
@pytest.mark.parametrize("many", [False, True], ids=["few dots", "many dots"])
def test_removing_a_massive_coordinate_does_not_cancel(where, norm, many, use_backend):
    device = use_backend(where)
    hidden, kw = case(d=512, K=12 if many else 1, J=1, I=1, norm=norm, device=device)
    hidden[..., 17] = 3000.0
    kw |= {"directions": torch.eye(512, device=device)[17:18], "strengths": torch.ones(1, 1, device=device)}
    kw["targets"] = None
    got, want = reward_head(hidden, **kw), truth(hidden, **kw)
    scale = max(reward_scale(kw), want.abs().max().item())
    assert (got - want).abs().max().item() / scale < 2e-6


@everywhere
@pytest.mark.parametrize("many", [False, True], ids=["few dots", "many dots"])
def test_a_layer_norm_keeps_its_digits_under_a_large_mean(where, many, use_backend):
    device = use_backend(where)
    hidden, kw = case(d=300, K=12 if many else 1, norm="layer", device=device)
    hidden += 1000
    got, want = reward_head(hidden, **kw), truth(hidden, **kw)
    eager = torch.nn.functional.layer_norm(hidden, (300,), kw["norm_weight"], kw["norm_bias"], 1e-6) @ kw["weight"].T
    eager = (eager + kw["bias"] - want).abs().max()
    assert (got - want).abs().max() <= 2 * eager + 1e-5 * reward_scale(kw)


@everywhere
@each_dtype
def test_strided_views_are_read_in_place_and_nothing_around_them(where, dtype, use_backend):
    device = use_backend(where)
    buffer = torch.full((5, 9, 120), torch.nan, dtype=dtype, device=device)
    view = buffer[1:4, 2:9:3, 5:116]
    hidden, kw = case(d=111, shape=(3, 3), dtype=dtype, device=device)
    view.copy_(hidden)
    many = kw | {"weight": kw["weight"].repeat(5, 1), "bias": None}
    same = torch.equal if where[1] != "eager" else torch.allclose
    assert same(reward_head(view, **kw), reward_head(hidden, **kw))
    assert same(reward_head(view[:, 1], **kw), reward_head(hidden, **kw)[:, 1])
    assert same(reward_head(view, **many), reward_head(hidden, **many))


@everywhere
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("d", [1, 15, 31, 33, 64, 95, 129, 200])
def test_rows_of_16_bits_give_what_their_values_give_in_fp32(where, norm, d, use_backend):
    device = use_backend(where)
    for K in (1, 2, 5):
        hidden, kw = case(d=d, shape=(7,), K=K, norm=norm, dtype=torch.bfloat16, device=device)
        torch.testing.assert_close(reward_head(hidden, **kw), reward_head(hidden.float(), **kw), rtol=1e-4, atol=1e-4)


@everywhere
def test_every_leading_shape_works(where, use_backend):
    device = use_backend(where)
    hidden, kw = case(shape=(2, 3, 4, 5), device=device)
    want = reward_head(hidden, **kw)
    assert want.shape == (2, 3, 4, 5, 3)
    swapped = hidden.transpose(0, 2)
    torch.testing.assert_close(reward_head(swapped, **kw), want.transpose(0, 2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(reward_head(hidden[1, 2, 3, 4], **kw), want[1, 2, 3, 4], rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_a_cuda_device_runs_every_test_of_this_file():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert any(p.values[0][:2] == ("cuda", "triton") for p in backends_of("reward_head"))


def bitwise_backends():
    """All but eager, whose BLAS changes a row's order of additions with the number of rows."""
    return [p for p in backends_of("reward_head") if p.values[0][1] != "eager"]


@pytest.mark.parametrize("where", bitwise_backends())
@each_norm
@pytest.mark.parametrize(("K", "J"), [(1, 0), (3, 0), (7, 0), (16, 0), (20, 0), (1, 2), (16, 32)])
def test_a_row_is_bit_identical_alone_and_in_any_batch(where, norm, K, J, use_backend):
    device = use_backend(where)
    hidden, kw = case(d=333, shape=(131,), K=K, J=J, I=2 if J else 0, norm=norm, dtype=torch.bfloat16, device=device)
    together = reward_head(hidden, **kw)
    for n in (0, 1, 31, 32, 77, 130):
        shifted = torch.empty(333 + 1, dtype=hidden.dtype, device=device)[1:]  # another alignment
        shifted.copy_(hidden[n])
        assert torch.equal(reward_head(shifted, **kw), together[n])


@pytest.mark.parametrize("where", bitwise_backends())
def test_threads_do_not_change_a_bit(where, use_backend):
    device = use_backend(where)
    hidden, kw = case(d=1024, shape=(900,), device=device)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = reward_head(hidden, **kw)
        torch.set_num_threads(2)
        assert torch.equal(alone, reward_head(hidden, **kw))
    finally:
        torch.set_num_threads(before)


@everywhere
@pytest.mark.parametrize("J", [0, 2])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("K", [1, 20])
def test_non_finite_rows_stay_their_own(where, J, bad, K, use_backend):
    device = use_backend(where)
    hidden, kw = case(d=70, shape=(40,), K=K, J=J, I=1 if J else 0, device=device)
    clean = reward_head(hidden, **kw)
    hidden[5, 3] = bad
    got = reward_head(hidden, **kw)
    others = torch.arange(40, device=device) != 5
    assert not got[5].isfinite().any()
    torch.testing.assert_close(got[others], clean[others], rtol=1e-6, atol=1e-6)


@everywhere
@each_dtype
def test_empty_and_smallest_shapes(where, dtype, use_backend):
    device = use_backend(where)
    hidden, kw = case(d=1, shape=(0,), K=2, dtype=dtype, device=device)
    assert reward_head(hidden, **kw).shape == (0, 2)
    assert reward_head(hidden.reshape(0, 4, 1), **kw).shape == (0, 4, 2)
    none = torch.empty(0, dtype=torch.int64, device=device)
    hidden, kw = case(dtype=dtype, device=device)
    assert reward_head(hidden, **kw, rows=none).shape == (0, 3)
    no_directions = {"directions": torch.empty(0, 64, device=device), "strengths": torch.empty(2, 0, device=device)}
    got = reward_head(hidden, **kw, **no_directions)
    assert torch.equal(got, reward_head(hidden, **kw)[..., None, :].expand(3, 5, 2, 3))
    index = torch.zeros(3, 5, dtype=torch.int64, device=device)
    assert reward_head(hidden, **kw, **no_directions, intervention_index=index).shape == (3, 5, 3)
    nothing = {"directions": torch.ones(2, 64, device=device), "strengths": torch.empty(0, 2, device=device)}
    assert reward_head(hidden, **kw, **nothing).shape == (3, 5, 0, 3)


@everywhere
@pytest.mark.parametrize("weights", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_parameters_of_any_dtype_are_used_as_they_are(where, weights, use_backend):
    device = use_backend(where)
    hidden, kw = case(dtype=torch.bfloat16, J=2, I=1, device=device)
    kw = {k: v.to(weights) if isinstance(v, torch.Tensor) else v for k, v in kw.items()}
    out = reward_head(hidden, **kw)
    assert_close_to_truth(out, hidden, kw)
    strided = {k: v.repeat_interleave(2, -1)[..., ::2] if isinstance(v, torch.Tensor) else v for k, v in kw.items()}
    assert torch.equal(reward_head(hidden, **strided), out)


@everywhere
def test_changed_weights_are_noticed(where, use_backend):
    device = use_backend(where)
    hidden, kw = case(J=2, I=1, device=device)
    reward_head(hidden, **kw)
    for name in ("weight", "norm_weight", "directions", "strengths", "bias", "targets"):
        kw[name].data.mul_(-2)  # .data does not move the version counter
        assert_close_to_truth(reward_head(hidden, **kw), hidden, kw)


# Gradients


def gradients(hidden, kw, names):
    leaves = {"hidden": hidden.detach().clone()} | {k: v.detach().clone() for k, v in kw.items() if k in names}
    for leaf in leaves.values():
        leaf.requires_grad_()
    rest = {k: v for k, v in kw.items() if k not in leaves}
    out = reward_head(leaves["hidden"], **{k: v for k, v in leaves.items() if k != "hidden"}, **rest)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device).reshape(out.shape)
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), weights)))


def parameter_names(norm):
    return ["weight", "bias"] + (["norm_weight"] if norm else []) + (["norm_bias"] if norm == "layer" else [])


# PyTorch's own machinery


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["plain", "rows", "interventions"])
def test_opcheck(device, kind):
    hidden, kw = case(device=device, J=2 if kind == "interventions" else 0, I=2)
    hidden.requires_grad_()
    given = [kw.get(k) for k in ("weight", "bias")]
    rows = torch.tensor([0, 3], device=device) if kind == "rows" else None
    args = (hidden, given[0].requires_grad_(), given[1], 1, kw["norm_weight"], None, 1e-6, rows, kw.get("directions"),
            kw.get("strengths"), kw.get("targets"), None)  # fmt: skip
    torch.library.opcheck(torch.ops.rmfast.reward_head.default, args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("J", [0, 2])
def test_compiles_whole_with_the_same_outputs_and_gradients(device, J):
    hidden, kw = case(device=device, J=J, I=2 if J else 0)

    def step(hidden, weight):
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        out = reward_head(hidden * 2, **(kw | {"weight": weight}))
        return out, torch.autograd.grad(out.square().sum(), [hidden, weight])

    @torch.compile(fullgraph=True)
    def forward(hidden, weight):
        return reward_head(hidden * 2, **(kw | {"weight": weight}))

    out, grads = step(hidden, kw["weight"])
    leaves = [hidden.clone().requires_grad_(), kw["weight"].clone().requires_grad_()]
    compiled = forward(*leaves)
    torch.testing.assert_close(compiled, out)
    torch.testing.assert_close(torch.autograd.grad(compiled.square().sum(), leaves), grads)


@everywhere
@pytest.mark.parametrize("J", [0, 2])
def test_autocast_changes_no_number(where, J, use_backend):
    device = use_backend(where)
    hidden, kw = case(norm="layer", J=J, I=2 if J else 0, device=device)
    want, grads = reward_head(hidden, **kw), gradients(hidden, kw, parameter_names("layer"))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(reward_head(hidden, **kw), want)
        again = gradients(hidden, kw, parameter_names("layer"))
    assert all(torch.equal(grads[name], again[name]) for name in grads)


@pytest.mark.parametrize("device", DEVICES)
def test_runs_under_inference_mode_autocast_and_fake_tensors(device):
    hidden, kw = case(dtype=torch.bfloat16, device=device)
    want = reward_head(hidden, **kw)
    with torch.inference_mode():
        assert torch.equal(reward_head(hidden, **kw), want)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(reward_head(hidden, **kw), want)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = reward_head(mode.from_tensor(hidden), **kw)
        assert (fake.shape, fake.dtype) == (want.shape, want.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_more_than_two_to_the_31_elements(device):
    d, n = 4096, 2**19 + 3
    if device == "cpu":
        import psutil

        if psutil.virtual_memory().available < 8 << 30:
            pytest.skip("needs 8 GiB of free memory")
    hidden = torch.zeros(n, d, dtype=torch.bfloat16, device=device)
    hidden[-3:] = torch.randn(3, d, device=device)
    weight = torch.randn(1, d, device=device)
    rows = torch.tensor([n - 1, 0], device=device)
    want = truth(hidden[-3:], weight, norm="rms")
    torch.testing.assert_close(reward_head(hidden, weight, norm="rms")[-3:].double(), want, rtol=1e-4, atol=1e-4)
    got = reward_head(hidden, weight, norm="rms", rows=rows)
    torch.testing.assert_close(got[0].double(), want[2], rtol=1e-4, atol=1e-4)


# Bad input


TWO = {"directions": torch.ones(2, 64), "strengths": torch.ones(1, 2)}


def bad(match, error=ValueError, **change):
    return pytest.param(change, error, match, id=match[:40])


@everywhere
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        bad(r"Expected weight to have shape \(\*, 64\), got \(3, 63\)", weight=torch.ones(3, 63)),
        bad(r"Expected weight to be of shape \(K, 64\) with K >= 1", weight=torch.ones(0, 64)),
        bad(r"Expected bias to have shape \(3\), got \(2,\)", bias=torch.ones(2)),
        bad("Expected norm to be None, .* got 'batch'", norm="batch"),
        bad("Expected norm_weight to have shape", norm_weight=torch.ones(63)),
        bad("Expected norm_bias to be None unless", norm_bias=torch.ones(64)),
        bad("Expected norm_weight to be None with norm=None", norm=None),
        bad("Expected norm to be None, .* got", norm=["rms"]),
        bad("Expected intervention_index to be a tensor, got int", TypeError, **TWO, intervention_index=0),
        bad("Expected eps to be finite and above 0, got 0.0", eps=0.0),
        bad("Expected eps to be finite and above 0, got nan", eps=float("nan")),
        bad("Expected eps to be a float, got str", TypeError, eps="1e-6"),
        bad("Expected weight to be a torch.Tensor, got list", TypeError, weight=[1.0]),
        bad("Expected weight to have dtype", TypeError, weight=torch.ones(3, 64, dtype=torch.int32)),
        bad("Expected rows to have dtype torch.int64", TypeError, rows=torch.tensor([1.0])),
        bad(r"Expected rows to be in \[0, 15\), got 15", rows=torch.tensor([0, 15])),
        bad(r"Expected rows to be in \[0, 15\), got -1", rows=torch.tensor([0, -1])),
        bad("Expected strengths to be None without directions", strengths=torch.ones(1, 2)),
        bad("Expected intervention_index to be None without", intervention_index=torch.zeros(15, dtype=torch.int64)),
        bad("Expected strengths to be a tensor", directions=torch.ones(2, 64)),
        bad("Expected directions to have shape", directions=torch.ones(2, 63), strengths=torch.ones(1, 2)),
        bad("Expected strengths to have shape", directions=torch.ones(2, 64), strengths=torch.ones(1, 3)),
        bad("Expected targets to have shape", **TWO, targets=torch.ones(2, 2)),
        bad("Expected intervention_index to be of shape", **TWO, intervention_index=torch.zeros(3, dtype=torch.int64)),
        bad(r"Expected intervention_index to be in \[-1, 1\), got 1", **TWO, intervention_index=torch.ones(15).long()),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_kernel_runs(where, change, error, match, use_backend):
    device = use_backend(where)
    hidden, kw = case(device=device)
    kw |= {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    if device != "cpu" and "to be in" in match:
        assert reward_head(hidden, **kw).isnan().any()  # a check of values would synchronise
        return
    with pytest.raises(error, match=match):
        reward_head(hidden, **kw)


def test_hidden_itself_is_checked():
    hidden, kw = case()
    with pytest.raises(ValueError, match=r"Expected hidden.stride\(-1\) to be 1, got 5"):
        reward_head(hidden.transpose(-1, -2).contiguous().transpose(-1, -2), **kw)
    with pytest.raises(TypeError, match="Expected hidden to have dtype"):
        reward_head(hidden.long(), **kw)
    with pytest.raises(TypeError, match=r"Expected hidden to be a torch\.Tensor, got ndarray"):
        reward_head(hidden.numpy(), **kw)
    with pytest.raises(ValueError, match=r"Expected hidden to be of shape \(..., d\) with d >= 1"):
        reward_head(hidden[..., :0], torch.ones(1, 0))


def test_arguments_on_two_devices_are_refused():
    hidden, kw = case()
    kw["weight"] = kw["weight"].to("meta")
    with pytest.raises(ValueError, match=r"Expected weight.device to be .* cpu, got meta"):
        reward_head(hidden, **kw)

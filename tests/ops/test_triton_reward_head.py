"""The Triton reward head against fp64 truth: in Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

import pytest
import torch

import rmfast
from rmfast.kernels.reward_head import reference

triton = pytest.importorskip("triton", minversion="3.6")
INTERPRETED = triton.knobs.runtime.interpret
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("Triton needs a CUDA device, or TRITON_INTERPRET=1 for its interpreter", allow_module_level=True)

from rmfast.kernels.reward_head import triton as kernels  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NORMS = [reference.NONE, reference.RMS, reference.GEMMA_RMS, reference.LAYER]
NAMES = ["none", "rms", "gemma_rms", "layer"]
# The square root of what a cancelled row's formula gave, before the row is recomputed, may be of a negative number.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
every_norm = pytest.mark.parametrize("norm", NORMS, ids=NAMES)


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Makes torch.empty return NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def guarded(value: torch.Tensor | None) -> torch.Tensor | None:
    """The value on the device, in the middle of a buffer whose rest is NaN (a large number for integers)."""
    if value is None:
        return None
    pad = 64
    buffer = torch.full(
        (value.numel() + 2 * pad,), torch.nan if value.is_floating_point() else 2**40, dtype=value.dtype
    )
    buffer[pad:-pad] = value.reshape(-1)
    return buffer.to(DEVICE)[pad:-pad].view(value.shape)


def case(dtype, d, heads, rows, norm, directions=0, interventions=3, targets=True, index=False, mean=0.0) -> dict:
    """Arguments of `forward`, on the CPU, in the form that `rmfast.ops` hands to a backend."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64).to(acc)

    some = directions > 0
    return {
        "hidden": (3 * torch.randn(1, rows, d, dtype=torch.float64) + mean).to(dtype),
        "weight": draw(heads, d),
        "bias": draw(heads),
        "norm": norm,
        "norm_weight": None if norm == reference.NONE else draw(d),
        "norm_bias": draw(d) if norm == reference.LAYER else None,
        "eps": 1e-6,
        "rows": None,
        "directions": draw(directions, d) / d**0.5 if some else None,
        "strengths": draw(interventions, directions) if some else None,
        "targets": draw(interventions, directions) if some and targets else None,
        "intervention_index": torch.arange(rows) % (interventions + 1) - 1 if some and index else None,
    }


def run(arguments: dict) -> torch.Tensor:
    """The kernel's result, back on the CPU."""
    on_device = {name: guarded(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    return kernels.forward(**on_device).cpu()


def wide(arguments: dict) -> dict:
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


def scale(arguments: dict) -> torch.Tensor:
    """Size of a reward: ‖a‖ ‖h‖, the norm of a normed row being sqrt(d)."""
    h, w = arguments["hidden"].double(), arguments["weight"].double()
    a = reference.fold_gain(w, arguments["norm"], arguments["norm_weight"])
    size = h.norm(dim=-1).max() if arguments["norm"] == reference.NONE else h.size(-1) ** 0.5
    return a.norm(dim=-1).max() * size


def assert_close(got: torch.Tensor, arguments: dict, roundings: float = 4) -> None:
    """At most twice the error of the eager reference in the same dtype, plus 4 roundings of a reward's size."""
    truth = reference.forward(**wide(arguments))
    eager = reference.forward(**arguments)
    assert got.dtype == eager.dtype and got.shape == eager.shape
    error, allowed = (got - truth).abs().max(), (eager - truth).abs().max()
    assert error <= 2 * allowed + roundings * torch.finfo(got.dtype).eps * scale(arguments), (error, allowed)


@every_dtype
@every_norm
@pytest.mark.parametrize("heads,long", [(1, (576, 1025)), (3, (576, 1025)), (19, (200,))])
def test_rewards_match_the_truth(dtype, norm, heads, long):
    # Few heads take a row whole up to a size, many take it 64 numbers at a time, in fp64 16.
    for d, rows in ((1, 5), (40, 97), (59, 1), (111, 5), (128, 97), *((d, 3) for d in long)):
        arguments = case(dtype, d, heads, rows, norm)
        assert_close(run(arguments), arguments)


@every_dtype
@every_norm
@pytest.mark.parametrize("heads,directions", [(1, 1), (1, 3), (3, 4), (2, 9)])
def test_interventions_match_the_truth(dtype, norm, heads, directions):
    for d, rows, targets, index in ((40, 5, True, False), (128, 20, False, True), (59, 20, True, True)):
        arguments = case(dtype, d, heads, rows, norm, directions, targets=targets, index=index)
        assert_close(run(arguments), arguments)


@every_dtype
@pytest.mark.parametrize("heads,directions", [(1, 0), (19, 0), (1, 3)])
def test_eps_keeps_its_digits(dtype, heads, directions):
    """0.1 as an fp32 is off by 1.5e-8 of it, where all of a small row's norm is eps."""
    arguments = case(dtype, 64, heads, 3, reference.RMS, directions)
    arguments |= {"hidden": 1e-3 * arguments["hidden"], "targets": None, "eps": 0.1}
    assert_close(run(arguments), arguments)


@every_dtype
@pytest.mark.parametrize("heads,directions", [(2, 35), (70, 2)])
def test_many_heads_and_directions_take_several_tiles(dtype, heads, directions):
    arguments = case(dtype, 64, heads, 20, reference.LAYER, directions, interventions=2)
    assert_close(run(arguments), arguments)


@every_dtype
@every_norm
@pytest.mark.parametrize("heads,directions,index", [(1, 2, False), (4, 8, True)])
def test_a_direction_that_carries_nearly_all_of_a_row_is_removed_exactly(dtype, norm, heads, directions, index):
    arguments = case(dtype, 128, heads, 9, norm, directions, targets=False, index=index)
    arguments["hidden"][0, ::3, 7] = 3e4  # rows with one massive coordinate, beside rows without
    arguments["directions"][0] *= 0.01
    arguments["directions"][0, 7] = 1.0
    arguments["directions"][0] /= arguments["directions"][0].norm()
    arguments["strengths"][:2] = torch.eye(2, directions)[0]
    # In fp64 there is no truth above the reference: what both lose in subtracting two numbers 1e4 times the rest.
    assert_close(run(arguments), arguments, 4e4 if dtype == torch.float64 else 4)


@every_dtype
@pytest.mark.parametrize("heads", [1, 19])
def test_a_layer_norm_survives_a_mean_far_above_the_deviation(dtype, heads):
    arguments = case(dtype, 576, heads, 5, reference.LAYER, mean=300.0)
    # In fp64 there is no truth above the reference: what both lose to a mean of 100 standard deviations.
    assert_close(run(arguments), arguments, 400 if dtype == torch.float64 else 4)


@pytest.mark.parametrize("heads", [1, 19])
def test_a_layer_norm_takes_the_whole_range_of_fp16(heads):
    arguments = case(torch.float16, 576, heads, 5, reference.LAYER)
    arguments["hidden"][0, :, :500] = 6e4
    arguments["hidden"][0, :, 500:] = -6e4
    assert_close(run(arguments), arguments)


@every_dtype
@pytest.mark.parametrize("heads,directions", [(3, 0), (3, 9)])
@pytest.mark.parametrize("offset", [0, 8, 1], ids=["wide", "shifted", "misaligned"])
def test_a_view_gives_the_bits_of_a_copy(dtype, heads, directions, offset):
    for d, norm in ((128, reference.LAYER), (59, reference.RMS)):
        arguments = case(dtype, d, heads, 12, norm, directions)
        hidden = arguments["hidden"].view(3, 4, d)
        buffer = torch.full((5, 7, d + 24), torch.nan, dtype=dtype, device=DEVICE)
        view = buffer[1:4, 2:6, offset : offset + d]
        view.copy_(hidden)
        on_device = {name: guarded(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        got = kernels.forward(**{**on_device, "hidden": view}).cpu()
        assert torch.equal(got, run(arguments))


@every_dtype
@pytest.mark.parametrize("heads,directions", [(3, 0), (2, 2), (19, 0), (3, 9)])
def test_a_row_has_the_same_bits_in_any_batch(dtype, heads, directions):
    arguments = case(dtype, 104, heads, 97, reference.LAYER, directions, interventions=2)
    arguments["hidden"][0, 50] *= 100
    everything = run(arguments)
    alone = run({**arguments, "hidden": arguments["hidden"][:, 50:51]})
    picked = torch.tensor([96, 50, 3, 50])
    assert torch.equal(alone, everything[50:51])
    assert torch.equal(run({**arguments, "rows": picked}), everything[picked])


@every_dtype
@pytest.mark.parametrize("heads,directions", [(1, 0), (1, 2), (19, 0)])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
def test_a_row_out_of_range_is_nan_alone(dtype, heads, directions, offset):
    arguments = case(dtype, 128, heads, 6, reference.RMS, directions)
    rows = torch.tensor([0, -1, 5, 6, 2**40, 2])
    buffer = torch.full((8, 152), torch.nan, dtype=dtype, device=DEVICE)
    view = buffer[1:7, offset : offset + 128]
    view.copy_(arguments["hidden"][0])
    on_device = {name: guarded(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    got = kernels.forward(**{**on_device, "hidden": view[None], "rows": guarded(rows)}).cpu()
    whole = run(arguments)
    assert torch.equal(got[[0, 2, 5]], whole[[0, 5, 2]])
    assert got[[1, 3, 4]].isnan().all()


@every_norm
@pytest.mark.parametrize("heads,directions", [(1, 2), (5, 9)])
def test_an_intervention_index_out_of_range_is_nan_alone(norm, heads, directions):
    arguments = case(torch.bfloat16, 64, heads, 6, norm, directions, interventions=3, index=True)
    whole = run(arguments)
    arguments["intervention_index"][[1, 4]] = torch.tensor([-2, 3])
    got = run(arguments)
    assert got[[1, 4]].isnan().all()
    assert torch.equal(got[[0, 2, 3, 5]], whole[[0, 2, 3, 5]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every_norm
@pytest.mark.parametrize("heads,directions", [(2, 0), (2, 2), (19, 0), (3, 9)])
def test_non_finite_rows_stay_their_own(dtype, norm, heads, directions):
    arguments = case(dtype, 64, heads, 7, norm, directions)
    whole = run(arguments)
    arguments["hidden"][0, 1] = torch.nan
    arguments["hidden"][0, 4, 9] = torch.inf
    got = run(arguments)
    clean = [0, 2, 3, 5, 6]
    assert torch.equal(got[clean], whole[clean])
    assert not got[[1, 4]].isfinite().any()


def test_rows_beyond_two_to_the_31_elements_are_reached():
    arguments = case(torch.bfloat16, 64, 2, 3, reference.RMS, 2)
    torch.use_deterministic_algorithms(False)  # leaves the 4 GiB between the rows unwritten, so never really there
    view = torch.empty_strided((1, 3, 64), (0, 2**30 + 64, 1), dtype=torch.bfloat16, device=DEVICE)
    view.copy_(arguments["hidden"])
    on_device = {name: guarded(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    assert torch.equal(kernels.forward(**{**on_device, "hidden": view}).cpu(), run(arguments))


def gradients(
    arguments: dict, grad: torch.Tensor, to=guarded, backward=None, **needs
) -> tuple[torch.Tensor, torch.Tensor]:
    names = ("hidden", "weight", "norm", "norm_weight", "eps", "rows")
    values = [to(x) if isinstance(x, torch.Tensor) else x for x in (arguments[name] for name in names)]
    needs = {"need_rows": True, "need_dots": True, **needs}
    return tuple(x.cpu() for x in (backward or kernels.backward)(to(grad), *values, **needs))


def gradient_sizes(arguments: dict, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest of the terms that the gradients of a row and of a dot are sums of."""
    x, norm = arguments["hidden"][0].double(), arguments["norm"]
    if norm == reference.LAYER:
        x = x - x.mean(-1, keepdim=True)
    scaled = grad.double().abs()
    if norm != reference.NONE:
        scaled = scaled * (x.square().mean(-1, keepdim=True) + arguments["eps"]).rsqrt()
    gain = reference.fold_gain(arguments["weight"].double(), norm, arguments["norm_weight"])
    return (scaled @ gain.abs()).max(), (scaled.T @ x.abs()).max()


@every_dtype
@every_norm
@pytest.mark.parametrize("heads", [1, 3, 19])
def test_gradients_match_the_truth(dtype, norm, heads):
    for d, rows in ((1, 5), (111, 70), (576, 17)):
        arguments = case(dtype, d, heads, rows, norm)
        grad = torch.randn(rows, heads, dtype=arguments["weight"].dtype)
        got = gradients(arguments, grad)
        eager = gradients(arguments, grad, lambda x: x, reference.backward)
        truth = gradients(wide(arguments), grad.double(), lambda x: x, reference.backward)
        for one, other, exact, size in zip(got, eager, truth, gradient_sizes(arguments, grad)):
            assert one.dtype == other.dtype and one.shape == other.shape
            allowed = 2 * (other - exact).abs().max() + 8 * torch.finfo(grad.dtype).eps * size
            if INTERPRETED and one.dtype == torch.bfloat16:
                allowed += torch.finfo(one.dtype).eps * exact.abs().max()  # its conversion to bf16 truncates
            assert (one - exact).abs().max() <= allowed


@every_dtype
@pytest.mark.parametrize("heads", [2, 19])
def test_gradients_of_picked_rows_and_views_and_of_one_kind_alone(dtype, heads):
    for d in (128, 59):
        arguments = case(dtype, d, heads, 6, reference.LAYER)
        picked = torch.tensor([5, 0, 0, 3])
        grad = torch.randn(4, heads, dtype=arguments["weight"].dtype)
        expected = gradients({**arguments, "hidden": arguments["hidden"][:, picked]}, grad)
        buffer = torch.full((8, d + 3), torch.nan, dtype=dtype, device=DEVICE)
        view = buffer[1:7, 1 : d + 1]
        view.copy_(arguments["hidden"][0])

        def to(x, view=view):
            return view[None] if x.dim() == 3 else guarded(x)

        both = gradients({**arguments, "rows": picked}, grad, to)
        assert all(torch.equal(x, y) for x, y in zip(both, expected))
        rows_only = gradients({**arguments, "rows": picked}, grad, to, need_dots=False)
        dots_only = gradients({**arguments, "rows": picked}, grad, to, need_rows=False)
        assert torch.equal(rows_only[0], both[0]) and rows_only[1].numel() == 0
        assert torch.equal(dots_only[1], both[1]) and dots_only[0].numel() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("norm", [None, "rms", "gemma_rms", "layer"])
@pytest.mark.parametrize("interventions", [False, True], ids=["plain", "interventions"])
def test_autograd_through_the_op_matches_eager(dtype, norm, interventions):
    def grads(backend: str, kind: torch.dtype, device: str):
        torch.manual_seed(1)

        def leaf(*shape):
            return torch.randn(shape, dtype=torch.float64).to(device, kind).requires_grad_()

        hidden, weight, bias = leaf(2, 3, 40), leaf(2, 40), leaf(2)
        gain = None if norm is None else leaf(40)
        beta = leaf(40) if norm == "layer" else None
        leaves = [x for x in (hidden, weight, bias, gain, beta) if x is not None]
        extra = {"rows": torch.tensor([4, 1, 1], device=device)}
        if interventions:
            extra |= {"directions": leaf(2, 40).detach() / 6, "strengths": leaf(3, 2).detach()}
        with rmfast.backend(backend):
            out = rmfast.ops.reward_head(hidden, weight, bias, norm=norm, norm_weight=gain, norm_bias=beta, **extra)
            out.square().sum().backward()
        return [leaf.grad.cpu().double() for leaf in leaves]

    truth = grads("eager", torch.float64, "cpu")
    for got, eager, exact in zip(grads("triton", dtype, DEVICE), grads("eager", dtype, "cpu"), truth):
        allowed = 2 * (eager - exact).abs().max() + 16 * torch.finfo(dtype).eps * exact.abs().max()
        assert (got - exact).abs().max() <= allowed


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("heads,directions", [(1, 0), (1, 2), (19, 9)])
def test_a_captured_graph_replays_on_new_rows(heads, directions):
    arguments = case(torch.bfloat16, 128, heads, 20, reference.RMS, directions)
    on_device = {name: guarded(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        kernels.forward(**on_device)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.forward(**on_device)
    on_device["hidden"].mul_(-2)
    graph.replay()
    assert torch.equal(captured, kernels.forward(**on_device))

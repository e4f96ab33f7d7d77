"""linear: fp32 products on weights of 16 bits, on every backend and instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from ways import backends_of

from rmfast.ops import linear

BACKENDS = backends_of("linear")
KERNELS = [param for param in BACKENDS if param.values[0][1] == "cpp"]
WEIGHTS = [torch.float32, torch.bfloat16, torch.float16]
# Around a tile of 8 rows and 48 columns, a block of 96 rows and 256 of depth, and a group of 20 panels.
SIZES = [
    (1, 1, 1),
    (1, 33, 7),
    (5, 300, 50),
    (9, 576, 192),
    (100, 1000, 130),
    (33, 513, 49),
    (7, 16, 1000),
    (97, 255, 97),
]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_kernel = pytest.mark.parametrize("backend", KERNELS)
every_weight = pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
as_conv1d = pytest.mark.parametrize("across", [False, True], ids=["linear", "conv1d"])


def case(
    n: int, d: int, m: int, dtype: torch.dtype, across: bool, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias; x and weight lie in wider buffers that are NaN elsewhere."""
    generator = torch.Generator().manual_seed(n * d + m)

    def strided(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        held = torch.full((rows, columns + 3), torch.nan, dtype=dtype, device=device)
        held[:, :columns] = torch.randn(rows, columns, generator=generator).to(device, dtype)
        return held[:, :columns]

    weight = strided(d, m, dtype) if across else strided(m, d, dtype)
    return strided(n, d, torch.float32), weight, torch.randn(m, generator=generator).to(device, dtype)


def truth(x: Tensor, weight: Tensor, bias: Tensor | None, across: bool) -> Tensor:
    out = x.double() @ (weight.double() if across else weight.double().T)
    return out if bias is None else out + bias.double()


@as_conv1d
@every_weight
@every_backend
def test_products_agree_with_fp64(backend, dtype, across, use_backend, poisoned):
    device = use_backend(backend)
    for sizes in SIZES:
        x, weight, bias = case(*sizes, dtype, across, device)
        for b in (None, bias):
            y = linear(x, weight, b, across=across)
            want = truth(x, weight, b, across)
            assert y.dtype == torch.float32 and y.is_contiguous() and y.shape == want.shape
            # sqrt(d) roundings of products of size 1 are 3e-6 for 1,000 of them.
            assert (y - want).abs().max() <= 3e-6 * max(1.0, want.abs().max().item())


@as_conv1d
@every_weight
@every_kernel
def test_an_element_hangs_on_its_row_and_weights_alone(backend, dtype, across, use_backend):
    use_backend(backend)
    x, weight, _ = case(203, 515, 150, dtype, across)
    whole = linear(x, weight, across=across)
    for rows in (slice(0, 1), slice(7, 12), slice(96, 203), slice(50, 51)):
        assert torch.equal(linear(x[rows], weight, across=across), whole[rows])
    columns = weight[:, 48:101] if across else weight[48:101]
    assert torch.equal(linear(x, columns, across=across), whole[:, 48:101])
    assert torch.equal(linear(x.flip(0), weight, across=across).flip(0), whole)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(linear(x, weight, across=across), whole)
    finally:
        torch.set_num_threads(threads)


@as_conv1d
@every_weight
@every_kernel
def test_few_rows_have_the_bits_of_many(backend, dtype, across, use_backend, poisoned):
    use_backend(backend)
    for d, m in ((31, 16), (64, 17), (300, 7), (515, 150), (576, 48)):
        x, weight, bias = case(20, d, m, dtype, across)
        x[3, d // 2] = torch.inf
        whole = linear(x, weight, bias, across=across)
        for n in range(1, 10):
            for start in (0, 3):
                got = linear(x[start : start + n], weight, bias, across=across)
                assert torch.equal(got.nan_to_num(7), whole[start : start + n].nan_to_num(7))


@every_kernel
def test_few_rows_have_the_same_bits_on_several_threads(backend, use_backend):
    use_backend(backend)
    x, weight, bias = case(20, 1030, 590, torch.bfloat16, False)
    whole = linear(x, weight, bias)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for n in (2, 5, 8):  # of 2^20 products and more each
            assert torch.equal(linear(x[:n], weight, bias), whole[:n])
    finally:
        torch.set_num_threads(threads)


@every_kernel
def test_weights_of_16_bits_give_the_bits_of_their_fp32_copies(backend, use_backend):
    use_backend(backend)
    for dtype in (torch.bfloat16, torch.float16):
        x, weight, bias = case(40, 300, 70, dtype, False)
        weight[0, :8] = torch.tensor([0.0, -0.0, 1e-7, -1e-7, torch.inf, -torch.inf, 65504, 1]).to(dtype)
        got, want = linear(x, weight, bias), linear(x, weight.float(), bias.float())
        assert torch.equal(got.nan_to_num(7), want.nan_to_num(7)) and torch.equal(got.isnan(), want.isnan())


@as_conv1d
@every_weight
def test_gradients_are_those_of_fp64(dtype, across):
    x, weight, bias = case(9, 65, 50, dtype, across)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    wide = [t.double().requires_grad_() for t in (x, weight, bias)]
    linear(*leaves, across=across).square().sum().backward()
    truth(*wide, across).square().sum().backward()
    for got, want in zip(leaves, wide):
        rounding = 1e-6 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps
        assert got.grad.dtype == got.dtype
        assert (got.grad - want.grad).norm() <= rounding * want.grad.norm()


@every_backend
def test_no_rows_no_columns_and_sums_of_nothing(backend, use_backend, poisoned):
    x, weight, bias = case(4, 8, 5, torch.bfloat16, False, use_backend(backend))
    assert torch.equal(linear(x[:, :0], weight[:, :0], bias), bias.float().expand(4, 5))
    assert not linear(x[:, :0], weight[:, :0]).any()
    assert linear(x[:0], weight, bias).shape == (0, 5)
    assert linear(x, weight[:0], bias[:0]).shape == (4, 0)


def test_it_compiles_and_has_a_fake():
    x, weight, bias = case(4, 8, 5, torch.bfloat16, False)
    torch.library.opcheck(torch.ops.rmfast.linear.default, (x, weight, bias.float(), False))


def test_what_does_not_fit_is_named():
    x, weight, bias = case(4, 8, 5, torch.bfloat16, False)
    for error, words, args in (
        (TypeError, "x to be a torch.Tensor", (None, weight)),
        (TypeError, "x to have dtype float32", (x.double(), weight)),
        (ValueError, "x to be of shape", (x[0], weight)),
        (TypeError, "weight to be a torch.Tensor", (x, None)),
        (TypeError, "weight to have dtype", (x, weight.double())),
        (ValueError, r"weight to have shape \(\*, 8\)", (x, weight.T)),
        (ValueError, "weight to be contiguous", (x, weight.clone().T.contiguous().T)),
        (ValueError, r"bias to have shape \(5\)", (x, weight, bias[:3])),
    ):
        with pytest.raises(error, match=words):
            linear(*args)
    with pytest.raises(TypeError, match="across to be True or False"):
        linear(x, weight, across=1)

"""The CUDA kernels' own source, run on the CPU by cuda_emulator: the claims of the ops' tests without a GPU.

What it cannot tell: speed, and how the tensor cores round (the emulator adds 16 exact products, then rounds once).
"""

from __future__ import annotations

import ctypes

import pytest
import test_patch_rows
import test_reward_head as claims
import torch

import rmfast
from rmfast.ops import patch_rows, reward_head
from rmfast.ops._reward_head import as_described

HERE = ("cpu", "cuda", None)
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]  # the order of the emulator's `type`


class Emulator:
    """The signature of `reference.forward`; `processors` and `chunk` choose between the kernels' variants."""

    def __init__(self, library):
        self.library, self.processors, self.chunk = library, 1, 0

    def __call__(
        self, hidden, weight, bias, norm, norm_weight, norm_bias, eps, rows, directions, strengths, targets, index
    ):  # fmt: skip
        M = hidden.size(0) * hidden.size(1) if rows is None else rows.size(0)
        K, J = weight.size(0), 0 if directions is None else directions.size(0)
        I = 0 if strengths is None else strengths.size(0)  # noqa: E741
        shape = (M, K) if directions is None or index is not None else (M, I, K)
        out = torch.full(shape, -12345.0, dtype=weight.dtype)
        tensors = (hidden, weight, bias, norm_weight, norm_bias, rows, directions, strengths, targets, index, out)
        pointers = (ctypes.c_void_p * 11)(*(None if t is None else t.data_ptr() for t in tensors))
        sizes = (ctypes.c_int64 * 10)(*hidden.shape, *hidden.stride()[:2], M, K, J, I, self.chunk)
        error = self.library.emulate(
            TYPES.index(hidden.dtype), pointers, sizes, norm, ctypes.c_double(eps), self.processors
        )
        assert error == 0, "a launch failed, or some thread left while others waited at a barrier"
        assert not (out == -12345.0).any()
        return out


@pytest.fixture
def emulator(emulated, monkeypatch):
    made = Emulator(emulated("reward_head"))
    monkeypatch.setattr(rmfast.backends, "choose", lambda op, device: lambda *args: made(*as_described(*args)))
    return made


def here(where):
    return "cpu"


@claims.each_norm
@claims.each_dtype
@pytest.mark.parametrize("K", [1, 3, 8, 19])
def test_rewards_match_fp64_truth(norm, dtype, K, emulator):
    claims.test_rewards_match_fp64_truth(HERE, norm, dtype, K, here)


@claims.each_norm
@claims.each_dtype
@pytest.mark.parametrize(("K", "J", "I"), [(1, 1, 1), (2, 3, 2), (16, 32, 3)])
def test_interventions_match_the_explicit_form(norm, dtype, K, J, I, emulator):  # noqa: E741
    for d in (7, 111):
        hidden, kw = claims.case(d=d, shape=(5,), K=K, J=J, I=I, norm=norm, dtype=dtype)
        claims.assert_close_to_truth(reward_head(hidden, **kw), hidden, kw, atol=5e-6)
        kw["targets"] = None
        claims.assert_close_to_truth(reward_head(hidden, **kw), hidden, kw, atol=5e-6)


@claims.each_norm
def test_each_row_takes_its_own_intervention(norm, emulator):
    claims.test_each_row_takes_its_own_intervention(HERE, norm, here)


@claims.each_norm
def test_a_zero_strength_gives_the_plain_reward(norm, emulator):
    claims.test_a_zero_strength_gives_the_plain_reward(HERE, norm, here)


@claims.each_norm
@pytest.mark.parametrize("many", [False, True], ids=["few dots", "many dots"])
def test_removing_a_massive_coordinate_does_not_cancel(norm, many, emulator):
    claims.test_removing_a_massive_coordinate_does_not_cancel(HERE, norm, many, here)


@pytest.mark.parametrize("many", [False, True], ids=["few dots", "many dots"])
def test_a_layer_norm_keeps_its_digits_under_a_large_mean(many, emulator):
    claims.test_a_layer_norm_keeps_its_digits_under_a_large_mean(HERE, many, here)


@claims.each_dtype
def test_strided_views_are_read_in_place_and_nothing_around_them(dtype, emulator):
    claims.test_strided_views_are_read_in_place_and_nothing_around_them(HERE, dtype, here)


def test_every_leading_shape_works(emulator):
    claims.test_every_leading_shape_works(HERE, here)


@claims.each_dtype
@pytest.mark.parametrize(("K", "J"), [(1, 0), (8, 0), (40, 0), (1, 2), (3, 30)])
def test_a_row_has_the_same_bits_in_any_batch_variant_and_alignment(dtype, K, J, emulator):
    hidden, kw = claims.case(d=333, shape=(70,), K=K, J=J, I=2 if J else 0, norm="layer", dtype=dtype)
    aligned = torch.nn.functional.pad(hidden, (0, 3))[:, :333]  # rows of 336: 16-byte loads in every dtype
    together = reward_head(aligned, **kw)  # 4 rows to a warp, or 128 to a block
    emulator.processors = 1000  # one row to a warp, or 32 to a block
    assert torch.equal(reward_head(aligned, **kw), together)
    assert torch.equal(reward_head(hidden, **kw), together)  # misaligned, all but some
    assert torch.equal(reward_head(hidden[69], **kw), together[69])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("K", "J"), [(2, 2), (16, 12)], ids=["few dots", "many dots"])
def test_no_result_hangs_on_which_thread_is_first(dtype, K, J, emulator, monkeypatch):
    hidden, kw = claims.case(d=520, shape=(40,), K=K, J=J, I=2, norm="layer", dtype=dtype)
    results = []
    for order in range(4):
        monkeypatch.setenv("EMULATED_ORDER", str(order))
        results.append(reward_head(hidden, **kw))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(("K", "J"), [(1, 2), (9, 4)], ids=["few dots", "many dots"])
@pytest.mark.parametrize("indexed", [False, True])
def test_chunks_of_rows_through_the_workspace_change_nothing(K, J, indexed, emulator):
    extra = {"intervention_index": torch.arange(50) % 3 - 1} if indexed else {}
    hidden, kw = claims.case(d=72, shape=(50,), K=K, J=J, I=2, **extra)
    hidden[3] = hidden[44] = 1000 * kw["directions"][1]  # rows to recompute, in the first chunk and the last
    kw |= {"strengths": torch.ones(2, J), "targets": None}
    whole = reward_head(hidden, **kw)
    emulator.chunk = 16
    assert torch.equal(reward_head(hidden, **kw), whole)


@pytest.mark.parametrize("K", [1, 12], ids=["few dots", "many dots"])
@pytest.mark.parametrize("J", [0, 3])
def test_what_is_out_of_range_gives_nan_in_its_own_row_only(K, J, emulator, monkeypatch):
    monkeypatch.setattr("rmfast.ops._reward_head._check_values", lambda *args: None)  # as on CUDA
    rows = torch.tensor([0, -1, 3, 15, 2**40, 14])
    hidden, kw = claims.case(K=K, J=J, I=2, rows=rows)
    got, bad = reward_head(hidden, **kw), torch.tensor([False, True, False, True, True, False])
    assert got[bad].isnan().all() and got[~bad].isfinite().all()
    if J:
        index = torch.tensor([0, 1, -2, 0, 2, -1])
        got = reward_head(hidden, **kw | {"intervention_index": index, "rows": rows.clamp(0, 14)})
        bad = torch.tensor([False, False, True, False, True, False])
        assert got[bad].isnan().all() and got[~bad].isfinite().all()


@pytest.mark.parametrize("K", [1, 12], ids=["few dots", "many dots"])
@pytest.mark.parametrize("J", [0, 3])
def test_a_nan_or_infinity_stays_in_its_row(K, J, emulator):
    hidden, kw = claims.case(shape=(40,), d=70, K=K, J=J, I=2, norm="layer")
    clean = reward_head(hidden, **kw)
    hidden[3, 7], hidden[17, 69], hidden[39, 0] = torch.nan, torch.inf, -torch.inf
    got = reward_head(hidden, **kw)
    bad = torch.zeros(40, dtype=torch.bool).index_fill(0, torch.tensor([3, 17, 39]), True)
    assert torch.equal(got[~bad], clean[~bad]) and not got[bad].isfinite().any()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_fp16_parts_of_small_and_large_weights_keep_their_digits(scale, emulator):
    hidden, kw = claims.case(d=200, K=20, dtype=torch.float16)
    kw |= {"weight": kw["weight"] * scale, "bias": None}
    want = claims.truth(hidden, **kw)
    assert (reward_head(hidden, **kw) - want).abs().max() < 2e-6 * claims.reward_scale(kw)


# ----------------------------------------------------------------------------------------------------- patch_rows


class EmulatedPatchRows:
    """The signature of `reference.patch_rows`."""

    def __init__(self, library):
        self.library = library

    def __call__(self, base, values, base_rows, value_rows, weight, eps, gemma):
        n, d, same = base_rows.size(0), base.size(1), weight.dtype == base.dtype
        if not same:
            weight = weight.to(torch.float64 if base.dtype == torch.float64 else torch.float32)
        x, y = (torch.full((n, d), -12345.0, dtype=base.dtype) for _ in range(2))
        tensors = (base, values, base_rows, value_rows, weight, x, y)
        pointers = (ctypes.c_void_p * 7)(*(t.data_ptr() for t in tensors))
        sizes = (ctypes.c_int64 * 6)(base.size(0), values.size(0), base.stride(0), values.stride(0), n, d)
        error = self.library.emulate(TYPES.index(base.dtype), pointers, sizes, ctypes.c_double(eps), gemma, same)
        assert error == 0, "a launch failed, or some thread left while others waited at a barrier"
        assert not ((x == -12345.0) | (y == -12345.0)).any()
        return x, y


@pytest.fixture
def patched(emulated, monkeypatch):
    made = EmulatedPatchRows(emulated("patch_rows"))
    monkeypatch.setattr(rmfast.backends, "choose", lambda op, device: made)
    return made


@test_patch_rows.llama_and_gemma
@test_patch_rows.every_dtype
def test_patched_rows_are_copied_and_their_norm_agrees_with_fp64(dtype, gemma, patched):
    test_patch_rows.test_rows_are_copied_and_their_norm_agrees_with_fp64(HERE, dtype, gemma, here, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("module", [test_patch_rows.LlamaRMSNorm, test_patch_rows.Gemma2RMSNorm])
def test_the_norm_of_patched_rows_is_that_of_transformers(module, dtype, patched):
    test_patch_rows.test_the_norm_is_that_of_transformers(HERE, module, dtype, here)


@test_patch_rows.every_dtype
@pytest.mark.parametrize(
    "claim",
    [
        test_patch_rows.test_copies_keep_every_bit,
        test_patch_rows.test_a_row_has_the_same_bits_alone_and_in_any_batch_and_alignment,
        test_patch_rows.test_a_row_too_long_for_registers_is_normed_too,
    ],
)
def test_patched_rows_of_every_dtype(claim, dtype, patched):
    claim(HERE, dtype, here)


@pytest.mark.parametrize(
    "claim",
    [
        test_patch_rows.test_a_weight_of_another_dtype_leaves_the_dtype_of_the_rows,
        test_patch_rows.test_a_non_finite_row_changes_no_other,
        test_patch_rows.test_without_values_or_rows_or_both,
        test_patch_rows.test_rows_of_any_stride_are_read,
    ],
)
def test_patched_rows(claim, patched):
    claim(HERE, here)


def test_patched_rows_out_of_range_give_nan_and_are_not_read(patched):
    test_patch_rows.check_nan_in_its_own_row_only(patched)


@pytest.mark.parametrize("d", [40, 4096], ids=["a warp to a row", "several warps to a row"])
def test_no_patched_row_hangs_on_which_thread_is_first(d, patched, monkeypatch):
    args = test_patch_rows.case(7, 3, 2, d)
    results = []
    for order in range(4):
        monkeypatch.setenv("EMULATED_ORDER", str(order))
        results.append(patch_rows(*args))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))

"""What the CUDA C++ reward head promises beyond test_reward_head: streams, graphs, devices, sizes, variants."""

from __future__ import annotations

import pytest
import test_reward_head as claims
import torch

import rmfast
from rmfast.backends import why_not
from rmfast.ops import reward_head

DEVICE = "cuda"
if torch.cuda.is_available():
    CAUSE = why_not("reward_head", "cuda", DEVICE)
else:
    CAUSE = "needs a CUDA device"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(CAUSE is not None, reason=str(CAUSE))]
HERE = (DEVICE, "cuda", None)
few_and_many = pytest.mark.parametrize("K", [1, 12], ids=["few dots", "many dots"])


@pytest.fixture(autouse=True)
def cuda_backend(poisoned):
    with rmfast.backend("cuda"):
        yield


def case(**kw):
    return claims.case(device=DEVICE, **kw)


@claims.each_norm
@claims.each_dtype
@pytest.mark.parametrize("K", [1, 3, 8, 19, 200])
@pytest.mark.parametrize("d", [1, 40, 59, 111, 576, 1025, 4096])
def test_rewards_match_fp64_truth(norm, dtype, K, d):
    hidden, kw = case(d=d, K=K, norm=norm, dtype=dtype)
    claims.assert_close_to_truth(reward_head(hidden, **kw), hidden, kw)


@claims.each_norm
@claims.each_dtype
@pytest.mark.parametrize(("K", "J", "I"), [(1, 1, 1), (2, 3, 2), (1, 7, 4), (16, 32, 8), (200, 5, 1), (3, 1100, 2)])
def test_interventions_match_the_explicit_form(norm, dtype, K, J, I):  # noqa: E741
    hidden, kw = case(d=576, K=K, J=J, I=I, norm=norm, dtype=dtype)
    claims.assert_close_to_truth(reward_head(hidden, **kw), hidden, kw, atol=5e-6)
    kw["targets"] = None
    claims.assert_close_to_truth(reward_head(hidden, **kw), hidden, kw, atol=5e-6)


@claims.each_dtype
@pytest.mark.parametrize(("K", "J"), [(1, 0), (8, 0), (19, 0), (200, 0), (1, 2), (16, 32)])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_row_has_the_same_bits_in_any_batch_and_alignment(dtype, K, J, norm):
    # 20,000 rows take the variants for many rows (4 to a warp, 128 to a block), 100 those for few.
    hidden, kw = case(d=520, shape=(20000,), K=K, J=J, I=2 if J else 0, norm=norm, dtype=dtype)
    together = reward_head(hidden, **kw)
    assert torch.equal(reward_head(hidden[7:107], **kw), together[7:107])
    shifted = torch.empty(100, 523, dtype=dtype, device=DEVICE)[:, 3:]
    shifted.copy_(hidden[7:107])
    assert torch.equal(reward_head(shifted, **kw), together[7:107])
    assert torch.equal(reward_head(hidden[19999], **kw), together[19999])
    assert torch.equal(reward_head(hidden, **kw), together)


@few_and_many
@pytest.mark.parametrize("J", [0, 3])
def test_what_is_out_of_range_gives_nan_in_its_own_row_only(K, J):
    rows = torch.tensor([0, -1, 3, 15, 2**40, 14], device=DEVICE)
    hidden, kw = case(K=K, J=J, I=2, rows=rows)
    got, bad = reward_head(hidden, **kw), [False, True, False, True, True, False]
    assert got.isnan().flatten(1).all(1).tolist() == bad and got.isnan().flatten(1).any(1).tolist() == bad
    if J:
        index = torch.tensor([0, 1, -2, 0, 2, -1], device=DEVICE)
        got = reward_head(hidden, **kw | {"intervention_index": index, "rows": rows.clamp(0, 14)})
        assert got.isnan().any(1).tolist() == [False, False, True, False, True, False]


@few_and_many
@pytest.mark.parametrize("J", [0, 3])
def test_a_nan_or_infinity_stays_in_its_row(K, J):
    hidden, kw = case(shape=(40,), d=70, K=K, J=J, I=2, norm="layer")
    clean = reward_head(hidden, **kw)
    hidden[3, 7], hidden[17, 69], hidden[39, 0] = torch.nan, torch.inf, -torch.inf
    got = reward_head(hidden, **kw)
    bad = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    bad[[3, 17, 39]] = True
    assert torch.equal(got[~bad], clean[~bad]) and not got[bad].isfinite().any()


def test_every_row_of_a_batch_may_cancel():
    hidden, kw = case(d=512, shape=(3000,), J=2, I=3)
    hidden[:, 17] = 3000.0
    kw |= {"directions": torch.eye(512, device=DEVICE)[16:18], "targets": None}
    kw["strengths"] = torch.ones(3, 2, device=DEVICE)
    got, want = reward_head(hidden, **kw), claims.truth(hidden, **kw)
    assert (got - want).abs().max() < 2e-6 * max(claims.reward_scale(kw), want.abs().max().item())


@few_and_many
def test_work_goes_to_the_current_stream(K):
    hidden, kw = case(d=4096, shape=(4096,), K=K, J=2, I=2)
    want = reward_head(hidden, **kw)
    late = torch.full_like(hidden, torch.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # on the default stream the op would read NaN meanwhile
        late.copy_(hidden)
        got = reward_head(late, **kw)
    stream.synchronize()
    assert torch.equal(got, want)


@few_and_many
@pytest.mark.parametrize("indexed", [False, True])
def test_a_captured_graph_replays_on_new_hidden_states_and_weights(K, indexed):
    extra = {"intervention_index": (torch.arange(33) % 3 - 1).to(DEVICE)} if indexed else {}
    hidden, kw = case(shape=(33,), K=K, J=2, I=2, norm="layer", **extra)
    reward_head(hidden, **kw)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = reward_head(hidden, **kw)
    hidden.copy_(hidden.flip(0) * 1.25)
    hidden[5] = 1000 * kw["directions"][0] / kw["directions"][0].norm() ** 2  # a row to recompute
    kw["weight"].mul_(-0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, reward_head(hidden, **kw))


def test_another_device_runs_on_its_own_stream():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    hidden, kw = case(d=300, K=12, J=2, I=2)
    moved = {k: v.to("cuda:1") if isinstance(v, torch.Tensor) else v for k, v in kw.items()}
    got = reward_head(hidden.to("cuda:1"), **moved)
    assert got.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert torch.equal(got.to(hidden.device), reward_head(hidden, **kw))


@few_and_many
def test_more_than_2_31_elements(K):
    d, n = 4096, 2**31 // 4096 + 300
    if torch.cuda.mem_get_info()[0] < 3 * n * d:
        pytest.skip(f"needs {3 * n * d / 2**30:.0f} GiB of free GPU memory")
    hidden, kw = case(d=d, shape=(300,), K=K, dtype=torch.bfloat16)
    torch.utils.deterministic.fill_uninitialized_memory = False
    large = torch.empty(n, d, dtype=torch.bfloat16, device=DEVICE)
    large[:-300] = 1
    large[-300:] = hidden
    want = reward_head(hidden, **kw)
    assert torch.equal(reward_head(large, **kw)[-300:], want)
    rows = torch.arange(n - 300, n, device=DEVICE)
    assert torch.equal(reward_head(large, **kw, rows=rows), want)
    one = torch.ones(1, d, dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(
        reward_head(large[: n - 300 : 1000], **kw), reward_head(one, **kw).expand(-(-(n - 300) // 1000), K)
    )


def test_two_calls_at_once_do_not_share_a_workspace():
    hidden, kw = case(d=2048, shape=(2000,), K=16, J=8, I=2)
    want = reward_head(hidden, **kw)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    got = []
    for stream in streams:
        with torch.cuda.stream(stream):
            got += [reward_head(hidden, **kw) for _ in range(5)]
    torch.cuda.synchronize()
    assert all(torch.equal(result, want) for result in got)

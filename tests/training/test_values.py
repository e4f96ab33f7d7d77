"""GAE over ragged sequences, and a reward model as its own critic."""

import pytest
import torch
from models import EOS, decoder, encoder, token_ids, tokenizer

import rmfast
from rmfast.values import gae

CU = torch.tensor([0, 1, 1, 8, 40, 41, 105])


def by_loop(values, rewards, cu, gamma, lam):
    out = torch.zeros_like(values)
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist()):
        running = following = 0.0
        for t in reversed(range(start, end)):
            running = rewards[t] + gamma * following - values[t] + gamma * lam * running
            out[t], following = running, values[t]
    return out


def drawn(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(int(CU[-1]), generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.97, 0.9), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_gae_is_the_plain_loop_s(gamma, lam):
    values, rewards = drawn()
    advantages, returns = gae(values, rewards, CU.int(), gamma, lam)
    torch.testing.assert_close(advantages, by_loop(values, rewards, CU, gamma, lam), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, advantages + values, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gae_of_narrow_dtypes_is_float32_s(dtype):
    values, rewards = drawn(dtype)
    advantages, _ = gae(values, rewards, CU)
    assert advantages.dtype == torch.float32
    truth = by_loop(values.double(), rewards.double(), CU, 1.0, 0.95)
    torch.testing.assert_close(advantages.double(), truth, rtol=0, atol=1e-5)


def test_a_sequence_has_the_same_advantages_alone():
    values, rewards = drawn()
    together, _ = gae(values, rewards, CU)
    alone, _ = gae(values[8:40], rewards[8:40], torch.tensor([0, 32]))
    torch.testing.assert_close(together[8:40], alone, rtol=0, atol=0)


def test_a_nan_stays_in_its_own_sequence():
    values, rewards = drawn()
    rewards[20] = torch.nan
    advantages, _ = gae(values, rewards, CU)
    assert advantages[8:21].isnan().all()
    assert not torch.cat((advantages[:8], advantages[21:])).isnan().any()


@pytest.mark.parametrize(
    "change,error",
    [
        ({"values": torch.zeros(5, 21)}, r"values to be of shape \(N,\)"),
        ({"values": torch.zeros(105, dtype=torch.int64)}, "values"),
        ({"rewards": torch.zeros(7)}, r"rewards to be of shape \(105,\)"),
        ({"rewards": [0.0]}, "rewards to be a torch.Tensor"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "105, the number of tokens"),
        ({"cu_seqlens": torch.tensor([0, 9, 3, 105])}, "cu_seqlens to be rising"),
        ({"cu_seqlens": torch.tensor([0.0, 105.0])}, "cu_seqlens"),
        ({"gamma": 1.5}, r"gamma to be a finite number in \[0, 1\]"),
        ({"lam": -0.1}, r"lam to be a finite number in \[0, 1\]"),
    ],
)
def test_bad_gae_arguments_are_named(change, error):
    values, rewards = drawn()
    with pytest.raises((ValueError, TypeError), match=error):
        gae(**{"values": values, "rewards": rewards, "cu_seqlens": CU, **change})


@pytest.fixture(scope="module")
def rm():
    return rmfast.RewardModel(decoder(), tokenizer(chat=True))


PAIRS = [("How?", "So."), ("Which way is the better one?", "This."), ("How?", "So, and then again so.")]


def test_values_are_read_one_token_before_and_the_reward_where_score_reads(rm):
    out = rm.values_and_reward(PAIRS)
    torch.testing.assert_close(out.reward, rm.score(PAIRS), rtol=1e-5, atol=1e-5)
    for values, start, read in zip(out.split(out.values), out.response_start, rm.token_values(PAIRS)):
        torch.testing.assert_close(values, read[start - 1 : -1], rtol=1e-5, atol=1e-5)


def test_a_response_is_what_the_template_puts_behind_the_prompt(rm):
    out = rm.values_and_reward(PAIRS)
    for (_, response), tokens, start in zip(PAIRS, rm.encode(PAIRS), out.response_start):
        # The test template has no assistant header of its own for a prompt alone: <assistant> is the response's.
        assert rm.tokenizer.decode(tokens.ids[start:]) == f"<assistant>{response}</s>"


def test_one_step_advantages_are_the_credits_of_tokens(rm):
    out = rm.values_and_reward(PAIRS, lam=0.0)
    for credit, start, read in zip(out.split(out.advantages), out.response_start, rm.token_values(PAIRS)):
        torch.testing.assert_close(credit, read[start - 1 :].diff(), rtol=1e-5, atol=1e-5)


def test_monte_carlo_returns_are_the_reward(rm):
    out = rm.values_and_reward(PAIRS, lam=1.0)
    for returns, reward in zip(out.split(out.returns), out.reward):
        torch.testing.assert_close(returns, reward.expand_as(returns), rtol=1e-5, atol=1e-5)


def test_penalties_are_added_to_the_rewards(rm):
    plain = rm.values_and_reward(PAIRS)
    penalties = [torch.linspace(-1, 0, n) for n in plain.cu_seqlens.diff().tolist()]
    out = rm.values_and_reward(PAIRS, rewards=penalties)
    torch.testing.assert_close(out.rewards, plain.rewards + torch.cat(penalties))
    expected, _ = gae(out.values, out.rewards, out.cu_seqlens)
    torch.testing.assert_close(out.advantages, expected)


def test_token_ids_say_where_their_response_starts():
    rm = rmfast.RewardModel(decoder())
    ids = token_ids([9, 5])
    out = rm.values_and_reward(ids, response_start=[4, 0])
    full = rm.token_values(ids)
    torch.testing.assert_close(out.split(out.values)[0], full[0][3:-1], rtol=1e-5, atol=1e-5)
    # With no token before it, the first one has its own value, and no credit.
    torch.testing.assert_close(out.split(out.values)[1], full[1][[0, 0, 1, 2, 3]], rtol=1e-5, atol=1e-5)
    assert out.cu_seqlens.tolist() == [0, 5, 10]


def test_all_ways_to_write_a_turn_agree(rm):
    messages = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    one, other, function = (
        rm.values_and_reward([item], format=format)
        for item, format in ((messages, None), ((messages[:1], "So."), None), ("So.", lambda text: ("How?", text)))
    )
    assert one.response_start == other.response_start == function.response_start
    torch.testing.assert_close(one.values, other.values)
    torch.testing.assert_close(one.values, function.values)


def test_without_a_template_the_response_starts_behind_the_prompt_s_tokens():
    rm = rmfast.RewardModel(decoder(), tokenizer())
    out = rm.values_and_reward([("ab", "cde"), ("", "cde")])
    assert out.response_start.tolist() == [3, 1]  # behind BOS
    assert out.cu_seqlens.tolist() == [0, 3, 6]


def test_tokens_behind_the_one_that_is_read_are_left_out():
    rm = rmfast.RewardModel(decoder(pad_token_id=EOS))
    with pytest.warns(UserWarning, match="pad_token_id"):
        out = rm.values_and_reward([[5, 6, 7, 8, EOS]], response_start=[2])
        torch.testing.assert_close(out.reward, rm.score([[5, 6, 7, 8, EOS]]))
    assert out.cu_seqlens.tolist() == [0, 2]


def test_no_inputs_give_no_values(rm):
    out = rm.values_and_reward([])
    assert out.values.shape == out.advantages.shape == out.reward.shape == (0,)
    assert out.split(out.values) == []


@pytest.mark.parametrize(
    "inputs,options,error",
    [
        (["text"], {}, "input 0: it does not say where its response begins"),
        ([PAIRS[0], [{"role": "user", "content": "How?"}]], {}, "input 1: it does not say"),
        (["text"], {"response_start": [5]}, "input 0: its response starts at token 5"),
        (["text"], {"response_start": [-1]}, "input 0: its response starts at token -1"),
        (["text"], {"response_start": [1, 2]}, "response_start to be an int for each of 1 inputs, got 2 of them"),
        (PAIRS, {"rewards": [[0.0]]}, "rewards to be a sequence of numbers for each of 3 inputs"),
        (PAIRS[:1], {"rewards": [[0.0]]}, r"rewards\[0\] to be of shape"),
        (PAIRS, {"gamma": 2.0}, r"gamma to be a finite number in \[0, 1\]"),
    ],
)
def test_bad_arguments_are_named(rm, inputs, options, error):
    with pytest.raises(ValueError, match=error):
        rm.values_and_reward(inputs, **options)


@pytest.mark.parametrize("model", [decoder(labels=3), encoder()], ids=["three labels", "a pooling encoder"])
def test_models_without_one_value_at_each_token_are_refused(model):
    with pytest.raises(ValueError, match="causal model with a head of one label"):
        rmfast.RewardModel(model).values_and_reward([[5, 6, 7]], response_start=[1])

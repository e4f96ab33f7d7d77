"""`RewardModel.score` and `token_values`: the same numbers as the model's own forward, one text at a time."""

from __future__ import annotations

import inspect
import warnings

import models as M
import pytest
import torch

import rmfast
from rmfast import RewardModel
from rmfast.engine.padded import batches
from rmfast.last_token import LastTokenRuns
from rmfast.texts.inputs import InputError

TEXTS = M.token_ids(M.LENGTHS)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("family", M.DECODERS)
def test_scores_are_the_models_own(family, labels):
    model = M.decoder(family, labels)
    got = RewardModel(model).score(TEXTS, batch_tokens=200, max_length=1000)
    want = M.own(model, TEXTS)
    assert got.dtype == torch.float32 and got.shape == ((12,) if labels == 1 else (12, 3))
    assert want.std(0).min() > 0.2  # the rewards tell texts apart
    M.assert_rewards(got, want, M.reward_scale(model))


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("family", [f for f in M.DECODERS if f != "gemma3"])  # which has no token classification
def test_token_values_are_the_models_own(family, labels):
    model = M.decoder(family, labels, "TokenClassification")
    assert model.score.bias is not None
    got = RewardModel(model).token_values(TEXTS, batch_tokens=200, max_length=1000)
    for value, ids in zip(got, TEXTS, strict=True):
        want = M.alone(M.fresh(model), ids)
        M.assert_rewards(value, want[:, 0] if labels == 1 else want, M.reward_scale(model))


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3-longrope"])
def test_token_values_of_a_sequence_classifier_are_its_head_at_every_token(family):
    model = M.decoder(family)
    reward_model = RewardModel(model)
    for value, ids in zip(reward_model.token_values(TEXTS), TEXTS, strict=True):
        with torch.no_grad():
            want = model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, :, 0]
        M.assert_rewards(value, want, M.reward_scale(model))


def test_a_head_with_bias():
    model = M.decoder("llama")
    model.score = torch.nn.Linear(48, 1, bias=True)
    torch.nn.init.constant_(model.score.bias, 2.5)
    M.assert_rewards(RewardModel(model).score(TEXTS), M.own(model, TEXTS), M.reward_scale(model))


@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "phi3-longrope", "llama-dynamic"])
def test_a_score_does_not_depend_on_what_shares_its_batch(family, batch_tokens):
    model = M.decoder(family)
    reward_model = RewardModel(model)
    alone = torch.cat([reward_model.score([ids], max_length=1000) for ids in TEXTS])
    together = reward_model.score(TEXTS, batch_tokens=batch_tokens, max_length=1000)
    M.assert_rewards(together, alone, M.reward_scale(model))


def test_results_are_in_input_order():
    model = M.decoder("llama")
    reward_model = RewardModel(model)
    forward = reward_model.score(TEXTS, batch_tokens=100)
    backward = reward_model.score(TEXTS[::-1], batch_tokens=100)
    M.assert_rewards(backward.flip(0), forward, M.reward_scale(model))


def test_batches_keep_to_the_budget():
    model = M.decoder("llama")
    reward_model = RewardModel(model)
    sizes = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape))
    reward_model.score(TEXTS, batch_tokens=100)
    assert all(b * t <= 100 for b, t in sizes)
    assert len(sizes) <= 6


def test_padding_never_costs_more_than_another_batch():
    lengths = [120, 100, 90, 20, 19, 18, 17, 1]
    some = list(batches(lengths, 4096, 64, lambda length: ()))
    assert some == [[0, 1, 2], [3, 4, 5, 6, 7]]
    assert list(batches(lengths, 4096, 10**6, lambda length: ())) == [list(range(8))]


def test_dynamic_rope_is_left_as_it_was_found():
    model = M.decoder("llama-dynamic")
    model(torch.tensor(M.token_ids([60])))
    before = M.alone(model, TEXTS[4])
    RewardModel(model).score(TEXTS, max_length=1000)
    assert torch.equal(M.alone(model, TEXTS[4]), before)


@pytest.mark.parametrize("family", ["Bert", "DistilBert", "ModernBert", "DebertaV2"])
@pytest.mark.parametrize("labels", [1, 2])
def test_encoders_pool_by_themselves(family, labels):
    model = M.encoder(family, labels)
    got = RewardModel(model).score(TEXTS, batch_tokens=200)
    torch.testing.assert_close(got, M.own(model, TEXTS), rtol=1e-5, atol=1e-5)


def test_roberta_counts_positions_from_its_padding():
    model = M.encoder("Roberta", pad_token_id=1, bos_token_id=0, eos_token_id=2, max_position_embeddings=100)
    reward_model = RewardModel(model)
    assert reward_model.max_length == 98
    texts = [[3 + i % 200 for i in ids] for ids in TEXTS]
    torch.testing.assert_close(reward_model.score(texts, batch_tokens=200), M.own(model, texts), rtol=1e-5, atol=1e-5)


def test_a_cross_encoder_scores_pairs_with_token_types():
    model, tok = M.encoder("Bert"), M.tokenizer("encoder")
    pairs = [("abc", "de"), ("f", "ghijk"), ("lmnopq", "r")]
    want = torch.cat([model(**tok(*pair, return_tensors="pt")).logits[0] for pair in pairs]).detach()
    reward_model = RewardModel(model, tok)
    torch.testing.assert_close(reward_model.score(pairs), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reward_model.score(reward_model.encode(pairs)), want, rtol=1e-5, atol=1e-5)


def test_token_values_of_a_model_that_pools_by_itself_are_refused():
    reward_model = RewardModel(M.encoder("Bert"))
    with pytest.raises(ValueError, match="BertForSequenceClassification pools the whole text by itself"):
        reward_model.token_values(TEXTS)
    with pytest.raises(ValueError, match="can't be read at positions"):
        reward_model.score(TEXTS, positions=[0] * len(TEXTS))
    with pytest.raises(ValueError, match=r"BertForSequenceClassification pools by itself"):
        RewardModel(M.encoder("Bert"), pooling="last")


def test_an_encoder_with_token_values():
    model = M.encoder("Bert", 2, "TokenClassification")
    reward_model = RewardModel(model)
    assert reward_model.binding.norm_kind == "layer" and not reward_model.binding.causal
    for value, ids in zip(reward_model.token_values(TEXTS), TEXTS, strict=True):
        torch.testing.assert_close(value, M.alone(model, ids), rtol=1e-5, atol=1e-5)


# The token that is read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize(
    "text",
    [[1, 2, 3], [1, 2, M.PAD], [1, M.PAD, 3], [M.PAD, 2], [M.PAD, M.PAD], [1, 2, M.PAD, M.PAD]],
    ids=["none", "end", "middle", "start", "all", "ends"],
)
def test_auto_reads_the_token_that_transformers_reads(family, text):
    model = M.decoder(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = RewardModel(model).score([[5, 6, 7, 8], text])
    M.assert_rewards(got, M.own(model, [[5, 6, 7, 8], text]), M.reward_scale(model))


def test_without_a_pad_token_the_last_token_is_read():
    model = M.decoder("llama", pad_token_id=None)
    M.assert_rewards(RewardModel(model).score(TEXTS), M.own(model, TEXTS), M.reward_scale(model))


@pytest.mark.parametrize("pad", [-1, M.VOCAB])
def test_a_pad_token_without_an_embedding_is_never_looked_up(pad):
    model = M.decoder("llama")
    model.config.pad_token_id = pad
    M.assert_rewards(RewardModel(model).score(TEXTS), M.own(model, TEXTS), M.reward_scale(model))


def test_pad_equal_to_eos_is_announced_once_where_it_matters():
    model = M.decoder("llama", pad_token_id=M.EOS)
    reward_model = RewardModel(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward_model.score(TEXTS)
    ends = [[1, 2, M.EOS], [4, M.EOS]]
    with pytest.warns(UserWarning, match=r"ends with token 257, .* and eos_token_id.*last token that is not") as caught:
        got = reward_model.score(ends)
    assert len(caught) == 1 and caught[0].filename == __file__
    M.assert_rewards(got, M.own(model, ends), M.reward_scale(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward_model.score(ends)
        last = RewardModel(model, pooling="last").score(ends)
    want = torch.stack([values[-1] for values in reward_model.token_values(ends)])
    torch.testing.assert_close(last, want)


def test_pooling_last_reads_the_last_token_even_if_it_is_padding():
    reward_model = RewardModel(M.decoder("llama"), pooling="last")
    text = [1, 2, M.PAD]
    torch.testing.assert_close(reward_model.score([text])[0], reward_model.token_values([text])[0][-1])


def test_pooling_at_a_token_id_reads_its_rightmost_occurrence():
    reward_model = RewardModel(M.decoder("llama"), pooling=M.EOS)
    text = [1, M.EOS, 2, M.EOS, 3]
    torch.testing.assert_close(reward_model.score([text])[0], reward_model.token_values([text])[0][3])


def test_pooling_at_a_token_id_that_is_absent_names_the_input():
    with pytest.raises(InputError, match="input 1: token id 257") as caught:
        RewardModel(M.decoder("llama"), pooling=M.EOS).score([[1, M.EOS], [1, 2]])
    assert caught.value.index == 1


def test_positions_are_given_by_the_caller():
    reward_model = RewardModel(M.decoder("llama"))
    values = reward_model.token_values(TEXTS[:3])
    got = reward_model.score(TEXTS[:3], positions=[0, -2, 1])
    torch.testing.assert_close(got, torch.stack([values[0][0], values[1][-2], values[2][1]]))


def test_positions_out_of_range_name_the_input():
    reward_model = RewardModel(M.decoder("llama"))
    with pytest.raises(InputError, match="input 1: position 60 is outside of its 60 tokens"):
        reward_model.score(TEXTS[:2], positions=[0, 60])
    with pytest.raises(ValueError, match="positions to be an int for each of 2 inputs, got 1 of them"):
        reward_model.score(TEXTS[:2], positions=[0])


@pytest.mark.parametrize("pooling", ["first", True, None, 1.5, M.VOCAB, -1])
def test_wrong_pooling_is_refused(pooling):
    with pytest.raises(ValueError, match="Expected pooling to be"):
        RewardModel(M.decoder("llama"), pooling=pooling)


# Text -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
def test_the_tokenizers_padding_makes_no_difference(side, pad):
    tok = M.tokenizer("decoder", chat=True, padding_side=side, pad_token=pad)
    model = M.decoder("qwen2", pad_token_id=None if pad is None else tok.pad_token_id)
    pairs = [("hello", "there"), ("a much longer prompt than the other", "yes"), ("q", "an answer of some length")]
    ids = [tok.encode(f"<user>{p}</s><assistant>{r}</s>") for p, r in pairs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = RewardModel(model, tok).score(pairs)
    M.assert_rewards(got, M.own(model, ids), M.reward_scale(model))


def test_strings_pairs_and_messages_are_scored_together():
    tok = M.tokenizer("decoder", chat=True)
    model = M.decoder("llama", pad_token_id=M.PAD)
    chat = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]
    got = RewardModel(model, tok).score([("p", "r"), chat, "<user>p</s><assistant>r</s>", [1, 2]])
    assert got[0] == got[1] == got[2] != got[3]


def test_truncation_reaches_the_model():
    reward_model = RewardModel(M.decoder("llama"))
    text = list(range(1, 40))
    left = reward_model.score([text], max_length=10, truncation="left")
    right = reward_model.score([text], max_length=10, truncation="right")
    torch.testing.assert_close(left, reward_model.score([text[-10:]]))
    torch.testing.assert_close(right, reward_model.score([text[:10]]))


def test_max_length_defaults_to_the_models_positions_and_the_tokenizers_limit():
    model = M.decoder("llama")
    assert RewardModel(model).max_length == 128
    assert RewardModel(model, M.tokenizer()).max_length == 128
    assert RewardModel(model, M.tokenizer(model_max_length=50)).max_length == 50
    with pytest.raises(InputError, match="input 0: it has 129 tokens, over max_length=128"):
        RewardModel(model).score([[1] * 129])


# Results --------------------------------------------------------------------------------------------------------------


def test_nothing_to_score_gives_an_empty_result():
    assert RewardModel(M.decoder("llama")).score([]).shape == (0,)
    three = RewardModel(M.decoder("llama", 3))
    assert three.score([]).shape == (0, 3)
    assert three.token_values([]) == []


def test_rewards_are_raw_unless_normalize_is_given():
    reward_model = RewardModel(M.decoder("llama"))
    raw = reward_model.score(TEXTS)
    torch.testing.assert_close(reward_model.score(TEXTS, normalize=(0.5, 2.0)), (raw - 0.5) / 2)
    values = reward_model.token_values(TEXTS)
    torch.testing.assert_close(reward_model.token_values(TEXTS, normalize=(0.5, 2.0))[1], (values[1] - 0.5) / 2)


def test_normalize_may_differ_between_heads():
    reward_model = RewardModel(M.decoder("llama", 3))
    mean, std = [0.1, 0.2, 0.3], [1.0, 2.0, 3.0]
    want = (reward_model.score(TEXTS) - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(reward_model.score(TEXTS, normalize=(mean, std)), want)


@pytest.mark.parametrize("normalize", [(0.0, 0.0), (0.0,), 3.0, (0.0, [1.0, 2.0]), (0.0, -1.0)])
def test_wrong_normalize_is_refused(normalize):
    with pytest.raises((ValueError, TypeError), match="normalize"):
        RewardModel(M.decoder("llama")).score(TEXTS, normalize=normalize)


@pytest.mark.parametrize("batch_tokens", [0, -1, 2.5, True])
def test_wrong_batch_tokens_is_refused(batch_tokens):
    with pytest.raises((ValueError, TypeError), match="Expected batch_tokens to be a positive int"):
        RewardModel(M.decoder("llama")).score(TEXTS, batch_tokens=batch_tokens)


def test_results_are_ordinary_tensors():
    reward_model = RewardModel(M.decoder("llama"))
    scores, values = reward_model.score(TEXTS), reward_model.token_values(TEXTS)
    assert not scores.is_inference() and not values[0].is_inference() and not scores.requires_grad
    (torch.ones(len(TEXTS), requires_grad=True) * scores).sum().backward()


def test_a_batch_that_runs_out_of_memory_is_halved():
    model = M.decoder("llama")
    reward_model = RewardModel(model)
    want = reward_model.score(TEXTS)

    def limit(module, args):
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("out of memory")

    handle = model.model.embed_tokens.register_forward_pre_hook(limit)
    M.assert_rewards(reward_model.score(TEXTS), want, M.reward_scale(model))
    handle.remove()


def test_a_text_with_non_finite_states_spoils_no_other():
    model = M.decoder("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    got = RewardModel(model).score([[1, 2, 3], [1, 7, 3], [4, 5]])
    assert got.isfinite().tolist() == [True, False, True]


def test_progress_shows_the_texts(capsys):
    RewardModel(M.decoder("llama")).score(TEXTS, progress=True)
    assert "12/12" in capsys.readouterr().err


def test_fp64_models_give_fp64():
    model = M.decoder("llama").double()
    got = RewardModel(model).score(TEXTS)
    assert got.dtype == torch.float64
    want = torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in TEXTS]).detach()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)  # the model's own norms compute in fp32 whatever its dtype


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_every_backend_gives_the_same_scores(backend):
    model = M.decoder("gemma3", 3)
    try:
        with rmfast.backend(backend):
            got = RewardModel(model).score(TEXTS)
    except rmfast.BackendError as error:
        pytest.skip(str(error))
    M.assert_rewards(got, M.own(model, TEXTS), M.reward_scale(model))


@pytest.mark.parametrize("make", [lambda: M.decoder("gpt2"), lambda: M.encoder("Bert")])
def test_no_max_length_lifts_the_limit_of_a_position_table(make):
    rm = RewardModel(make())
    with pytest.raises(InputError, match="tokens, over max_length"):
        rm.score(M.token_ids([200]), max_length=1000)
    assert rm.score(M.token_ids([200]), max_length=1000, truncation="left").shape == (1,)


@pytest.mark.parametrize(
    "method", ["score", "token_values", "values_and_reward", "lens", "attribute", "patch_sweep", "compare"]
)
@pytest.mark.parametrize("name", ["maxlength", "errors", "variants"])
def test_an_unknown_option_is_refused_by_the_method_s_own_name(method, name):
    rm = rmfast.RewardModel(M.decoder("llama"))
    with pytest.raises(TypeError, match=rf"RewardModel.{method}\(\) got an unexpected keyword argument '{name}'"):
        getattr(rm, method)([[1, 2]], **{name: 3})


def test_signatures_show_the_run_options():
    parameters = inspect.signature(rmfast.RewardModel.score).parameters
    assert parameters["truncation"].default == "error" and parameters["engine"].default is None
    assert "engine" not in inspect.signature(rmfast.RewardModel.lens).parameters
    assert "truncation" not in inspect.signature(rmfast.RewardModel.values_and_reward).parameters


WORKLOADS = {
    "score": lambda rm: rm.score([[1, 2], [3]]),
    "normalize": lambda rm: rm.score([[1, 2], [3]], normalize=(0.0, 2.0)),
    "token_values": lambda rm: rm.token_values([[1, 2]])[0],
    "values_and_reward": lambda rm: rm.values_and_reward([[1, 2, 3]], response_start=[1]).advantages,
    "lens": lambda rm: rm.lens([[1, 2], [3]]).rewards,
    "attribute": lambda rm: rm.attribute([[1, 2]])[0].rewards,
    "patch_sweep": lambda rm: rm.patch_sweep([1, 2, 3], [1, 4, 3]).rewards,
    "attribution_patch": lambda rm: rm.attribution_patch([1, 2, 3], [1, 4, 3]).rewards,
    "explain": lambda rm: [line for line in rm.explain().splitlines() if not line.startswith("compute")],  # measured
    "clamps": lambda rm: rm.with_interventions(CLAMP).score([[1, 2], [3]]),
    "last token": lambda rm: LastTokenRuns(rm, [[1, 2], [3]]).rewards(),
}
CLAMP = rmfast.NeuronClamp({"model.layers.0.mlp.up_proj": ([1], [0.5])}, positions="all")


@pytest.mark.parametrize("use", WORKLOADS.values(), ids=WORKLOADS)
def test_torchs_default_device_changes_nothing(use):
    model = M.decoder("llama")
    want = use(RewardModel(model))
    with torch.device("meta"):
        got = use(RewardModel(model))
        assert torch.empty(0).is_meta
    assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want

"""`RewardModel.score`, `token_values` and `load`: the same numbers as the model's own forward, one text at a time."""

from __future__ import annotations

import copy
import warnings

import models as M
import pytest
import torch
import transformers

import rmfast
from rmfast import RewardModel
from rmfast.inputs import InputError
from rmfast.scoring import _plan

# Long and short mixed, on both sides of every length at which a model's rules change (16: sliding windows, 24: rotary).
LENGTHS = [5, 60, 3, 17, 24, 1, 25, 2, 23, 41, 16, 90]
TEXTS = M.token_ids(LENGTHS)


def fresh(model):
    """A copy for each text: dynamic rotary frequencies remember the longest text they have seen."""
    return copy.deepcopy(model)


def own(model, texts=TEXTS):
    return torch.stack([M.alone(fresh(model), ids) for ids in texts]).squeeze(-1)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("family", M.DECODERS)
def test_scores_are_the_models_own(family, labels):
    model = M.decoder(family, labels)
    got = RewardModel(model).score(TEXTS, batch_tokens=200, max_length=1000)
    want = own(model)
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
        want = M.alone(fresh(model), ids)
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
    M.assert_rewards(RewardModel(model).score(TEXTS), own(model), M.reward_scale(model))


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
    batches = list(_plan(lengths, 4096, 64, lambda length: ()))
    assert batches == [[0, 1, 2], [3, 4, 5, 6, 7]]
    assert list(_plan(lengths, 4096, 10**6, lambda length: ())) == [list(range(8))]


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
    torch.testing.assert_close(got, own(model), rtol=1e-5, atol=1e-5)


def test_roberta_counts_positions_from_its_padding():
    model = M.encoder("Roberta", pad_token_id=1, bos_token_id=0, eos_token_id=2, max_position_embeddings=100)
    reward_model = RewardModel(model)
    assert reward_model.max_length == 98
    texts = [[3 + i % 200 for i in ids] for ids in TEXTS]
    torch.testing.assert_close(reward_model.score(texts, batch_tokens=200), own(model, texts), rtol=1e-5, atol=1e-5)


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
    M.assert_rewards(got, own(model, [[5, 6, 7, 8], text]), M.reward_scale(model))


def test_without_a_pad_token_the_last_token_is_read():
    model = M.decoder("llama", pad_token_id=None)
    M.assert_rewards(RewardModel(model).score(TEXTS), own(model), M.reward_scale(model))


@pytest.mark.parametrize("pad", [-1, M.VOCAB])
def test_a_pad_token_without_an_embedding_is_never_looked_up(pad):
    model = M.decoder("llama")
    model.config.pad_token_id = pad
    M.assert_rewards(RewardModel(model).score(TEXTS), own(model), M.reward_scale(model))


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
    M.assert_rewards(got, own(model, ends), M.reward_scale(model))
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
    with pytest.raises(ValueError, match="one position for each of 2 inputs, got 1"):
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
    M.assert_rewards(got, own(model, ids), M.reward_scale(model))


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
    with pytest.raises(ValueError, match="normalize"):
        RewardModel(M.decoder("llama")).score(TEXTS, normalize=normalize)


@pytest.mark.parametrize("batch_tokens", [0, -1, 2.5, True])
def test_wrong_batch_tokens_is_refused(batch_tokens):
    with pytest.raises(ValueError, match="Expected batch_tokens to be a positive int"):
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
    M.assert_rewards(got, own(model), M.reward_scale(model))


# Loading --------------------------------------------------------------------------------------------------------------


def save(path, model, tokenizer=None):
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification"])
def test_load_reads_a_checkpoint_and_its_tokenizer(tmp_path, task):
    model, tok = M.decoder("llama", 2, task), M.tokenizer("decoder", chat=True)
    save(tmp_path, model, tok)
    loaded = rmfast.load(str(tmp_path), device="cpu")
    assert isinstance(loaded, RewardModel) and type(loaded.model) is type(model)
    pairs = [("a", "b"), ("hello", "world")]
    torch.testing.assert_close(loaded.score(pairs), RewardModel(model, tok).score(pairs))


def test_load_takes_dtype_device_pooling_and_passes_the_rest(tmp_path):
    save(tmp_path / "inner", M.decoder("llama"), M.tokenizer())
    loaded = rmfast.load(
        tmp_path, dtype=torch.bfloat16, device="cpu", pooling="last", subfolder="inner", attn_implementation="eager"
    )
    assert loaded.model.dtype == torch.bfloat16 and loaded.pooling == "last"
    assert loaded.model.config._attn_implementation == "eager"


def test_load_keeps_the_checkpoints_dtype(tmp_path):
    save(tmp_path, M.decoder("llama").bfloat16(), M.tokenizer())
    assert rmfast.load(tmp_path, device="cpu").model.dtype == torch.bfloat16


def test_load_with_a_device_map(tmp_path):
    pytest.importorskip("accelerate")
    save(tmp_path, M.decoder("llama"), M.tokenizer())
    assert rmfast.load(tmp_path, device_map={"": "cpu"}).score(["x"]).shape == (1,)
    with pytest.raises(ValueError, match="device or device_map, got both"):
        rmfast.load(tmp_path, device="cpu", device_map={"": "cpu"})


def test_load_without_a_tokenizer_takes_token_ids_only(tmp_path):
    save(tmp_path, M.decoder("llama"))
    with pytest.warns(UserWarning, match="No tokenizer could be loaded"):
        loaded = rmfast.load(tmp_path, device="cpu")
    assert loaded.score([[1, 2]]).shape == (1,)
    with pytest.raises(InputError, match="needs a tokenizer"):
        loaded.score(["text"])


def test_load_refuses_a_language_model(tmp_path):
    save(tmp_path, transformers.LlamaForCausalLM(M.decoder("llama").config))
    with pytest.raises(ValueError, match=r"is not a reward model: its config names \['LlamaForCausalLM'\]"):
        rmfast.load(tmp_path)


def test_load_refuses_a_head_that_was_never_trained(tmp_path):
    config = save(tmp_path, transformers.LlamaForCausalLM(M.decoder("llama").config)) / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "LlamaForSequenceClassification"))
    with pytest.raises(ValueError, match=r"no weights for its head, score\.weight"):
        rmfast.load(tmp_path)


def test_load_of_nothing_is_transformers_own_error(tmp_path):
    with pytest.raises(OSError):
        rmfast.load(tmp_path / "missing")


def test_load_reads_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    base = save(tmp_path / "base", M.decoder("llama"), M.tokenizer())
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)).eval()
    want = RewardModel(adapted).score(TEXTS)
    save(tmp_path / "adapter", adapted, M.tokenizer())
    loaded = rmfast.load(tmp_path / "adapter", device="cpu", num_labels=1)
    torch.testing.assert_close(loaded.score(TEXTS), want)


REMOTE = """
import torch
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel

class OwnRewardModel(LlamaPreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.v_head = torch.nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return self.v_head(self.model(input_ids, attention_mask=attention_mask).last_hidden_state)[:, -1]
"""


def test_load_runs_a_checkpoints_own_code_when_trusted(tmp_path, monkeypatch):
    import json

    model = M.decoder("llama")
    state = {name.replace("score.", "v_head."): tensor for name, tensor in model.state_dict().items()}
    config = model.config.to_dict() | {
        "architectures": ["OwnRewardModel"],
        "auto_map": {"AutoModel": "own.OwnRewardModel"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(REMOTE)
    torch.save(state, tmp_path / "pytorch_model.bin")
    M.tokenizer().save_pretrained(tmp_path)
    loaded = rmfast.load(tmp_path, device="cpu", trust_remote_code=True)
    M.assert_rewards(loaded.score(TEXTS), own(model), M.reward_scale(model))


@pytest.mark.parametrize("make", [lambda: M.decoder("gpt2"), lambda: M.encoder("Bert")])
def test_no_max_length_lifts_the_limit_of_a_position_table(make):
    rm = RewardModel(make())
    with pytest.raises(InputError, match="tokens, over max_length"):
        rm.score(M.token_ids([200]), max_length=1000)
    assert rm.score(M.token_ids([200]), max_length=1000, truncation="left").shape == (1,)

"""Which tokens see which: decoders are told from encoders, and where padding is seen nothing is padded."""

from __future__ import annotations

import models as M
import pytest
import torch
import transformers

from rmfast import RewardModel

IDS = M.token_ids([5, 33, 2, 17, 40, 9])


@pytest.mark.parametrize("kind", ["ConvBert", "Nystromformer", "FNet"])
def test_tokens_of_a_model_that_padding_changes_share_batches_of_one_length(kind):
    extra = {"embedding_size": 48} if kind == "ConvBert" else {}
    model = M.encoder(kind, task="TokenClassification", **extra)
    reward_model = RewardModel(model)
    assert not reward_model.binding.padded
    texts = [*IDS, *M.token_ids([5, 17], seed=1)]
    for got, text in zip(reward_model.token_values(texts), texts):
        M.assert_rewards(got, M.alone(model, text)[:, 0], 1.0)


def test_a_decoder_whose_attention_sees_all_tokens_scores_texts_of_one_length_together():
    """Beside padding its mask is a decoder's: alone and in a batch it is two models."""
    model = M.decoder("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    reward_model = RewardModel(model)
    assert not reward_model.binding.causal and not reward_model.binding.padded
    M.assert_rewards(reward_model.score(IDS), M.own(model, IDS), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["Bert", "Electra", "ModernBert", "DebertaV2", "Llama", "Mixtral"])
def test_a_model_that_has_just_been_initialised_is_told_causal_or_not_in_any_dtype(kind, dtype):
    """An encoder's later tokens may move earlier ones by less than a rounding."""
    causal = kind in ("Llama", "Mixtral")
    shape = {"vocab_size": M.VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_labels": 1, "pad_token_id": M.PAD, "bos_token_id": M.BOS,
             "eos_token_id": M.EOS}  # fmt: skip
    shape |= {"num_key_value_heads": 2} if causal else {}
    shape |= {"embedding_size": 64} if kind == "Electra" else {"num_local_experts": 4} if kind == "Mixtral" else {}
    config = getattr(transformers, f"{kind}Config")(**shape)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForTokenClassification")(config).to(dtype).eval()
    assert RewardModel(model).binding.causal == causal

"""The stream between fused layers of a model in 16 bits: fp32 on the CPU."""

from __future__ import annotations

import copy

import families
import models as M
import pytest
import torch
import transformers

from rmfast import RewardModel
from rmfast.engine.attention import Unsupported
from rmfast.patching.activations import collect

TEXTS = M.token_ids([30] * 12)


def test_the_stream_between_native_16_bit_layers_is_fp32():
    """With the stream in bf16 errors are those of transformers."""
    model, texts = M.decoder("llama", num_hidden_layers=4).to(torch.bfloat16), M.token_ids([30] * 12)
    truth = torch.stack([M.alone(copy.deepcopy(model).float(), text) for text in texts])[:, 0]
    rm = RewardModel(model, compute="native")
    engine = rm.packed_engine()
    assert engine.wide and "fused layers, the stream between them float32" in rm.explain()
    errors = []
    for narrow in (torch.bfloat16, None):
        for _, layer in engine.layers:
            layer.narrow = narrow
        errors.append(float((rm.score(texts) - truth).abs().mean()))
    assert errors[0] <= 0.75 * errors[1], errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_model_that_changes_its_dtype_changes_the_stream(dtype):
    model, texts = M.decoder("llama").to(torch.bfloat16), M.token_ids([9, 30])
    rm = RewardModel(model, compute="native")
    assert rm.packed_engine().wide
    model.to(dtype)
    want = torch.stack([M.alone(model, text) for text in texts])[:, 0]
    M.assert_rewards(rm.score(texts), want, M.reward_scale(model))
    assert not rm.packed_engine().wide


def test_a_model_that_leaves_the_cpu_is_taken_apart_anew(monkeypatch):
    """Elsewhere the stream stays in 16 bits."""

    def engine(*args):
        raise Unsupported("made anew")

    rm = RewardModel(M.decoder("llama").to(torch.bfloat16), compute="native")
    assert rm.packed_engine() is rm.packed_engine()
    monkeypatch.setattr("rmfast.engine.scorer.Engine", engine)
    monkeypatch.setattr(type(rm.binding), "device", property(lambda self: torch.device("cuda")))
    assert rm.packed_engine() == "made anew"


def test_a_body_that_takes_no_fp32_stream_keeps_its_own():
    """OPT-350m projects what its last layer gives, with weights of its own dtype."""
    shape = {"vocab_size": M.VOCAB, "hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "do_layer_norm_before": True, "num_labels": 1,
             "pad_token_id": M.PAD}  # fmt: skip
    model = M.randomised(transformers.OPTForSequenceClassification(transformers.OPTConfig(**shape))).to(torch.bfloat16)
    rm, texts = RewardModel(model, compute="native"), M.token_ids([5, 12])
    assert "packed, fused layers\n" in rm.explain(), rm.explain()
    want = torch.stack([M.alone(model, text) for text in texts])[:, 0].float()
    assert float((rm.score(texts) - want).abs().max()) <= 0.05 * max(1, float(want.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2"])
def test_what_reads_the_stream_reads_it_unrounded(family):
    """The lens at its last layer, values and sweeps go by one stream with the rewards."""
    rm = RewardModel(M.decoder(family).to(torch.bfloat16), compute="native")
    assert rm.packed_engine().wide
    scores = rm.score(TEXTS)
    assert torch.equal(rm.lens(TEXTS).rewards[:, -1], scores)
    assert torch.equal(torch.stack([values[-1] for values in rm.token_values(TEXTS)]), scores)
    sweep = rm.patch_sweep(TEXTS[0], TEXTS[0][:10] + TEXTS[1][10:])
    assert sweep.engine == "suffix" and torch.equal(sweep.clean_reward.reshape(()), scores[0])


def test_collected_activations_keep_the_dtype_of_the_model_s_modules():
    rm = RewardModel(M.decoder("llama").to(torch.bfloat16), compute="native")
    own, wide = (collect(rm, TEXTS, layer=0, dtype=dtype).rows for dtype in (None, "float32"))
    assert own.dtype == torch.bfloat16 and torch.equal(wide.to(torch.bfloat16), own)
    assert not torch.equal(own.float(), wide)


def test_a_head_of_several_modules_is_given_rows_of_its_own_dtype():
    model = M.decoder("llama").to(torch.bfloat16)
    linear = model.score
    model.score = torch.nn.Sequential(torch.nn.Linear(linear.in_features, 24), torch.nn.Tanh(), torch.nn.Linear(24, 1))
    M.randomised(model.score).to(torch.bfloat16)
    rm = RewardModel(model.eval(), compute="native")
    assert rm.packed_engine().wide
    want = torch.stack([M.alone(model, text) for text in TEXTS])[:, 0].float()
    assert float((rm.score(TEXTS) - want).abs().max()) <= 0.05 * max(1, float(want.abs().max()))


@pytest.mark.parametrize("family", ["olmo", "neox"])
def test_a_norm_without_weights_or_with_fp32_ones_gives_modules_of_the_head_their_dtype(family):
    model = M.mlp_head(families.model(family)).to(torch.bfloat16)
    if family == "neox":
        model.base_model.final_layer_norm.float()
    rm = RewardModel(model, compute="native")
    assert rm.packed_engine().wide
    want = torch.stack([M.alone(model, text) for text in TEXTS])[:, 0].float()
    assert float((rm.score(TEXTS) - want).abs().max()) <= 0.05 * max(1, float(want.abs().max()))


def test_a_final_norm_without_weights_gives_rows_of_the_model_s_dtype():
    body = M.randomised(transformers.OlmoModel(transformers.OlmoConfig(**M._SHAPE))).to(torch.bfloat16).eval()
    head = M.randomised(torch.nn.Sequential(torch.nn.Linear(48, 24), torch.nn.Tanh(), torch.nn.Linear(24, 1)))
    rm = RewardModel(body, compute="native", head=head.to(torch.bfloat16))
    assert rm.packed_engine().wide
    with torch.no_grad():
        want = torch.stack([head(body(torch.tensor([text])).last_hidden_state[0, -1]) for text in TEXTS]).float()
    assert float((rm.score(TEXTS) - want.flatten()).abs().max()) <= 0.05 * max(1, float(want.abs().max()))


def test_rows_that_fit_into_memory_count_the_stream_s_bytes(monkeypatch):
    """The stream before and behind a sum, what is added and its norm: d values each, of two bytes more."""
    monkeypatch.setattr("rmfast.engine.packed.free_memory", lambda device: 2 << 20)
    wide, narrow = (RewardModel(M.decoder("llama").to(torch.bfloat16), compute="native") for _ in range(2))
    for _, layer in narrow.packed_engine().layers:
        layer.narrow = None
    rows = [rm.packed_engine().affordable_tokens() for rm in (wide, narrow)]
    bytes_of = [(1 << 20) / count for count in rows]
    assert abs(bytes_of[0] - bytes_of[1] - 4 * 48 * 2) <= 6, rows

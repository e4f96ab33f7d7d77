"""Layers that give lists, are not called as modules, or whose stream a projection leaves: right, or refused."""

from __future__ import annotations

import models as M
import pytest
import torch
import transformers

from rmfast import RewardModel

CLEAN, CORRUPTED = [1, 2, 3, 4], [1, 5, 3, 4]


def openai_gpt():
    config = transformers.OpenAIGPTConfig(
        vocab_size=M.VOCAB, n_positions=128, n_embd=48, n_layer=2, n_head=4, pad_token_id=M.PAD, num_labels=1
    )
    return M.randomised(transformers.OpenAIGPTForSequenceClassification(config))


def squeezebert(task="Sequence"):
    config = transformers.SqueezeBertConfig(
        vocab_size=M.VOCAB, hidden_size=48, embedding_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=80, pad_token_id=M.PAD, num_labels=1,
    )  # fmt: skip
    return M.randomised(getattr(transformers, f"SqueezeBertFor{task}Classification")(config))


def opt_350m():
    """A model whose layers are wider than its embedding and head, with projections between."""
    config = transformers.OPTConfig(
        vocab_size=M.VOCAB, hidden_size=48, word_embed_proj_dim=32, ffn_dim=80, num_hidden_layers=2, pad_token_id=M.PAD,
        num_attention_heads=4, max_position_embeddings=128, do_layer_norm_before=False, num_labels=1,
    )  # fmt: skip
    return M.randomised(transformers.OPTForSequenceClassification(config))


def under(layer, hook, model, ids):
    """The model's reward with a hook on one layer."""
    handle = layer.register_forward_hook(hook)
    try:
        return M.alone(model, ids)
    finally:
        handle.remove()


def test_layers_that_give_lists_are_swept_as_hooks_would():
    model, rows, want = openai_gpt(), [], []
    for layer in model.transformer.h:
        under(layer, lambda module, args, out: rows.append(out[0][0].clone()), model, CLEAN)
        for position in range(len(CORRUPTED)):

            def replace(module, args, out, position=position):
                out[0][0, position] = rows[-1][position]

            want.append(under(layer, replace, model, CORRUPTED))
    got = RewardModel(model).patch_sweep(CLEAN, CORRUPTED).rewards
    torch.testing.assert_close(got, torch.cat(want).reshape(got.shape), rtol=1e-5, atol=1e-5)


def test_parts_that_do_not_add_up_to_the_stream_are_refused_by_name():
    rm = RewardModel(openai_gpt())
    for run in (lambda: rm.attribute(CLEAN), lambda: rm.patch_sweep(CLEAN, CORRUPTED, sites="attn_out")):
        with pytest.raises(ValueError, match=r"Expected layer 0 \(Block\) to have attn_out: rmfast finds no parts"):
            run()


@pytest.mark.parametrize("task", ["Sequence", "Token"])
def test_layers_that_are_not_called_as_modules_are_refused_by_name(task):
    rm = RewardModel(squeezebert(task))
    message = r"layer 0 \(SqueezeBertModule\) to have resid_pre: its SqueezeBertModule, .* is not called"
    runs = [lambda: rm.patch_sweep(CLEAN, CORRUPTED), lambda: rm.attribution_patch(CLEAN, CORRUPTED)]
    for run in runs + ([lambda: rm.attribute(CLEAN)] if task == "Token" else []):
        with pytest.raises(ValueError, match=message):
            run()
    if task == "Token":
        with pytest.raises(ValueError, match=r"layer 0 of SqueezeBertModel .* to be called as a module"):
            rm.lens([CLEAN])


def test_a_stream_that_the_head_does_not_read_has_no_lens():
    rm = RewardModel(opt_350m())
    with pytest.raises(ValueError, match=r"layer 0 of OPTModel .* to be given \(B, T, 32\), as the head is, got .*48"):
        rm.lens([CLEAN])
    with pytest.raises(ValueError, match=r"Expected layer 0 \(OPTDecoderLayer\) to have attn_out"):
        rm.attribute(CLEAN)
    M.assert_rewards(rm.score([CLEAN, CORRUPTED]), M.own(rm.model, [CLEAN, CORRUPTED]), 1.0)


def test_activations_that_are_not_finite_are_not_taken_for_parts():
    model = M.decoder("llama")
    rm = RewardModel(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="not finite on ordinary tokens"):
        rm.attribute(CLEAN)

"""The places inside a layer: activations are what plain hooks see (tests/oracle.py); what is not there is refused."""

from __future__ import annotations

import models as M
import oracle as O
import pytest
import torch
import transformers
from edited import IDS, MAKERS, READ, bound, families, other, text
from torch import nn

from rmfast.patching.layers_patcher import LayersPatcher
from rmfast.patching.sites import KINDS


@families
def test_activations_are_what_plain_hooks_see(family, dtype):
    model = MAKERS[family]().to(dtype)
    patcher, kinds = LayersPatcher(bound(model)), O.kinds(model)
    with patcher.binding.session():
        record = patcher.record(text(IDS), READ, set(kinds))
    for kind in kinds:
        for layer in range(patcher.layers):
            got = record.activations(kind, layer)
            assert got.shape == (len(IDS), *patcher.units(kind)) and got.dtype == dtype
            torch.testing.assert_close(got, O.activation(model, IDS, kind, layer), rtol=0, atol=0)


@families
def test_the_recorded_reward_is_the_models_own(family, all_fp64):
    model = MAKERS[family]().double()
    patcher = LayersPatcher(bound(model))
    with patcher.binding.session():
        record = patcher.record(text(IDS), READ, set())
    torch.testing.assert_close(record.reward, O.reward(model, IDS, READ), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt2", "modernbert", "neox-sequential"])
def test_parts_add_up_to_the_stream(family):
    patcher = LayersPatcher(bound(MAKERS[family]().double()))
    with patcher.binding.session():
        record = patcher.record(text(IDS), READ, set(KINDS))
    for layer in range(patcher.layers):
        pre, mid, post, attn, mlp = (record.activations(kind, layer) for kind in KINDS[:5])
        torch.testing.assert_close(mid, pre + attn, rtol=0, atol=1e-12)
        torch.testing.assert_close(post, mid + mlp, rtol=0, atol=1e-12)


def test_the_output_projection_turns_heads_into_attn_out_and_neurons_into_mlp_out():
    model = M.decoder("qwen3").double()
    patcher = LayersPatcher(bound(model))
    with patcher.binding.session():
        record = patcher.record(text(IDS), READ, set(KINDS))
        layer = model.model.layers[1]
        attn = layer.self_attn.o_proj(record.activations("head_out", 1).flatten(1))
        mlp = layer.mlp.down_proj(record.activations("mlp_neuron", 1).flatten(1))
    torch.testing.assert_close(attn, record.activations("attn_out", 1)[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(mlp, record.activations("mlp_out", 1)[:, 0], rtol=0, atol=1e-12)


def test_units_count_kv_heads_for_k_and_v():
    patcher = LayersPatcher(bound(M.decoder("qwen3")))
    sizes = {kind: patcher.units(kind) for kind in KINDS}
    assert sizes["resid_mid"] == (1, 48) and sizes["mlp_neuron"] == (80, 1)
    assert sizes["q"] == sizes["head_out"] == (4, 16) and sizes["k"] == sizes["v"] == (2, 16)


@pytest.mark.parametrize("family", ["Olmo2", "Glm4", "Cohere", "Phi", "Starcoder2", "Granite"])
def test_what_attention_adds_is_found_or_refused(family):
    """Norms behind the parts, parallel parts and scaled parts: a kind is refused rather than wrong."""
    extra = {"residual_multiplier": 0.25} if family == "Granite" else {"head_dim": 12} if family == "Glm4" else {}
    try:
        model = other(family, **extra)
    except AttributeError:
        model = headed(family, extra)
    patcher = LayersPatcher(bound(model.double()))
    if family == "Granite":
        for kind in ("attn_out", "mlp_out", "resid_mid"):
            with pytest.raises(ValueError, match=f"GraniteDecoderLayer.*{kind}.*no parts in it that give what it adds"):
                patcher.units(kind)
        return
    kinds = {"resid_pre", "resid_post", "attn_out", "mlp_out"}
    with patcher.binding.session():
        record = patcher.record(text(IDS), READ, kinds)
    pre, post, attn, mlp = (record.activations(kind, 1) for kind in ("resid_pre", "resid_post", "attn_out", "mlp_out"))
    torch.testing.assert_close(post, pre + attn + mlp, rtol=0, atol=1e-6)


def headed(family: str, extra: dict) -> nn.Module:
    """A body without a sequence-classification class, with a head of its own."""
    config = getattr(transformers, f"{family}Config")(**{**M._SHAPE, **extra})
    body = transformers.AutoModel.from_config(config)

    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.model, self.score = config, body, nn.Linear(48, 1)

        def get_input_embeddings(self):
            return self.model.get_input_embeddings()

        def forward(self, input_ids, attention_mask=None):
            hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
            return transformers.modeling_outputs.TokenClassifierOutput(logits=self.score(hidden))

    return M.randomised(Headed())


def test_parallel_blocks_have_no_stream_between_attention_and_mlp():
    patcher = LayersPatcher(bound(MAKERS["neox"]()))
    with pytest.raises(ValueError, match=r"layer 0 \(GPTNeoXLayer\) to have resid_mid: its attention and MLP read"):
        patcher.units("resid_mid")


def test_a_missing_part_is_named_with_the_parts_there_are():
    model = M.decoder("llama")
    for layer in model.model.layers:
        layer.mlp = nn.Sequential(nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 48))
    patcher = LayersPatcher(bound(model))
    with pytest.raises(ValueError, match=r"layer 0 \(LlamaDecoderLayer\) to have mlp_neuron: rmfast looks for .*mlp.down_proj.*; its parts: .*self_attn.q_proj"):  # fmt: skip # noqa: E501
        patcher.units("mlp_neuron")
    assert patcher.units("mlp_out") == (1, 48)
    with patcher.binding.session(), pytest.raises(ValueError, match="mlp_neuron"):
        patcher.record(text(IDS), READ, {"mlp_neuron"})


def test_an_unknown_kind_is_an_error_that_lists_the_kinds():
    with pytest.raises(ValueError, match=r"one of resid_pre, .*, got 'logits'"):
        LayersPatcher(bound(M.decoder())).units("logits")


def test_layers_that_share_their_weights_are_no_list_of_layers():
    with pytest.raises(ValueError, match=r"AlbertModel has no list of its layers.*albert_layer_groups \(1\)"):
        LayersPatcher(bound(M.encoder("Albert", embedding_size=16)))

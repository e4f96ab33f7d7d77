"""Layers that look like those that are taken apart and are not: each is found out, by name, and scored right."""

from __future__ import annotations

import models as M
import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama

from rmfast import RewardModel

TEXTS = M.token_ids([9, 30, 60])


class Gated(llama.LlamaDecoderLayer):
    """A gate of ones on its attention, as just initialised."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, hidden_states, position_embeddings=None, **kw):
        made, _ = self.self_attn(self.input_layernorm(hidden_states), position_embeddings=position_embeddings, **kw)
        x = hidden_states + self.gate * made
        return x + self.mlp(self.post_attention_layernorm(x))


class Buffered(Gated):
    def __init__(self, *args):
        super().__init__(*args)
        del self.gate
        self.register_buffer("gate", torch.ones(()))


class InPlace(llama.LlamaDecoderLayer):
    """Adds to the stream where it lies."""

    def forward(self, hidden_states, position_embeddings=None, **kw):
        made, _ = self.self_attn(self.input_layernorm(hidden_states), position_embeddings=position_embeddings, **kw)
        hidden_states += made
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class OtherTables(llama.LlamaDecoderLayer):
    """Is given its tables by another name than its attention."""

    def __call__(self, hidden_states, position_embeddings=None, **kw):
        return super().__call__(hidden_states, tables=position_embeddings, **kw)

    def forward(self, hidden_states, tables=None, **kw):
        return super().forward(hidden_states, position_embeddings=tables, **kw)


class NormedBehind(llama.LlamaAttention):
    """Norms of heads behind their rotation."""

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.q_norm, self.k_norm = llama.LlamaRMSNorm(self.head_dim), llama.LlamaRMSNorm(self.head_dim)

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kw):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        parts = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part(hidden_states).view(shape).transpose(1, 2) for part in parts)
        q, k = llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        q, k = self.q_norm(q), self.k_norm(k)
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, llama.eager_attention_forward)
        out, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kw)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


class Bounded(llama.LlamaMLP):
    """Bounds that ordinary rows do not reach."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7) * self.up_proj(x).clamp(-7, 7))


def made(monkeypatch, name, kind, dtype=torch.float32):
    monkeypatch.setattr(llama, name, kind)
    shape = {"vocab_size": M.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "num_labels": 1, "pad_token_id": M.PAD,
             "initializer_range": 0.1}  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**shape)).to(dtype).eval()


def check(rm, model):
    M.assert_rewards(rm.score(TEXTS), M.own(model, TEXTS), M.reward_scale(model))


@pytest.mark.parametrize("kind", [Gated, Buffered])
def test_weights_beside_the_parts_are_not_left_out(monkeypatch, kind):
    model = made(monkeypatch, "LlamaDecoderLayer", kind)
    rm = RewardModel(model)
    assert f"its {kind.__name__} holds gate beside its parts" in rm.explain()
    for layer in model.model.layers:
        layer.gate.data.fill_(0.2)
    check(rm, model)


def test_norms_of_heads_stand_before_their_rotation(monkeypatch):
    model = made(monkeypatch, "LlamaAttention", NormedBehind)
    rm = RewardModel(model)
    assert "norms of its heads are not given what its projections give" in rm.explain()
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.weight.copy_(torch.linspace(0.2, 3, 8))
    check(rm, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tables_are_those_that_the_layer_is_given(monkeypatch, dtype):
    model = made(monkeypatch, "LlamaDecoderLayer", OtherTables, dtype)
    rm = RewardModel(model, compute="native")
    assert "of layer 0 differ from the model's own" in rm.explain()
    if dtype == torch.float32:
        check(rm, model)


def test_a_layer_that_is_given_no_tables_turns_no_heads():
    layer = RewardModel(M.decoder("llama")).packed_engine().layers[0][1]
    with pytest.raises(ValueError, match="to be given position_embeddings, got none"):
        layer.tables(torch.zeros(1, 3, 48), {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stream_that_is_added_to_in_place_is_serial(monkeypatch, dtype):
    model = made(monkeypatch, "LlamaDecoderLayer", InPlace, dtype)
    model.model.embed_tokens.weight.data.mul_(60)  # of which the sum shows little of what is added
    rm = RewardModel(model, compute="native")
    assert not any(layer.parallel for _, layer in rm.packed_engine().layers)
    if dtype == torch.float32:
        check(rm, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bounds_inside_of_an_mlp_are_seen(monkeypatch, dtype):
    rm = RewardModel(made(monkeypatch, "LlamaMLP", Bounded, dtype), compute="native")
    assert "MLPs of layer 0 differ from the model's own" in rm.explain()


def test_a_window_in_the_code_of_attention_that_keeps_its_heads_to_itself_is_not_packed():
    import families as F
    from transformers.models.falcon import modeling_falcon

    class Windowed(modeling_falcon.FalconAttention):
        def forward(self, hidden_states, alibi, attention_mask, **kw):
            at = torch.arange(hidden_states.size(1))
            apart = at[:, None] - at
            hidden = (apart >= 16) | (apart < 0)
            bias = torch.zeros(1, 1, *apart.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
            return super().forward(hidden_states, alibi, bias, **kw)

    model = F.model("falcon-serial", attn_implementation="eager")
    for layer in model.transformer.h:
        layer.self_attention.__class__ = Windowed
    rm = RewardModel(model)
    assert "engine: padded" in rm.explain() and "Windowed is not transformers' own" in rm.explain()
    check(rm, model)

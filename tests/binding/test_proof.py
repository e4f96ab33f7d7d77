"""What a model is tried on before it is bound: special tokens, large states, tokens that overflow."""

from __future__ import annotations

import models as M
import pytest
import torch
import transformers
from torch import nn

from rmfast import RewardModel
from rmfast.binding.find import bind

PAD, BOS, EOS = M.PAD, M.BOS, M.EOS
# With special tokens at every place where a rule may trip over them.
TEXTS = [
    [1, 2, 3],
    [1, EOS, 2, EOS, 3],
    [1, 2, EOS],
    [1, 2, EOS, EOS],
    [BOS, 1, PAD, 2, 3],
    [PAD, 1, 2],
    [1, EOS, 2, PAD],
    [EOS, 5, PAD, PAD],
    [EOS, EOS],
]


class Reads(transformers.LlamaPreTrainedModel):
    """A model whose own code reads at a token of its choice, and which names no embedding."""

    def __init__(self, config, rule, bound=None):
        super().__init__(config)
        self.transformer = transformers.LlamaModel(config)
        self.v_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.rule, self.bound = rule, bound

    def forward(self, input_ids, attention_mask=None):
        states = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        rewards = self.v_head(states).squeeze(-1)
        rewards = rewards if self.bound is None else rewards.clamp(-self.bound, self.bound)
        return torch.stack([row[self.rule(ids.tolist())] for ids, row in zip(input_ids, rewards)])


def first_end(ids):
    return ids.index(EOS) if EOS in ids else -1


def before_pad(ids):
    return ids.index(PAD) - 1 if PAD in ids else -1


def last_but_pad(ids):
    return max((i for i, token in enumerate(ids) if token != PAD), default=0)


def last(ids):
    return -1


def second_end(ids):
    return [i for i, token in enumerate(ids) if token == EOS][1] if ids.count(EOS) > 1 else -1


def reading(rule, **kw):
    return M.randomised(Reads(M.decoder("llama").config, rule, **kw))


def own(model, texts):
    with torch.no_grad():
        return torch.stack([model(torch.tensor([ids]))[0] for ids in texts])


@pytest.mark.parametrize("rule", [first_end, before_pad, last_but_pad, last])
@pytest.mark.filterwarnings("ignore:A text ends with token")
def test_auto_reads_where_the_models_own_code_reads(rule):
    model = reading(rule)
    M.assert_rewards(RewardModel(model).score(TEXTS), own(model, TEXTS), 1.0)


def test_a_rule_of_another_kind_is_refused_and_last_can_be_given():
    model = reading(second_end)
    with pytest.raises(ValueError, match=r'a text with special tokens .*at none of the tokens .*Give "last"'):
        RewardModel(model)
    rewards = RewardModel(model, pooling="last").score(TEXTS[:3])
    torch.testing.assert_close(rewards[[0, 2]], own(model, [TEXTS[0], TEXTS[2]]))


def test_a_special_token_of_the_tokenizer_is_tried_too():
    tok = M.tokenizer()
    model = reading(lambda ids: ids.index(M.USER) if M.USER in ids else -1)
    tok.add_special_tokens({"additional_special_tokens": ["<user>"]})
    with pytest.raises(ValueError, match="at none of the tokens"):
        RewardModel(model, tok)


@pytest.mark.parametrize("which", [0, -1])
def test_pooling_at_an_id_reads_the_occurrence_that_the_model_reads(which):
    def rule(ids):
        found = [i for i, token in enumerate(ids) if token == EOS]
        return found[which] if found else 0

    model = reading(rule)
    texts = [[1, EOS, 2, EOS, 3], [1, 2, EOS], [EOS, EOS]]
    M.assert_rewards(RewardModel(model, pooling=EOS).score(texts), own(model, texts), 1.0)


def test_a_bound_on_the_rewards_is_found_out():
    assert RewardModel(reading(last)).num_labels == 1
    with pytest.raises(ValueError, match=r"a rule of its own behind its head \(v_head\): on large hidden states"):
        RewardModel(reading(last, bound=10.0))


def test_binding_runs_the_layers_twice():
    """Every weight is read at each run: texts that show the rule of reading go through the head alone."""
    model = M.decoder("llama")
    runs = []
    model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    assert bind(model).reading == "last but pad"
    assert len(runs) == 2


@pytest.mark.parametrize("rule, expected", [(last, "last"), (second_end, None)])
def test_a_model_that_looks_past_the_last_states_is_tried_on_its_own_runs(rule, expected):
    class Looks(Reads):
        def forward(self, input_ids, attention_mask=None):
            out = self.transformer(input_ids, attention_mask=attention_mask, output_hidden_states=True)
            rewards = self.v_head(out.hidden_states[-1]).squeeze(-1)
            return torch.stack([row[self.rule(ids.tolist())] for ids, row in zip(input_ids, rewards)])

    model = M.randomised(Looks(M.decoder("llama").config, rule))
    if expected is None:
        with pytest.raises(ValueError, match="at none of the tokens"):
            bind(model)
    else:
        assert bind(model).reading == expected


def test_an_encoder_of_ones_own_that_names_no_embedding_is_bound():
    class Encoder(transformers.BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.inner = transformers.BertModel(config, add_pooling_layer=False)
            self.out = nn.Linear(config.hidden_size, 1)

        def forward(self, input_ids, attention_mask=None):
            states = self.inner(input_ids, attention_mask=attention_mask).last_hidden_state
            return self.out(torch.tanh(states[:, 0]))

    model = M.randomised(Encoder(M.encoder("Bert").config))
    texts = M.token_ids([4, 9])
    torch.testing.assert_close(RewardModel(model).score(texts), own(model, texts).squeeze(-1), rtol=1e-5, atol=1e-5)


def overflowing(token=None):
    """An fp16 model whose activations overflow, with all tokens or one."""
    model = M.decoder("llama")
    with torch.no_grad():
        if token is None:
            model.model.layers[1].mlp.up_proj.weight.mul_(1e3)
            model.model.layers[1].mlp.down_proj.weight.mul_(1e4)
        else:
            model.model.embed_tokens.weight[token] = 6e4
            model.model.layers[0].mlp.down_proj.weight[0] = 1e4
    return model.half()


def test_an_fp16_model_that_overflows_is_refused_by_name():
    with pytest.raises(ValueError, match=r"logits of LlamaForSeq.* are not finite .* overflow in float16\. Give it an"):
        RewardModel(overflowing())


def test_an_fp16_model_that_overflows_at_a_token_of_the_probe_is_tried_on_others():
    model = M.decoder("llama").half()
    with torch.no_grad():
        model.model.embed_tokens.weight[30] = torch.inf  # the probe's first
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.model.embed_tokens.weight[30, 1:] = 1.0
    assert bind(model).norm_kind == "rms"


@pytest.mark.parametrize("name", ["gelu_10", "gelu_pytorch_tanh", "silu"])
def test_activations_are_known_where_they_are_large_as_well(name):
    # Eager, as the oldest transformers' SDPA leaves out Gemma 2's softcap.
    model = M.decoder("gemma2", hidden_activation=name)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.mul_(40)
    reward_model = RewardModel(model)
    texts = M.token_ids([5, 33, 2])
    M.assert_rewards(reward_model.score(texts), M.own(model, texts), M.reward_scale(model))
    known = [layer.activation for _, layer in reward_model.packed_engine().layers]
    assert known == [{"gelu_10": None, "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}[name]] * 2

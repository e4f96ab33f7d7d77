"""What binding refuses, it refuses with the rule that the model has."""

from __future__ import annotations

import models as M
import pytest
import torch
from torch import nn

import rmfast
from rmfast import RewardModel


class Ruled(nn.Module):
    """A decoder whose logits are a function of its hidden states and head."""

    def __init__(self, rule, labels=1, dtype=torch.float32):
        super().__init__()
        inner = M.decoder("llama", labels).to(dtype)
        self.config, self.model, self.score, self.rule = inner.config, inner.model, inner.score, rule

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def forward(self, input_ids, attention_mask=None):
        return self.rule(self.model(input_ids, attention_mask=attention_mask).last_hidden_state, self.score)


def masked_mean(h):
    mask = torch.ones_like(h[..., :1])
    return (h * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rule", "labels", "words"),
    [
        (lambda h, head: head(h.mean(1)), 1, "score reads the mean of all tokens' hidden states"),
        (lambda h, head: head(masked_mean(h)), 1, "score reads the mean of all tokens' hidden states"),
        (lambda h, head: head(h.amax(1)), 1, "score reads the largest of all tokens' hidden states"),
        (lambda h, head: head(h[:, 0]), 1, "it reads token 1 of 7, and not the last.*pooling="),
        (lambda h, head: head(h).mean(1), 1, "its output is the mean of all tokens' score"),
        (lambda h, head: head(h[:, -1]).sigmoid(), 1, "its output is the sigmoid of score; rmfast scores raw logits"),
        (lambda h, head: head(h)[:, -1].sigmoid(), 1, "its output is the sigmoid of score; rmfast scores raw logits"),
        (lambda h, head: head(h).tanh(), 1, "its output is the tanh of score"),
        (lambda h, head: head(h[:, -1]).softmax(-1), 3, "its output is the softmax of score"),
    ],
)
def test_a_head_of_another_rule_is_refused_with_its_rule(rule, labels, words, dtype):
    with pytest.raises(ValueError, match=words):
        RewardModel(Ruled(rule, labels, dtype))


def test_a_rule_without_a_name_is_refused_with_the_parts_that_were_found():
    with pytest.raises(ValueError, match=r"is not one that rmfast knows.*Body: model"):
        RewardModel(Ruled(lambda h, head: head(h[:, -1]) * h.sum()))


@pytest.mark.parametrize("model", [M.decoder("llama").model, M.encoder("Bert").bert], ids=["llama", "bert"])
def test_a_body_alone_is_said_to_lack_its_head(model):
    with pytest.raises(ValueError, match=r"Model is a body without a head: .*AutoModelForSequenceClassification"):
        RewardModel(model)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_that_cannot_run_is_named_and_not_the_head(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with rmfast.backend(name), pytest.raises(rmfast.BackendError, match=f"Backend '{name}' cannot run .* on cpu"):
        RewardModel(M.decoder("llama"))


def test_attention_that_drops_a_softcap_is_refused_whenever_it_is_chosen():
    model = M.decoder("gemma2")
    reward_model = RewardModel(model)
    ids = M.token_ids([9, 4])
    before = reward_model.score(ids)
    model.config._attn_implementation = "sdpa"  # as by set_attn_implementation up to transformers 5.23
    for refused in (
        lambda: RewardModel(model),
        lambda: reward_model.score(ids),
        lambda: reward_model.token_values(ids),
    ):
        with pytest.raises(ValueError, match=r"Gemma2\w+ runs its attention by SDPA, which drops the softcap of 50"):
            refused()
    model.config._attn_implementation = "eager"
    assert torch.equal(reward_model.score(ids), before)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    model.config._attn_implementation = "sdpa"
    RewardModel(model)  # nothing to drop

"""A model scores with the numbers of its checkpoint, all of them, or is refused with the names that differ."""

from __future__ import annotations

import models as M
import pytest
import torch
from checkpoints import changed, remote, renamed, with_one, without

import rmfast

pytestmark = pytest.mark.filterwarnings("ignore:No tokenizer")
TEXTS = M.token_ids([5, 20, 3])


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
@pytest.mark.parametrize(
    ("change", "names"),
    [
        (renamed("model.", "transformer."), r"model\.embed_tokens\.weight.* and 14 more .*transformer\.embed_tokens"),
        (without("layers.1.mlp"), r"model\.layers\.1\.mlp\.down_proj\.weight, .*up_proj\.weight of Llama"),
        (without("model.norm"), r"model\.norm\.weight of LlamaForSequenceClassification"),
    ],
)
def test_a_body_without_its_weights_is_refused_by_name(tmp_path, change, names, form):
    changed(tmp_path, M.decoder("llama"), change, form)
    with pytest.raises(ValueError, match=f"has no weights for {names}"):
        rmfast.load(tmp_path, device="cpu")


def test_a_missing_pooler_that_the_head_reads_is_refused(tmp_path):
    changed(tmp_path, M.encoder("Bert"), without("pooler"))
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight of Bert"):
        rmfast.load(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["v_head", "value_head", "score.0"])
def test_a_head_under_another_name_is_refused_with_the_names_that_there_are(tmp_path, name):
    changed(tmp_path, M.decoder("llama"), renamed("score.", f"{name}."))
    with pytest.raises(ValueError, match=rf"for its head, score\.weight .*under other names: {name}\.weight$"):
        rmfast.load(tmp_path, device="cpu")


@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}])
def test_a_head_of_another_size_is_refused_with_both_shapes(tmp_path, options):
    changed(tmp_path, M.decoder("llama", 3), lambda weights: weights)
    with pytest.raises(ValueError, match=r"score\.weight of shape \(2, 48\), .*num_labels=2, got \(3, 48\)"):
        rmfast.load(tmp_path, device="cpu", num_labels=2, **options)


@pytest.mark.parametrize(
    "name",
    [
        "score.bias",
        "score.2.weight",
        "score.dense.weight",
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.post_feedforward_layernorm.weight",
        "model.layers.2.input_layernorm.weight",
        "model.embedding_norm.weight",
        "reward_scale",
    ],
)
def test_a_weight_that_the_model_has_no_place_for_is_refused(tmp_path, name):
    """A row under its bias, an MLP of which one layer is read: scored without, the reward would be another."""
    changed(tmp_path, M.decoder("llama"), with_one(name, 48))
    with pytest.raises(ValueError, match=rf"has {name.replace('.', '[.]')}, which Llama.* no place for"):
        rmfast.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("family", "config", "names"),
    [
        (
            "qwen3",
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            r"k_norm\.weight, .*q_norm",
        ),
        ("llama", {"num_hidden_layers": 1}, r"model\.layers\.1\.input_layernorm\.weight, .* and 3 more"),
    ],
)
def test_a_config_of_fewer_parts_than_the_file_has_is_refused(tmp_path, family, config, names):
    changed(tmp_path, M.decoder(family), lambda weights: weights, **config)
    with pytest.raises(ValueError, match=rf"has .*{names}.*, which LlamaForSeq.* has no place for"):
        rmfast.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "lm_head.weight"),
        ("llama", "critic.out.weight"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
    ],
)
def test_weights_of_no_part_of_the_model_are_left_alone(tmp_path, family, name):
    model = M.decoder(family)
    changed(tmp_path, model, with_one(name, 6))
    M.assert_rewards(rmfast.load(tmp_path, device="cpu").score(TEXTS), M.own(model, TEXTS), M.reward_scale(model))


def test_a_pooler_is_left_alone_where_each_token_has_a_reward(tmp_path):
    model = M.encoder("Bert", task="TokenClassification")
    changed(tmp_path, model, with_one("bert.pooler.dense.weight", 48, 48))
    M.assert_rewards(rmfast.load(tmp_path, device="cpu").token_values(TEXTS)[0], M.alone(model, TEXTS[0])[:, 0], 1.0)


CODE = """
import torch
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel

class Body(LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("inv_freq", torch.ones(config.hidden_size) / 4, persistent=config.keeps)

    def forward(self, input_ids, attention_mask=None):
        x = 4 * self.inv_freq * self.embed_tokens(input_ids)
        return super().forward(inputs_embeds=x, attention_mask=attention_mask)

class OwnRewardModel(LlamaPreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = Body(config)
        self.v_head = torch.nn.Linear(config.hidden_size, 1, bias=False)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gates = torch.nn.ModuleList(torch.nn.Linear(config.hidden_size, 1) for _ in range(config.gates))
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        rows = self.v_head(self.model(input_ids, attention_mask=attention_mask).last_hidden_state)
        return rows[:, -1]
"""


@pytest.mark.parametrize(
    ("keeps", "ignored"),
    [(False, []), (True, []), (True, ["inv_freq"])],
    ids=["never saved", "missing", "missing and ignored"],
)
def test_a_missing_weight_that_plays_no_part_and_a_computed_buffer_are_no_fault(tmp_path, keeps, ignored):
    """An unused lm_head; buffers of the checkpoint's own code, which transformers leaves as memory happens to be."""
    model = M.decoder("llama")
    code = CODE.replace("config_class", f"_keys_to_ignore_on_load_missing = {ignored}\n    config_class")
    folder = remote(tmp_path / f"buffers_{keeps}_{len(ignored)}", model, code, keeps=keeps, gates=0)
    junk = [torch.randn(48) for _ in range(1000)]
    del junk
    got = rmfast.load(folder, device="cpu", trust_remote_code=True)
    M.assert_rewards(got.score(TEXTS), M.own(model, TEXTS), M.reward_scale(model))
    assert torch.equal(got.model.model.inv_freq, torch.full((48,), 0.25))


def test_a_missing_module_of_a_list_is_refused_though_these_tokens_do_not_call_it(tmp_path):
    """Which expert of a mixture runs depends on the text."""
    folder = remote(tmp_path / "gated", M.decoder("llama"), CODE, keeps=False, gates=1)
    with pytest.raises(ValueError, match=r"gates\.0\.weight"):
        rmfast.load(folder, device="cpu", trust_remote_code=True)


def test_a_missing_weight_that_is_read_without_its_modules_forward_is_refused(tmp_path):
    code = CODE.replace("return rows[:, -1]", "return rows[:, -1] + self.lm_head.weight.sum()")
    folder = remote(tmp_path / "direct", M.decoder("llama"), code, keeps=False, gates=0)
    with pytest.raises(ValueError, match=r"for its head, lm_head\.weight"):
        rmfast.load(folder, device="cpu", trust_remote_code=True)


def test_code_of_its_own_without_trust_is_said_to_need_it(tmp_path):
    folder = remote(tmp_path / "untrusted", M.decoder("llama"), CODE, keeps=False, gates=0)
    with pytest.raises(ValueError, match=r"own code, own_untrusted\.OwnRewardModel .*trust_remote_code=True"):
        rmfast.load(folder, device="cpu")

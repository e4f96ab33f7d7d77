"""Token rows of a language model's head."""

from __future__ import annotations

import headed as C
import models as M
import pytest
import torch
import transformers

import rmfast
from rmfast import TokenHead

TEXTS = M.token_ids([5, 30, 3, 17, 24, 2])


def language_model(family="llama", **kw):
    return M.decoder(family, task="CausalLM", **kw)


def save(path, model, **config):
    model.save_pretrained(path)
    M.tokenizer("decoder", chat=True).save_pretrained(path)
    if config:
        import json

        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return path


def logits(model, texts):
    """At the last token of each text alone, fp64 but for the norms."""
    import copy

    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        return torch.stack([wide(input_ids=torch.tensor([ids])).logits[0, -1] for ids in texts])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_one_token_is_its_logit_and_two_are_their_difference(tmp_path, family):
    model = language_model(family, **({"final_logit_softcapping": 3.0} if family == "gemma2" else {}))
    own = logits(model, TEXTS)
    save(tmp_path, model)
    C.assert_alike(rmfast.load(tmp_path, device="cpu", head=TokenHead(0)), TEXTS, own[:, 0])
    C.assert_alike(rmfast.load(tmp_path, device="cpu", head=TokenHead(7, 9)), TEXTS, own[:, 7] - own[:, 9])
    tokens = TokenHead("+", "-")
    rm = rmfast.load(tmp_path, device="cpu", head=tokens)
    plus, minus = (rm.tokenizer.convert_tokens_to_ids(token) for token in "+-")
    C.assert_alike(rm, TEXTS, own[:, plus] - own[:, minus])
    right = own[:, [plus, minus]].softmax(-1)[:, 0]  # Math-Shepherd's
    C.assert_near(rm.score(TEXTS).double().sigmoid(), right)


def test_several_tokens_are_as_many_rewards():
    model = language_model()
    rm = rmfast.RewardModel(model, head=TokenHead(1, 2, 3))
    C.assert_alike(rm, TEXTS, logits(model, TEXTS)[:, 1:4])
    assert rmfast.RewardModel(model, head=TokenHead(1, 2, difference=False)).num_labels == 2


def test_vllms_keys_in_the_config_are_honoured(tmp_path):
    model = language_model("qwen3", tie_word_embeddings=True)
    own = logits(model, TEXTS)
    no, yes = (M.tokenizer().convert_tokens_to_ids(token) for token in "ny")
    save(tmp_path, model, classifier_from_token=["n", "y"], method="from_2_way_softmax")
    C.assert_alike(rmfast.load(tmp_path, device="cpu"), TEXTS, own[:, yes] - own[:, no])
    save(tmp_path, model, classifier_from_token=["n", "y"], method="no_post_processing")
    C.assert_alike(rmfast.load(tmp_path, device="cpu"), TEXTS, own[:, [no, yes]])
    save(tmp_path, model, classifier_from_token=["n", "y"], method="other")
    with pytest.raises(ValueError, match="classifier_from_token"):
        rmfast.load(tmp_path, device="cpu")


def test_the_rows_are_read_from_the_model_at_each_call():
    model = language_model()
    rm = rmfast.RewardModel(model, head=TokenHead(3))
    before = rm.score(TEXTS)
    with torch.no_grad():
        model.lm_head.weight[3] *= 2
    torch.testing.assert_close(rm.score(TEXTS), 2 * before)
    model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match="without hooks"):
        rm.score(TEXTS)


def test_an_adapter_on_a_language_model_takes_a_token_head(tmp_path):
    peft = pytest.importorskip("peft")
    save(tmp_path / "base", language_model())
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    rm = rmfast.load(tmp_path / "adapter", device="cpu", head=TokenHead(3, 4))
    own = logits(adapted.merge_and_unload(), TEXTS)
    C.assert_alike(rm, TEXTS, own[:, 3] - own[:, 4])


def test_a_language_model_without_a_head_names_how_to_give_one(tmp_path):
    save(tmp_path, language_model())
    with pytest.raises(ValueError, match=r"is not a reward model.*lm_head\.weight.*TokenHead"):
        rmfast.load(tmp_path, device="cpu")


def test_a_rule_behind_the_models_own_head_is_refused():
    model = language_model()
    model.lm_head.register_forward_hook(lambda module, args, out: out.clamp(-0.1, 0.1))
    with pytest.raises(ValueError, match="no hooks"):
        rmfast.RewardModel(model, head=TokenHead(3))

    class Clamped(type(model)):
        def forward(self, *args, **kw):
            out = super().forward(*args, **kw)
            out.logits = out.logits.clamp(-0.1, 0.1)
            return out

    model = language_model()
    model.__class__ = Clamped
    with pytest.raises(ValueError, match="are not the model's own"):
        rmfast.RewardModel(model, head=TokenHead(3))


@pytest.mark.parametrize(
    "tokens, match",
    [
        ((), "at least one"),
        ((1.5,), "ids or tokens"),
        ((1, 1), "different"),
        (("ab",), "one token each"),
        ((10**6,), r"in \[0"),
        ((-1,), r"in \[0"),
    ],
)
def test_tokens_that_are_none_are_refused(tokens, match):
    with pytest.raises((TypeError, ValueError), match=match):
        rmfast.RewardModel(language_model(), M.tokenizer(), head=TokenHead(*tokens))


def test_a_token_head_needs_a_language_model():
    with pytest.raises(ValueError, match="Expected a language model"):
        rmfast.RewardModel(M.decoder("llama"), head=TokenHead(3))
    with pytest.raises(ValueError, match="no tokenizer"):
        rmfast.RewardModel(language_model(), head=TokenHead("+"))
    with pytest.raises(ValueError, match="two tokens"):
        TokenHead(1, difference=True)


@pytest.mark.parametrize("tokens, names", [((5,), ["5"]), (("+", "-"), ["+ - -"]), ((5, "+", 9), ["5", "+", "9"])])
def test_outputs_are_named_by_their_tokens(tokens, names):
    rm = rmfast.RewardModel(M.decoder(task="CausalLM"), M.tokenizer(), head=rmfast.TokenHead(*tokens))
    found = rm.score([[1, 2, 3], [4]], output="all")
    assert found["names"] == names and found["rewards"].shape == (2, len(names)) == (2, rm.num_labels)
    assert torch.equal(found["scores"], rm.score([[1, 2, 3], [4]]))

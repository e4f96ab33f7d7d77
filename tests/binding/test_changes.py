"""What is changed in a model after it was bound takes part in its rewards, or is refused by name."""

from __future__ import annotations

import models as M
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from rmfast import RewardModel

IDS = M.token_ids([5, 33, 2, 17])
ENGINES = ["packed", "padded"]


def own_scores(model):
    return torch.stack([M.alone(model, ids) for ids in IDS]).squeeze(-1)


def scored(family="llama", **kw):
    """A model, and its RewardModel, which has scored."""
    model = M.decoder(family, **kw)
    reward_model = RewardModel(model)
    reward_model.score(IDS)
    return model, reward_model


def assert_followed(reward_model, model, before, engine=None):
    want = own_scores(model)
    assert (want - before).abs().max() > 1e-3
    M.assert_rewards(reward_model.score(IDS, engine=engine), want, max(1.0, float(want.abs().max())))


def doubled(module):
    forward = module.forward

    def call(*args, **kwargs):
        out = forward(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            return 2 * out
        name = "logits" if hasattr(out, "logits") else "last_hidden_state"
        setattr(out, name, 2 * getattr(out, name))
        return out

    module.forward = call


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("part", ["score", "model.norm", "model"])
def test_a_forward_set_on_an_instance_takes_part_until_it_is_taken_off(part, engine):
    model, reward_model = scored()
    before = own_scores(model)
    module = model.get_submodule(part)
    doubled(module)
    assert_followed(reward_model, model, before, engine)
    del module.forward
    M.assert_rewards(reward_model.score(IDS), before, 1.0)


@pytest.mark.parametrize("part", ["score", "model.norm", "model"])
def test_a_forward_that_is_set_before_binding_takes_part(part):
    model = M.decoder("llama")
    before = own_scores(model)
    doubled(model.get_submodule(part))
    assert_followed(RewardModel(model), model, before)


@pytest.mark.parametrize("how", ["forward", "hook", "global hook"])
def test_what_changes_the_models_own_logits_is_refused_while_it_is_there(how):
    model, reward_model = scored()
    want = reward_model.score(IDS)

    def hook(module, args, out):
        if hasattr(out, "logits"):
            out.logits = 2 * out.logits

    if how == "forward":
        doubled(model)
    handle = model.register_forward_hook(hook) if how == "hook" else None
    handle = register_module_forward_hook(hook) if how == "global hook" else handle
    try:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"What the forward of LlamaForSeq.* has changed since the model was"):
                reward_model.score(IDS)
    finally:
        if handle is not None:
            handle.remove()
    if how == "forward":
        del model.forward
    assert torch.equal(reward_model.score(IDS), want)


def test_a_hook_on_the_model_that_only_looks_on_is_no_obstacle():
    model, reward_model = scored()
    want = reward_model.score(IDS)
    model.register_forward_hook(lambda module, args, out: None)
    assert torch.equal(reward_model.score(IDS), want)


@pytest.mark.parametrize("how", ["forward", "hook"])
@pytest.mark.parametrize("part", ["", "base_model", "base_model.model"])
def test_what_is_put_on_pefts_wrappers_is_refused(part, how):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    wrapped = peft.get_peft_model(M.decoder("llama"), config).eval()
    reward_model = RewardModel(wrapped)
    want, module = reward_model.score(IDS), wrapped.get_submodule(part)
    looks_on = module.register_forward_hook(lambda module, args, out: None)
    assert torch.equal(reward_model.score(IDS), want)
    looks_on.remove()
    if how == "forward":
        doubled(module)
    else:
        handle = module.register_forward_hook(lambda module, args, out: setattr(out, "logits", 2 * out.logits))
    torch.testing.assert_close(own_scores(wrapped), 2 * want)
    with pytest.raises(ValueError, match="has changed since the model was bound"):
        reward_model.score(IDS)
    with pytest.raises(ValueError, match="did not give the model's own logits"):
        RewardModel(wrapped)
    if how == "forward":
        del module.forward
    else:
        handle.remove()
    assert torch.equal(reward_model.score(IDS), want)


@pytest.mark.parametrize("how", ["forward", "hook"])
def test_what_is_put_on_torch_compiles_wrapper_is_refused(how):
    model = torch.compile(M.decoder("llama"), backend="eager")
    reward_model = RewardModel(model)
    want = reward_model.score(IDS)
    with FlopCounterMode(display=False):
        assert torch.equal(RewardModel(model).score(IDS), want)
    if how == "forward":
        doubled(model)
    else:
        model.register_forward_hook(lambda module, args, out: setattr(out, "logits", 2 * out.logits))
    for use in (lambda: reward_model.score(IDS), lambda: RewardModel(model)):
        with pytest.raises(ValueError, match=r"Expected torch.compile's wrapper of LlamaForSeq.* to be without hooks"):
            use()


@pytest.mark.parametrize("kind", ["Linear", "LlamaRMSNorm"])
def test_torchs_global_hooks_take_part_until_they_are_removed(kind):
    model, reward_model = scored()
    before = own_scores(model)
    handle = register_module_forward_hook(lambda module, args, out: 2 * out if type(module).__name__ == kind else None)
    try:
        assert_followed(reward_model, model, before)
    finally:
        handle.remove()
    M.assert_rewards(reward_model.score(IDS), before, 1.0)


def test_hooks_that_only_watch_leave_the_engine_as_it_is():
    model, reward_model = scored()
    want = reward_model.score(IDS)
    with FlopCounterMode(display=False) as counted:
        assert "engine: packed, fused" in RewardModel(model).explain()
        assert torch.equal(reward_model.score(IDS), want)
    assert counted.get_total_flops() > 0
    with torch.inference_mode():
        model(torch.tensor([[5, 6]]), output_hidden_states=True)
    assert "engine: packed, fused" in RewardModel(model).explain() and torch.equal(reward_model.score(IDS), want)


@pytest.mark.parametrize("how", ["head", "weight", "mlp"])
def test_a_head_of_other_labels_is_refused(how):
    model, reward_model = scored()
    if how == "head":
        model.score = nn.Linear(48, 3)
    elif how == "weight":
        model.score.weight = nn.Parameter(torch.randn(3, 48))
    else:
        M.mlp_head(model, 3)
    for use in (reward_model.score, reward_model.token_values, reward_model.lens):
        with pytest.raises(ValueError, match=r"Expected the head of LlamaForSeq.* to give 1 for each of .* got \("):
            use(IDS)
    if how != "mlp":
        with pytest.raises(ValueError, match="to have 1 labels, as when the model was bound, got 3"):
            reward_model.attribute(IDS)


def test_a_model_that_pools_by_itself_and_gives_other_labels_is_refused():
    model = M.encoder("Bert")
    reward_model = RewardModel(model)
    model.classifier = nn.Linear(48, 3)
    with pytest.raises(ValueError, match="to give 1 for each of"):
        reward_model.score(IDS)


def test_a_final_norm_of_another_kind_is_followed():
    model, reward_model = scored()
    before = own_scores(model)
    model.model.norm = nn.LayerNorm(48)
    nn.init.normal_(model.model.norm.weight)
    assert reward_model.binding.norm_kind == "layer"
    assert_followed(reward_model, model, before)


class SwitchedNorm(nn.Module):
    """An RMS norm of either formula."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon, self.rules = norm.weight, norm.variance_epsilon, {"offset": [0.0]}

    def forward(self, x):
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return x * (self.rules["offset"][0] + self.weight)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("offset", [1.0, 0.5])
@pytest.mark.parametrize("names", [["model.norm"], ["input_layernorm"], ["q_norm", "k_norm"]])
def test_a_setting_of_a_norm_that_changes_its_formula_is_followed(names, offset, engine):
    model, norms = M.decoder("qwen3"), []
    for name, module in list(model.named_modules()):
        if name.endswith(tuple(names)):
            parent, _, child = name.rpartition(".")
            norms.append(SwitchedNorm(module))
            setattr(model.get_submodule(parent), child, norms[-1])
    reward_model = RewardModel(model)
    before = own_scores(model)
    M.assert_rewards(reward_model.score(IDS), before, 1.0)
    for norm in norms:
        norm.rules["offset"][0] = offset
    assert_followed(reward_model, model, before, engine)


@pytest.mark.parametrize("change", [("layer_types", ["full_attention", "full_attention"]), ("sliding_window", 14)])
@pytest.mark.parametrize("in_place", [True, False])
def test_windows_that_the_mask_alone_has_are_followed(change, in_place):
    model, reward_model = scored("gemma2")
    before = own_scores(model)
    name, value = change
    if in_place and isinstance(value, list):
        getattr(model.config, name)[:] = value
    else:
        setattr(model.config, name, value)
    assert_followed(reward_model, model, before)
    assert "its mask has windows of" in reward_model.explain()


def test_a_final_norm_that_is_not_run_any_more_is_refused():
    model, reward_model = scored()
    model.model.norm = nn.Sequential(model.model.norm, nn.Identity())
    reward_model.binding.norm_name = "model.norm.1"  # as where a part is bound that another takes the place of
    model.model.norm.forward = model.model.norm[0].forward
    with pytest.raises(ValueError, match=r"Expected the final norm \(Identity\) to be what the body's run ends in"):
        reward_model.score(IDS)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "family, name, value",
    [
        ("llama", "scaling", 1.0),
        ("qwen3", "scaling", 1.0),
        ("gemma2", "attn_logit_softcapping", 1.0),
        ("mistral", "sliding_window", 4),
    ],
)
def test_settings_of_attention_that_are_changed_in_place_are_followed(family, name, value, engine):
    model, reward_model = scored(family)
    before = own_scores(model)
    for holder in [model.config] if name == "sliding_window" else [layer.self_attn for layer in model.model.layers]:
        assert getattr(holder, name) != value
        setattr(holder, name, value)
    assert_followed(reward_model, model, before, engine)


@pytest.mark.parametrize("family, names, eps", [
    ("llama", ["input_layernorm"], "variance_epsilon"),
    ("qwen3", ["self_attn.q_norm"], "variance_epsilon"),
    ("qwen3", ["self_attn.k_norm"], "variance_epsilon"),
    ("qwen3", ["self_attn.q_norm", "self_attn.k_norm"], "variance_epsilon"),
    ("gemma2", ["post_feedforward_layernorm"], "eps"),
])  # fmt: skip
@pytest.mark.parametrize("engine", ENGINES)
def test_the_eps_of_norms_that_is_changed_in_place_is_followed(family, names, eps, engine):
    model, reward_model = scored(family)
    before = own_scores(model)
    for layer in model.model.layers:
        for name in names:
            setattr(layer.get_submodule(name), eps, 0.5)
    assert_followed(reward_model, model, before, engine)


@pytest.mark.parametrize("names", [["input_layernorm"], ["q_norm", "k_norm"]])
def test_the_eps_of_tuned_norms_is_their_own(names):
    model = M.decoder("qwen3")
    reward_model = RewardModel(tuned(model, *names))
    reward_model.score(IDS)
    before = own_scores(model)
    for name, module in model.named_modules():
        if name.endswith("ln_tuning_layers.default"):
            module.variance_epsilon = 0.5
    assert_followed(reward_model, model, before)


@pytest.mark.parametrize("family", ["llama-dynamic", "phi3-longrope"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_rotary_embedding_that_is_put_in_is_followed_text_by_text(family, engine):
    source = M.decoder(
        family
    )  # with the configuration of whose embedding texts from 25 tokens on have other frequencies
    prefix, kw = family.split("-")[0], {"max_position_embeddings": 128} if family == "llama-dynamic" else {}
    texts = M.token_ids(M.LENGTHS)
    model = M.decoder(prefix, **kw)
    reward_model = RewardModel(model)
    before = reward_model.score(texts)
    model.model.rotary_emb = source.model.rotary_emb
    want = M.own(model, texts)
    assert (want - before).abs().max() > 1e-3
    for order in (texts, texts[::-1]):
        for batch_tokens in (None, 60):
            got = reward_model.score(order, engine=engine, batch_tokens=batch_tokens)
            M.assert_rewards(got, want if order is texts else want.flip(0), max(1.0, float(want.abs().max())))
    assert torch.equal(torch.cat([reward_model.score([text]) for text in texts]), reward_model.score(texts))


def test_a_table_of_positions_that_grows_is_seen():
    model, reward_model = scored("gpt2")
    assert (reward_model.table, reward_model.max_length) == (128, 128)
    model.transformer.wpe = nn.Embedding(256, 48)
    model.config.n_positions = 200
    assert (reward_model.table, reward_model.max_length) == (256, 200)
    text = M.token_ids([150])[0]
    M.assert_rewards(reward_model.score([text]), M.alone(model, text), 1.0)


def test_an_activation_that_is_replaced_in_place_is_followed():
    model, reward_model = scored()
    before = own_scores(model)
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Tanh()
    assert_followed(reward_model, model, before)


def test_nothing_is_tried_again_while_nothing_changes(monkeypatch):
    model, reward_model = scored()
    engine, bound = reward_model.packed_engine(), []
    monkeypatch.setattr(reward_model.binding, "find", lambda *args: bound.append(args))
    model.train()
    reward_model.score(IDS)
    model.eval()
    reward_model.score(IDS)
    assert reward_model.packed_engine() is engine and not bound


class ReadsLast(nn.Module):
    """A head of one's own that reads the last token, whatever it is."""

    def __init__(self, model):
        super().__init__()
        self.config, self.model, self.score = model.config, model.model, model.score

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def forward(self, input_ids, attention_mask=None):
        return self.score(self.model(input_ids, attention_mask=attention_mask).last_hidden_state[:, -1])


@pytest.mark.parametrize("ids", [M.EOS, [M.EOS, 7]])
def test_special_tokens_that_are_set_later_say_anew_which_token_is_read(ids):
    model = ReadsLast(M.decoder("llama", pad_token_id=None)).eval()
    reward_model = RewardModel(model)
    texts = [[*text, M.EOS] for text in IDS]
    with torch.no_grad():
        want = torch.cat([model(torch.tensor([text]))[0] for text in texts])
    M.assert_rewards(reward_model.score(texts), want, 1.0)
    model.config.pad_token_id, model.config.eos_token_id = M.EOS, ids
    M.assert_rewards(reward_model.score(texts), want, 1.0)


def test_attention_that_is_no_longer_causal_is_refused():
    model, reward_model = scored()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match=r"is_causal\): expected body, head, labels, causal and width .*True.*False"):
        reward_model.score(IDS)
    M.assert_rewards(RewardModel(model).score(IDS), own_scores(model), 1.0)


def test_a_vocabulary_that_grows_is_seen():
    model, reward_model = scored()
    model.resize_token_embeddings(M.VOCAB + 8)
    text = [1, 2, M.VOCAB + 3, 4]
    M.assert_rewards(reward_model.score([text]), M.alone(model, text), 1.0)


# peft's tuned norms ---------------------------------------------------------------------------------------------------


def tuned(model, *names):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LNTuningConfig(target_modules=list(names))).eval()
    return wrapped


def train(wrapped):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "ln_tuning" in name or "modules_to_save" in name:
                p.add_(torch.randn(p.shape, generator=generator))


def saved(model, *names):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=list(names))
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "family, names, wrap",
    [
        ("llama", ["norm"], tuned),
        ("llama", ["input_layernorm"], tuned),
        ("llama", ["input_layernorm", "post_attention_layernorm"], tuned),
        ("qwen3", ["q_norm", "k_norm"], tuned),
        ("qwen3", ["k_norm"], tuned),
        ("gemma2", ["post_attention_layernorm", "post_feedforward_layernorm"], tuned),
        ("qwen3", ["post_attention_layernorm", "q_norm"], saved),
    ],
)
def test_tuned_norms_are_followed_on_off_and_merged(family, names, wrap, when):
    model = M.decoder(family)
    before = own_scores(model)
    reward_model = RewardModel(model) if when == "after" else None
    wrapped = wrap(model, *names)
    reward_model = reward_model or RewardModel(wrapped)
    M.assert_rewards(reward_model.score(IDS), before, 1.0)
    train(wrapped)
    assert reward_model.binding.norm_kind == ("gemma_rms" if family == "gemma2" else "rms")
    assert "packed, fused" in reward_model.explain()
    assert_followed(reward_model, model, before)
    with wrapped.disable_adapter():
        M.assert_rewards(reward_model.score(IDS), before, 1.0)
    wrapped.merge_adapter()
    assert_followed(reward_model, model, before)
    with wrapped.disable_adapter():
        M.assert_rewards(reward_model.score(IDS), before, 1.0)

"""Finding a model's body, norm and head by structure, and running the body without a trace."""

from __future__ import annotations

import copy
import pickle
import threading

import models as M
import pytest
import torch
import transformers
from torch import nn

from rmfast import RewardModel
from rmfast.binding.binding import Binding
from rmfast.binding.find import bind

IDS = M.token_ids([5, 33, 2, 17, 40, 9])


def own_scores(model, texts=IDS):
    return torch.stack([M.alone(model, ids) for ids in texts]).squeeze(-1)


@pytest.mark.parametrize(
    "family, kind",
    [("llama", "rms"), ("qwen3", "rms"), ("gemma2", "gemma_rms"), ("gemma3", "gemma_rms"), ("gpt2", "layer")],
)
def test_the_norm_is_known_by_its_formula(family, kind):
    bound = bind(M.decoder(family))
    assert bound.norm_kind == kind
    assert bound.causal


@pytest.mark.parametrize("make, causal", [(M.decoder, True), (M.encoder, False)])
def test_a_row_s_rounding_in_another_place_of_the_batch_makes_no_encoder_of_a_decoder(make, causal, monkeypatch):
    hidden = Binding.hidden

    def rounded(*args):
        out = hidden(*args).clone()
        out[1:] *= 1 + 8 * torch.finfo(out.dtype).eps
        return out

    monkeypatch.setattr(Binding, "hidden", rounded)
    assert bind(make()).causal == causal


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family, kind", [("llama", "rms"), ("gemma2", "gemma_rms"), ("gpt2", "layer")])
def test_the_norm_is_known_in_other_dtypes(family, kind, dtype):
    assert bind(M.decoder(family).to(dtype)).norm_kind == kind


def test_the_norms_eps_is_the_modules_own():
    model = M.decoder("llama", rms_norm_eps=0.1)
    assert bind(model).norm_arguments(torch.device("cpu"))["eps"] == 0.1
    M.assert_rewards(RewardModel(model).score(IDS), own_scores(model), M.reward_scale(model))


class OddNorm(nn.Module):
    """A norm that is none of the formulas; `rows` are those that it ran on, beside its settings, which are its own."""

    rows = ()

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(d) + 0.5)

    def forward(self, x):
        OddNorm.rows += (x.shape[:-1].numel(),)
        return self.weight * x / (1e-3 + x.abs().mean(-1, keepdim=True))


def test_an_unknown_norm_is_run_by_its_own_module_on_the_scored_rows():
    model = M.decoder("llama")
    model.model.norm = OddNorm(48)
    reward_model = RewardModel(model, invariant=False)  # without rows of padding
    assert reward_model.binding.norm_kind is None and reward_model.binding.leaves_norm_out
    OddNorm.rows = ()
    got = reward_model.score(IDS)
    assert sum(OddNorm.rows) == len(IDS)
    M.assert_rewards(got, own_scores(model), M.reward_scale(model))


def test_a_model_without_final_norm_is_scored():
    model = M.decoder("llama")
    model.model.norm = nn.Identity()
    torch.testing.assert_close(RewardModel(model).score(IDS), own_scores(model), rtol=1e-5, atol=1e-5)


def test_the_body_writes_no_normalised_copy():
    class Counted(transformers.models.llama.modeling_llama.LlamaRMSNorm):
        def forward(self, x):
            called.append(1)
            return super().forward(x)

    model, called = M.decoder("llama"), []
    model.model.norm = Counted(48)
    reward_model = RewardModel(model)
    called.clear()
    reward_model.score(IDS)
    assert not called


def test_the_model_is_left_as_it_was():
    model = M.decoder("llama")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    reward_model = RewardModel(model)
    reward_model.score(IDS)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert all(not module._forward_hooks for module in model.modules())
    pickle.dumps(model)
    copy.deepcopy(model)


def test_the_norm_is_put_back_when_the_body_fails():
    model = M.decoder("llama")
    reward_model = RewardModel(model)
    want = own_scores(model)

    def fail(*args):
        raise RuntimeError("broken layer")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken layer"):
        reward_model.score(IDS)
    handle.remove()
    assert "forward" not in vars(model.model.norm)
    assert torch.equal(own_scores(model), want)


def test_dropout_is_off_and_training_mode_restored():
    model = M.decoder("llama", attention_dropout=0.5)
    want = RewardModel(model).score(IDS)
    model.train()
    model.model.layers[0].eval()
    reward_model = RewardModel(model)
    assert torch.equal(reward_model.score(IDS), want)
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training


def test_weights_are_read_at_each_call():
    model = M.decoder("llama")
    reward_model = RewardModel(model)
    first = reward_model.score(IDS)
    with torch.no_grad():
        model.score.weight.mul_(2)
        model.model.norm.weight.mul_(3)
    torch.testing.assert_close(reward_model.score(IDS), 6 * first)


def test_modules_replaced_since_are_the_ones_used():
    model = M.decoder("llama")
    reward_model = RewardModel(model)
    model.score = nn.Linear(48, 1)
    M.assert_rewards(reward_model.score(IDS), own_scores(model), 1.0)
    lora(model, target_modules=["q_proj"], task_type="SEQ_CLS")
    M.assert_rewards(reward_model.score(IDS), own_scores(model), 1.0)


def test_scoring_leaves_the_model_trainable():
    model = M.decoder("phi3-longrope")
    RewardModel(model).score(M.token_ids([40, 10]))
    model(input_ids=torch.tensor(M.token_ids([40]))).logits.sum().backward()
    assert torch.isfinite(model.score.weight.grad).all()


def test_hooks_on_the_norm_or_head_take_part():
    model = M.decoder("llama")
    reward_model = RewardModel(model)
    model.model.norm.register_forward_hook(lambda module, args, out: out * 2)
    M.assert_rewards(reward_model.score(IDS), own_scores(model), M.reward_scale(model))
    model.score.register_forward_hook(lambda module, args, out: out + 1)
    M.assert_rewards(reward_model.score(IDS), own_scores(model), M.reward_scale(model))


def test_a_hook_on_the_body_sees_the_normed_states():
    model = M.decoder("llama")
    reward_model = RewardModel(model)
    seen = []
    model.model.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
    reward_model.score(IDS[:1])
    with torch.no_grad():
        want = model.model(torch.tensor(IDS[:1])).last_hidden_state
    torch.testing.assert_close(seen[0], want)


def test_threads_may_share_a_model():
    model = M.decoder("llama")
    models = [RewardModel(model), RewardModel(model)]
    want = own_scores(model)
    results = [None] * 9

    def work(i):
        for _ in range(5):
            results[i] = own_scores(model) if i % 3 == 0 else models[i % 2].score(IDS)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got in results:
        M.assert_rewards(got, want, M.reward_scale(model))


def test_the_norm_is_left_out_for_the_scoring_thread_only():
    model = M.decoder("llama")
    reward_model = RewardModel(model)
    x, seen = torch.randn(3, 48), []
    want = model.model.norm(x)

    def during(module, args):  # while the body runs without its norm
        seen.append(model.model.norm(x))
        thread = threading.Thread(target=lambda: seen.append(model.model.norm(x)))
        thread.start()
        thread.join()

    model.model.layers[0].register_forward_pre_hook(during)
    reward_model.score(IDS[:1])
    assert torch.equal(seen[0], x) and torch.equal(seen[1], want)


def test_a_norm_that_serves_several_places_stays_in():
    model = M.decoder("llama")
    model.model.layers[1].input_layernorm = model.model.norm
    M.assert_rewards(RewardModel(model).score(IDS), own_scores(model), 1.0)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("labels", [1, 3])
def test_mlp_heads(family, task, labels):
    model = M.mlp_head(M.decoder(family, labels, task), labels)
    values = RewardModel(model).token_values(IDS)
    for ids, value in zip(IDS, values):
        body = model.base_model(torch.tensor([ids])).last_hidden_state
        want = model.score(body)[0].detach()
        torch.testing.assert_close(value.reshape(want.shape), want, rtol=1e-5, atol=1e-5)


class Value(nn.Module):
    """A head as a module of its own that squeezes its single output."""

    def __init__(self, d):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(d, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x):
        return self.inner(x).squeeze(-1)


class OwnModel(transformers.LlamaPreTrainedModel):
    """A model with its own class, names and a tensor for an output, as remote code has them."""

    def __init__(self, config, read="last", head=None):
        super().__init__(config)
        self.decoder_stack = transformers.LlamaModel(config)
        self.regression = head or nn.Linear(config.hidden_size, 1)
        self.read = read

    def get_input_embeddings(self):
        return self.decoder_stack.embed_tokens

    def forward(self, input_ids, attention_mask=None):
        states = self.decoder_stack(input_ids, attention_mask=attention_mask).last_hidden_state
        if self.read == "all":
            return self.regression(states)
        if self.read == "gathered":
            return self.regression(states[:, -1])
        if self.read == "token":
            at = (input_ids == M.EOS).int().argmax(-1)
            return self.regression(states)[torch.arange(len(input_ids)), at]
        if self.read == "scaled":
            return 10 * self.regression(states)[:, -1]
        return self.regression(states)[:, -1]


def own_model(**kw):
    return M.randomised(OwnModel(M.decoder("llama").config, **kw))


@pytest.mark.parametrize("read", ["last", "gathered", "all"])
@pytest.mark.parametrize("head", ["linear", "own"])
def test_own_classes_are_bound_by_structure(read, head):
    model = own_model(read=read, head=Value(48) if head == "own" else None)
    got = RewardModel(model).score(IDS)
    with torch.no_grad():
        want = torch.stack([model(torch.tensor([ids])).reshape(-1)[-1] for ids in IDS])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_model_that_reads_at_a_token_needs_that_pooling():
    model = own_model(read="token")
    texts = [[*ids, M.EOS] for ids in IDS]
    with torch.no_grad():
        want = torch.stack([model(torch.tensor([ids])).reshape(()) for ids in texts])
    got = RewardModel(model, pooling=M.EOS).score([[*ids, 7, 8] for ids in texts])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"token 1 of 7, and not the last.* pooling="):
        RewardModel(model)


def test_a_head_with_rules_of_its_own_is_refused():
    with pytest.raises(ValueError, match=r"Body: decoder_stack; final norm: decoder_stack.norm; head: regression"):
        RewardModel(own_model(read="scaled"))


class OwnEncoder(transformers.BertPreTrainedModel):
    """An encoder that takes the mean over its tokens."""

    def __init__(self, config, tell_padding):
        super().__init__(config)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.out = nn.Linear(config.hidden_size, 1)
        self.tell_padding = tell_padding

    def forward(self, input_ids, attention_mask=None):
        states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        real = (input_ids != self.config.pad_token_id if self.tell_padding else torch.ones_like(input_ids))[..., None]
        return self.out(torch.tanh((states * real).sum(1) / real.sum(1)))


def test_an_encoder_with_a_pooling_of_its_own():
    model = M.randomised(OwnEncoder(M.encoder("Bert").config, tell_padding=True))
    with torch.no_grad():
        want = torch.cat([model(torch.tensor([ids]))[0] for ids in IDS])
    torch.testing.assert_close(RewardModel(model).score(IDS), want, rtol=1e-5, atol=1e-5)


def test_an_encoder_whose_pooling_sees_padding_is_refused():
    model = M.randomised(OwnEncoder(M.encoder("Bert").config, tell_padding=False))
    with pytest.raises(ValueError, match="The head of OwnEncoder"):
        RewardModel(model)


def test_a_language_model_is_refused():
    model = transformers.LlamaForCausalLM(M.decoder("llama").config)
    with pytest.raises(ValueError, match="is a language model, not a reward model"):
        RewardModel(model)


def test_a_bare_body_is_refused():
    with pytest.raises(ValueError, match="LlamaModel is a body without a head"):
        RewardModel(M.decoder("llama").model)


def test_other_modules_are_refused():
    with pytest.raises(ValueError, match="looks for get_input_embeddings"):
        RewardModel(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got str"):
        RewardModel("a/path")


def test_a_zero_head_is_bound():
    model = M.decoder("llama")
    nn.init.zeros_(model.score.weight)
    assert RewardModel(model).score(IDS).tolist() == [0.0] * len(IDS)


# peft -----------------------------------------------------------------------------------------------------------------


def lora(model, **kw):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, **kw))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return wrapped.eval()


@pytest.mark.parametrize(
    "kw",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
        {"target_modules": ["q_proj", "score"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["score", "norm"]},
        {"target_modules": ["up_proj"], "use_dora": True},
    ],
    ids=["body", "saved-head", "lora-head", "saved-norm", "dora"],
)
def test_adapters_active_disabled_and_merged(kw):
    model = lora(M.decoder("llama"), **kw)
    reward_model = RewardModel(model)
    want = own_scores(model)
    M.assert_rewards(reward_model.score(IDS), want, 1.0)
    with model.disable_adapter():
        off = own_scores(model)
        M.assert_rewards(reward_model.score(IDS), off, 1.0)
    assert (off - want).abs().max() > 0.05
    merged = model.merge_and_unload()
    M.assert_rewards(RewardModel(merged).score(IDS), own_scores(merged), 1.0)


def test_adapters_can_be_switched_after_binding():
    peft = pytest.importorskip("peft")
    model = lora(M.decoder("llama"), target_modules=["q_proj"], task_type="SEQ_CLS")
    reward_model = RewardModel(model)
    first = reward_model.score(IDS)
    torch.manual_seed(3)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"], task_type="SEQ_CLS"))
    with torch.no_grad():
        model.base_model.score.modules_to_save["second"].weight.mul_(-2)
    model.set_adapter("second")
    model.eval()
    got = reward_model.score(IDS)
    M.assert_rewards(got, own_scores(model), 1.0)
    assert (got - first).abs().max() > 0.1


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="PROMPT_TUNING adds tokens outside"):
        RewardModel(peft.get_peft_model(M.decoder("llama"), config))


# Placement and precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device_map",
    [
        {"": "cpu"},
        {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu"},
        {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.norm": "cpu", "score": "cpu"},
    ],
    ids=["cpu", "norm-and-head-on-disk", "embedding-on-disk"],
)
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_device_maps_with_offload(tmp_path, device_map, head):
    pytest.importorskip("accelerate")
    from accelerate import dispatch_model

    model = M.decoder("llama", 2)
    if head == "mlp":
        model = M.mlp_head(model, 2)
    want = own_scores(model)
    names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "score"]
    full = device_map if "" in device_map else {name: device_map.get(name, "disk") for name in names}
    placed = dispatch_model(model, full, main_device="cpu", offload_dir=str(tmp_path))
    assert any(p.is_meta for p in placed.parameters()) == ("" not in device_map)
    M.assert_rewards(RewardModel(placed).score(IDS), want, 1.0)


def test_cpu_offload_of_everything():
    accelerate = pytest.importorskip("accelerate")
    model = M.decoder("gemma2")
    want = own_scores(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    M.assert_rewards(RewardModel(model).score(IDS), want, 1.0)


@pytest.mark.parametrize("with_head", [False, True])
def test_quantised_linears_need_no_special_case(with_head):
    model = M.quantised(with_head)
    M.assert_rewards(RewardModel(model).score(IDS), own_scores(model), 1.0)


def test_dynamically_quantised_bodies_match_text_by_text():
    model = M.quantised(dynamic=True)
    # Activation scales depend on the whole batch, so only a batch of one text is comparable.
    M.assert_rewards(RewardModel(model).score(IDS, batch_tokens=1), own_scores(model), 1.0)


@pytest.mark.parametrize("part", ["", "model", "model.layers.0", "score"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_models_that_are_compiled_in_place_are_scored(part, when):
    model = M.decoder("llama")
    want = own_scores(model)
    reward_model = RewardModel(model) if when == "after" else None
    model.get_submodule(part).compile(backend="eager")
    compiled = model.get_submodule(part)._compiled_call_impl
    reward_model = reward_model or RewardModel(model)
    M.assert_rewards(reward_model.score(IDS), want, 1.0)
    assert model.get_submodule(part)._compiled_call_impl is compiled


def test_compiled_models_are_unwrapped():
    model = M.decoder("llama")
    M.assert_rewards(RewardModel(torch.compile(model, backend="eager")).score(IDS), own_scores(model), 1.0)


def test_bf16_is_no_further_from_fp64_than_eager():
    model = M.decoder("llama").bfloat16()
    truth = own_scores(copy.deepcopy(model).double())
    eager = (own_scores(model) - truth).abs().max()
    assert (RewardModel(model).score(IDS) - truth).abs().max() <= 2 * eager


def test_a_head_with_nan_is_bound_and_gives_nan():
    model = M.decoder("llama")
    model.score.weight.data[0, 0] = torch.nan
    assert RewardModel(model).score([[1, 2, 3]]).isnan().all()

"""LayersPatcher and gradients, judged by plain hooks on the unmodified model, one edit a forward (tests/oracle.py)."""

from __future__ import annotations

import contextlib
import threading

import models as M
import numpy as np
import oracle as O
import pytest
import torch
import transformers
from torch import Tensor, nn

import rmfast
from rmfast import hooks
from rmfast.inputs import Encoded
from rmfast.sites import KINDS, Edits

IDS, OTHER = M.token_ids([11, 11], seed=3)
READ = 9  # in the middle of nothing: a decoder's reward there depends on the tokens before it alone
LATE = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}  # RoBERTa counts positions from the pad id on
DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,  # key_proj and query_proj are called twice, for tokens and for distances
    "position_buckets": 4,
    "conv_kernel_size": 3,  # layer 1 is not given what layer 0 gives
}


def other(family: str, **kw) -> nn.Module:
    """A decoder that tests/models.py does not make."""
    config = getattr(transformers, f"{family}Config")(**{**M._SHAPE, "num_labels": 1, **kw})
    torch.manual_seed(0)
    return M.randomised(getattr(transformers, f"{family}ForSequenceClassification")(config))


MAKERS = {
    **{name: (lambda name=name: M.decoder(name, labels=2)) for name in [*M.DECODERS, "gpt2"]},
    "llama-tokens": lambda: M.decoder("llama", task="TokenClassification"),
    "llama-mlp-head": lambda: M.mlp_head(M.decoder("llama")),
    "neox": lambda: other("GPTNeoX"),
    "neox-sequential": lambda: other("GPTNeoX", use_parallel_residual=False),
    "bert": lambda: M.encoder("Bert", labels=2),
    "bert-tokens": lambda: M.encoder("Bert", labels=2, task="TokenClassification"),
    "roberta": lambda: M.encoder("Roberta", **LATE),
    "electra": lambda: M.encoder("Electra"),
    "deberta": lambda: M.encoder("DebertaV2", **DEBERTA),
    "distilbert": lambda: M.encoder("DistilBert", hidden_dim=80),
    "modernbert": lambda: M.encoder("ModernBert", cls_token_id=M.CLS, sep_token_id=M.SEP),
}
families = pytest.mark.parametrize("family", MAKERS)
FEW = ["llama", "gemma2", "phi3", "gpt2", "neox", "bert", "deberta"]
few = pytest.mark.parametrize("family", FEW)


@pytest.fixture
def all_fp64():
    with O.everything_in_fp64():
        yield


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def dtype(request):
    with O.everything_in_fp64() if request.param == torch.float64 else contextlib.nullcontext():
        yield request.param


def bound(model: nn.Module) -> rmfast.model.Binding:
    return rmfast.RewardModel(model).binding


def text(ids: list[int], types: list[int] | None = None) -> Encoded:
    return Encoded(np.array(ids), None if types is None else np.array(types))


def scale(model: nn.Module) -> float:
    """How large rewards can get: the norm of the head's widest row."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    return float(linear.weight.detach().norm(dim=-1).max())


def grid(patcher: hooks.LayersPatcher, kinds: list[str]) -> Edits:
    """Every kind and layer: the first unit at position 0, and the last where the reward is read and at several."""
    groups = np.zeros((3, len(IDS)), bool)
    groups[0, 0] = groups[1, READ] = groups[2, [1, 4, 5, READ]] = True
    rows = [
        (KINDS.index(kind), layer, group, unit)
        for kind in kinds
        for layer in range(patcher.layers)
        for group, unit in enumerate((0, -1 % patcher.units(kind)[0], -1 % patcher.units(kind)[0]))
    ]
    kind, layer, group, unit = np.array(rows, np.int32).T
    return Edits(kind.astype(np.int8), layer, group, unit, groups)


def gradients(binding, kinds: set[str], metric=None):
    return hooks.LayersPatcher(binding).gradients(text(IDS), READ, kinds, metric)


def run(patcher: hooks.LayersPatcher, base, edits: Edits, values, batch_tokens: int = 33) -> Tensor:
    """Rewards (E, K), in batches of three; every edit is reported once."""
    rewards: list[Tensor | None] = [None] * len(edits)

    def done(indices: np.ndarray, some: Tensor) -> None:
        for i, reward in zip(indices, some):
            assert rewards[i] is None
            rewards[i] = reward

    patcher.rewards(base, edits, values, batch_tokens, done, np.zeros(len(edits), bool))
    return torch.stack(rewards)


def expected(model: nn.Module, edits: Edits, values, types=None) -> Tensor:
    out = []
    for kind, layer, group, unit in zip(edits.kind, edits.layer, edits.group, edits.unit):
        positions, layer, unit = np.flatnonzero(edits.groups[group]).tolist(), int(layer), int(unit)
        new = values(KINDS[kind], layer)[positions, unit]
        out.append(O.oracle(model, IDS, READ, KINDS[kind], layer, positions, unit, new, types))
    return torch.stack(out)


def noisy(record) -> hooks.Values:
    """What a record holds plus noise of its size, the same at every call."""

    def values(kind: str, layer: int) -> Tensor:
        x = record.activations(kind, layer)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(layer + 7 * KINDS.index(kind)))
        return x + noise.to(x) * x.std()

    return values


def traces(model: nn.Module) -> list:
    """What hooks and replaced forwards would leave behind."""
    return [
        (name, *map(dict, (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)), "forward" in m.__dict__)
        for name, m in model.named_modules()
    ]


# Points ---------------------------------------------------------------------------------------------------------------


@families
def test_activations_are_what_plain_hooks_see(family, dtype):
    model = MAKERS[family]().to(dtype)
    patcher, kinds = hooks.LayersPatcher(bound(model)), O.kinds(model)
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
    patcher = hooks.LayersPatcher(bound(model))
    with patcher.binding.session():
        record = patcher.record(text(IDS), READ, set())
    torch.testing.assert_close(record.reward, O.reward(model, IDS, READ), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt2", "modernbert", "neox-sequential"])
def test_parts_add_up_to_the_stream(family):
    patcher = hooks.LayersPatcher(bound(MAKERS[family]().double()))
    with patcher.binding.session():
        record = patcher.record(text(IDS), READ, set(KINDS))
    for layer in range(patcher.layers):
        pre, mid, post, attn, mlp = (record.activations(kind, layer) for kind in KINDS[:5])
        torch.testing.assert_close(mid, pre + attn, rtol=0, atol=1e-12)
        torch.testing.assert_close(post, mid + mlp, rtol=0, atol=1e-12)


def test_the_output_projection_turns_heads_into_attn_out_and_neurons_into_mlp_out():
    model = M.decoder("qwen3").double()
    patcher = hooks.LayersPatcher(bound(model))
    with patcher.binding.session():
        record = patcher.record(text(IDS), READ, set(KINDS))
        layer = model.model.layers[1]
        attn = layer.self_attn.o_proj(record.activations("head_out", 1).flatten(1))
        mlp = layer.mlp.down_proj(record.activations("mlp_neuron", 1).flatten(1))
    torch.testing.assert_close(attn, record.activations("attn_out", 1)[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(mlp, record.activations("mlp_out", 1)[:, 0], rtol=0, atol=1e-12)


def test_units_count_kv_heads_for_k_and_v():
    patcher = hooks.LayersPatcher(bound(M.decoder("qwen3")))
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
    patcher = hooks.LayersPatcher(bound(model.double()))
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
    patcher = hooks.LayersPatcher(bound(MAKERS["neox"]()))
    with pytest.raises(ValueError, match=r"layer 0 \(GPTNeoXLayer\) to have resid_mid: its attention and MLP read"):
        patcher.units("resid_mid")


def test_a_missing_part_is_named_with_the_parts_there_are():
    model = M.decoder("llama")
    for layer in model.model.layers:
        layer.mlp = nn.Sequential(nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 48))
    patcher = hooks.LayersPatcher(bound(model))
    with pytest.raises(ValueError, match=r"layer 0 \(LlamaDecoderLayer\) to have mlp_neuron: rmfast looks for .*mlp.down_proj.*; its parts: .*self_attn.q_proj"):  # fmt: skip # noqa: E501
        patcher.units("mlp_neuron")
    assert patcher.units("mlp_out") == (1, 48)
    with patcher.binding.session(), pytest.raises(ValueError, match="mlp_neuron"):
        patcher.record(text(IDS), READ, {"mlp_neuron"})


def test_an_unknown_kind_is_an_error_that_lists_the_kinds():
    with pytest.raises(ValueError, match=r"one of resid_pre, .*, got 'logits'"):
        hooks.LayersPatcher(bound(M.decoder())).units("logits")


def test_layers_that_share_their_weights_are_no_list_of_layers():
    with pytest.raises(ValueError, match=r"AlbertModel has no list of its layers.*albert_layer_groups \(1\)"):
        hooks.LayersPatcher(bound(M.encoder("Albert", embedding_size=16)))


# Rewards of edited runs -----------------------------------------------------------------------------------------------


@families
def test_an_edit_gives_what_plain_hooks_give(family, dtype):
    model = MAKERS[family]().to(dtype)
    patcher, kinds = hooks.LayersPatcher(bound(model)), O.kinds(model)
    with patcher.binding.session():
        base = patcher.record(text(IDS), READ, set())
        values = noisy(patcher.record(text(OTHER), READ, set(kinds)))
        edits = grid(patcher, kinds)
        got = run(patcher, base, edits, values)
    want = expected(model, edits, values)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    error = (got.double() - want.double()).abs() / want.double().abs().clamp(min=scale(model))
    assert float(error.max()) <= tolerance, [KINDS[k] for k in edits.kind[error.amax(1).numpy() > tolerance]]
    assert len({round(float(r[0]), 4) for r in want}) > len(edits) // 4  # the edits do something


def test_beyond_the_limit_of_rotary_frequencies_too(all_fp64):
    """LongRoPE and dynamic NTK choose frequencies by the length, here above their limits."""
    ids = M.token_ids([30])[0]
    for family in ("phi3-longrope", "llama-dynamic"):
        model = M.decoder(family).double()
        patcher = hooks.LayersPatcher(bound(model))
        groups = np.zeros((1, 30), bool)
        groups[0, 20] = True
        edits = Edits(np.array([0], np.int8), np.array([1]), np.array([0]), np.array([0]), groups)
        with patcher.binding.session():
            base = patcher.record(text(ids), 29, set())
            values = noisy(base)
            got = run(patcher, base, edits, values)[0]
        want = O.oracle(model, ids, 29, "resid_pre", 1, [20], 0, values("resid_pre", 1)[[20], 0])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["bert", "bert-tokens", "electra"])
def test_token_types_are_the_texts_own(family, all_fp64):
    model, types = MAKERS[family]().double(), [0] * 5 + [1] * 6
    patcher = hooks.LayersPatcher(bound(model))
    with patcher.binding.session():
        base = patcher.record(text(IDS, types), READ, {"k"})
        edits, values = grid(patcher, ["k"]), noisy(base)
        got = run(patcher, base, edits, values)
    torch.testing.assert_close(base.reward, O.reward(model, IDS, READ, types), rtol=0, atol=1e-10)
    torch.testing.assert_close(got, expected(model, edits, values, types), rtol=0, atol=1e-10)
    assert (base.reward - O.reward(model, IDS, READ)).abs().max() > 1e-3


def test_a_models_own_activations_change_nothing():
    model = M.decoder("gemma2").double()
    patcher = hooks.LayersPatcher(bound(model))
    with patcher.binding.session():
        base = patcher.record(text(IDS), READ, set(KINDS))
        got = run(patcher, base, grid(patcher, list(KINDS)), base.activations)
    torch.testing.assert_close(got, base.reward.expand_as(got), rtol=0, atol=1e-12)


def test_the_size_of_batches_changes_nothing():
    model = M.decoder("llama").double()
    patcher = hooks.LayersPatcher(bound(model))
    with patcher.binding.session():
        base = patcher.record(text(IDS), READ, set(KINDS))
        edits, values = grid(patcher, list(KINDS)), noisy(base)
        one, all_at_once = (run(patcher, base, edits, values, n) for n in (1, 10**6))
    torch.testing.assert_close(one, all_at_once, rtol=0, atol=1e-12)


def test_batches_that_are_done_are_left_out():
    patcher, seen = hooks.LayersPatcher(bound(M.decoder("llama"))), []
    with patcher.binding.session():
        base = patcher.record(text(IDS), READ, set(KINDS))
        edits, values = grid(patcher, ["q"]), noisy(base)
        want, skip = run(patcher, base, edits, values), np.ones(len(edits), bool)
        skip[4] = False
        patcher.rewards(base, edits, values, 33, lambda *some: seen.append(some), skip)
    [(indices, rewards)] = seen
    assert indices.tolist() == [3, 4, 5] and torch.equal(rewards, want[3:])


def test_layers_below_the_edit_are_not_run():
    model, calls = M.decoder("llama"), []
    patcher = hooks.LayersPatcher(bound(model))
    groups = np.ones((1, len(IDS)), bool)
    for kind, layer, ran in (("resid_post", 0, [1]), ("attn_out", 1, [1]), ("resid_post", 1, []), ("q", 0, [0, 1])):
        edits = Edits(*(np.array([i]) for i in (KINDS.index(kind), layer, 0, 0)), groups)
        with patcher.binding.session():
            base = patcher.record(text(IDS), READ, {kind})
            handles = [
                block.mlp.register_forward_hook(lambda *_, i=i: calls.append(i))
                for i, block in enumerate(model.model.layers)
            ]
            run(patcher, base, edits, base.activations)
        for handle in handles:
            handle.remove()
        assert calls == ran, kind
        calls.clear()


def test_values_of_another_shape_are_refused():
    patcher = hooks.LayersPatcher(bound(M.decoder()))
    with patcher.binding.session():
        base = patcher.record(text(IDS), READ, set())
        with pytest.raises(ValueError, match=r"values of head_out in layer 0 .* = \(11, 4, 12\), got \(11, 1, 48\)"):
            run(patcher, base, grid(patcher, ["head_out"]), lambda kind, layer: torch.zeros(11, 1, 48))


def test_a_record_says_what_it_holds():
    patcher = hooks.LayersPatcher(bound(M.decoder()))
    with patcher.binding.session():
        record = patcher.record(text(IDS), READ, {"q"})
    with pytest.raises(ValueError, match=r"recorded \(q, resid_post, resid_pre\), got v of layer 0"):
        record.activations("v", 0)


def test_a_batch_that_runs_out_of_memory_is_halved(monkeypatch):
    patcher, sizes = hooks.LayersPatcher(bound(M.decoder("llama").double())), []
    edited = patcher._edited

    def small(base, edits, new):
        sizes.append(len(edits))
        if len(edits) > 2:
            raise torch.OutOfMemoryError("no more")
        return edited(base, edits, new)

    with patcher.binding.session():
        base = patcher.record(text(IDS), READ, set(KINDS))
        edits, values = grid(patcher, ["resid_mid", "v"]), noisy(base)
        want = run(patcher, base, edits, values)
        monkeypatch.setattr(patcher, "_edited", small)
        got = run(patcher, base, edits, values, 88)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert sizes[:3] == [6, 3, 1] and max(sizes[2:]) == 1


# Gradients ------------------------------------------------------------------------------------------------------------


@families
def test_gradients_are_finite_differences(family, all_fp64):
    model = MAKERS[family]().double()
    binding, kinds = bound(model), O.kinds(model)
    record, gradient = gradients(binding, set(kinds), metric=lambda r: r[0])
    for kind in kinds:
        for layer in range(len(O.layers(model))):
            x, grad = record.activations(kind, layer), gradient(kind, layer)
            assert grad.shape == x.shape
            unit, positions = x.size(1) - 1, [0, 4, READ]
            step = torch.randn(3, x.size(2), dtype=x.dtype, generator=torch.Generator().manual_seed(layer))
            ends = [
                O.oracle(model, IDS, READ, kind, layer, positions, unit, x[positions, unit] + eps * step)[0]
                for eps in (1e-5, -1e-5)
            ]
            slope = (grad[positions, unit] * step).sum()
            torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-9, msg=f"{kind} {layer}")


@few
def test_the_gradient_run_is_recorded_like_any_other(family):
    model = MAKERS[family]()
    patcher, kinds = hooks.LayersPatcher(bound(model)), set(O.kinds(model))
    got, _ = patcher.gradients(text(IDS), READ, kinds, metric=torch.sum)
    with patcher.binding.session():
        want = patcher.record(text(IDS), READ, kinds)
        assert not got.reward.requires_grad
        torch.testing.assert_close(got.reward, want.reward)
        for kind in kinds:
            torch.testing.assert_close(got.activations(kind, 1), want.activations(kind, 1))
        edits = grid(patcher, sorted(kinds))
        torch.testing.assert_close(*(run(patcher, base, edits, noisy(want)) for base in (got, want)))


def test_several_rewards_have_a_gradient_each():
    binding = bound(M.decoder("llama", labels=3))
    _, every = gradients(binding, {"resid_mid", "k"})
    for label in range(3):
        _, one = gradients(binding, {"k", "resid_mid"}, metric=lambda r, label=label: r[label])
        for kind in ("resid_mid", "k"):
            torch.testing.assert_close(every(kind, 0)[label], one(kind, 0))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_may_be_eager_or_sdpa(implementation):
    model = M.decoder("llama").double()
    _, want = gradients(bound(model), {"q"})
    model.set_attn_implementation(implementation)
    _, got = gradients(bound(model), {"q"})
    torch.testing.assert_close(got("q", 0), want("q", 0), rtol=0, atol=1e-6)


def test_parameters_get_no_gradients_and_keep_what_they_have():
    model, touched = M.decoder("llama"), []
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.grad = torch.ones_like(weight)
    model.score.weight.requires_grad = False
    flags = [p.requires_grad for p in model.parameters()]
    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(lambda grad: touched.append(grad))
    gradients(bound(model), set(KINDS))
    assert not touched
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert sum(p.grad is not None for p in model.parameters()) == 1


@few
def test_frozen_models_have_the_same_gradients_inside_of_any_mode(family):
    model = MAKERS[family]()
    kinds = set(O.kinds(model))
    patcher = hooks.LayersPatcher(bound(model))
    _, want = patcher.gradients(text(IDS), READ, kinds, metric=torch.sum)
    model.requires_grad_(False)
    with torch.inference_mode():
        _, got = patcher.gradients(text(IDS), READ, kinds, metric=torch.sum)
        assert torch.is_inference_mode_enabled()
    for kind in kinds:
        torch.testing.assert_close(got(kind, 0), want(kind, 0))


@pytest.mark.parametrize("metric", [lambda r: r.repeat(2), lambda r: 1.0, lambda r: r.detach()[0]])
def test_a_metric_that_is_no_number_of_the_rewards_is_refused(metric):
    with pytest.raises(ValueError, match="Expected metric to return one number that depends on the rewards"):
        gradients(bound(M.decoder()), {"q"}, metric)


def test_gradients_that_were_not_asked_for_are_refused():
    _, gradient = gradients(bound(M.decoder()), {"q"})
    with pytest.raises(ValueError, match=r"asked for before \(q\), got v of layer 1"):
        gradient("v", 1)


# What stays in the model ----------------------------------------------------------------------------------------------


@few
def test_nothing_is_left_in_the_model(family):
    model = MAKERS[family]().train()
    before = traces(model)
    patcher, kinds = hooks.LayersPatcher(bound(model)), O.kinds(model)
    with patcher.binding.session():
        base = patcher.record(text(IDS), READ, set(kinds))
        run(patcher, base, grid(patcher, kinds), base.activations)
    patcher.gradients(text(IDS), READ, set(kinds), metric=torch.sum)
    assert traces(model) == before
    assert all(module.training for module in model.modules())


def test_nothing_is_left_in_the_model_by_an_error():
    model = M.decoder("llama")
    before = traces(model)
    patcher = hooks.LayersPatcher(bound(model))

    def fail(*args):
        raise KeyError("mine")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with patcher.binding.session(), pytest.raises(KeyError, match="mine"):
        patcher.record(text(IDS), READ, set(KINDS))
    with pytest.raises(KeyError, match="mine"):
        patcher.gradients(text(IDS), READ, {"q"})
    handle.remove()
    with patcher.binding.session():
        base = patcher.record(text(IDS), READ, set(KINDS))
        handle = model.model.layers[1].mlp.register_forward_hook(fail)
        with pytest.raises(KeyError, match="mine"):
            run(patcher, base, grid(patcher, list(KINDS)), base.activations)
        handle.remove()
    with pytest.raises(KeyError, match="mine"):
        patcher.gradients(text(IDS), READ, {"q"}, metric=fail)
    assert traces(model) == before


def steer_output(model):
    return model.model.layers[0].register_forward_hook(lambda module, args, out: out + 1.5)


def steer_input_in_place(model):
    return model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0].add_(0.5), None)[1])


def same_tensor_from_a_projection(model):
    fixed = torch.randn(1, 1, 48, generator=torch.Generator().manual_seed(0)).double()
    projection = model.model.layers[1].self_attn.o_proj
    return projection.register_forward_hook(lambda module, args, out: out * 0 + fixed)


def scaled_norm_input(model):
    norm = model.model.layers[1].post_attention_layernorm
    return norm.register_forward_pre_hook(lambda module, args: (args[0] * torch.linspace(1, 2, 48).double(),))


def constant_output(model):
    kept = torch.randn(len(IDS), 48, generator=torch.Generator().manual_seed(0)).double()
    return model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: kept.expand_as(out))


@pytest.mark.parametrize(
    "hook", [steer_output, same_tensor_from_a_projection, scaled_norm_input, constant_output, steer_input_in_place]
)
def test_hooks_of_the_users_take_part_and_stay(hook, all_fp64):
    model = M.decoder("llama").double()
    binding = bound(model)
    patcher = hooks.LayersPatcher(binding)
    handle = hook(model)
    hooked = traces(model)
    with binding.session():
        base = patcher.record(text(IDS), READ, set(KINDS))
        edits, values = grid(patcher, list(KINDS)), noisy(patcher.record(text(OTHER), READ, set(KINDS)))
        got = run(patcher, base, edits, values)
        again = patcher.record(text(IDS), READ, set())
    assert traces(model) == hooked
    torch.testing.assert_close(base.reward, O.reward(model, IDS, READ), rtol=0, atol=1e-10)
    torch.testing.assert_close(again.reward, base.reward, rtol=0, atol=0)
    if hook is not steer_input_in_place:  # the oracle's own hook there comes after it, as ours does
        torch.testing.assert_close(got, expected(model, edits, values), rtol=0, atol=1e-10)
    handle.remove()


def test_other_threads_runs_are_left_alone(all_fp64):
    model = M.decoder("llama").double()
    patcher, want = hooks.LayersPatcher(bound(model)), O.reward(model, IDS, READ)
    got = []
    with patcher.points[1]["attn_out"].tapped(lambda x: torch.zeros_like(x)):
        assert not torch.allclose(O.reward(model, IDS, READ), want)
        thread = threading.Thread(target=lambda: got.append(O.reward(model, IDS, READ)))
        thread.start()
        thread.join()
    assert torch.equal(got[0], want)

"""The packed engine: the same score alone and in any batch, order, neighbourhood and sharing, on every family."""

from __future__ import annotations

import copy
import functools
import gzip
import random
import re

import families
import models as M
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rmfast
from bench import spread
from rmfast.engine import attention, mlps
from rmfast.engine.invariance import _products
from rmfast.engine.packed import Engine
from rmfast.engine.planner import plan
from rmfast.reward_model import RewardModel

FAMILIES = [*M.DECODERS, "gpt2"]


def texts(seed: int = 0) -> list[list[int]]:
    """Nested sharing: a system prompt, prompts, answers; texts that begin others; duplicates; short ones; lone ones."""
    rng = random.Random(seed)
    system, alone = M.token_ids([11], seed)[0], M.token_ids([40, 1, 3], seed + 1)
    out = []
    for i in range(3):
        prompt = system + M.token_ids([9], seed + 10 + i)[0]
        out += [prompt + M.token_ids([rng.randrange(1, 12)], seed + 20 + 3 * i + j)[0] for j in range(3)]
    out += [*alone, system, out[0], out[1] + [7]]
    rng.shuffle(out)
    return out


def truths(model, inputs) -> torch.Tensor:
    # A copy for each: dynamic rotary embeddings remember the longest text they have seen.
    return torch.stack([M.alone(copy.deepcopy(model), ids) for ids in inputs])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_scores_are_those_of_each_text_alone(family):
    model = M.decoder(family, labels=3)
    rm, inputs = RewardModel(model), texts()
    want = truths(model, inputs)
    for budget in (None, 16, 40):
        M.assert_rewards(
            rm.score(inputs, batch_tokens=budget, max_length=128, engine="packed"), want, M.reward_scale(model)
        )


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma3"])  # which has no token classification
def test_packed_token_values_are_those_of_each_text_alone(family):
    model = M.decoder(family, task="TokenClassification")
    rm, inputs = RewardModel(model), texts(3)
    for budget in (None, 24):
        got = rm.token_values(inputs, batch_tokens=budget, max_length=128, engine="packed")
        for ids, values in zip(inputs, got):
            want = M.alone(copy.deepcopy(model), ids)[:, 0]
            M.assert_rewards(values, want, M.reward_scale(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_of_every_family_are_fused(family):
    rm = RewardModel(M.decoder(family))
    packed = rm.packed_engine()
    assert isinstance(packed, Engine) and (packed.mode, packed.why) == ("fused", None)
    assert "engine: packed, fused layers" in rm.explain()


def test_layers_of_another_shape_run_as_they_are():
    packed = RewardModel(families.model("olmo-clipped")).packed_engine()
    assert isinstance(packed, Engine) and packed.mode == "modules"
    assert packed.why == "layer 0 (OlmoDecoderLayer): its attention clips queries, keys and values"


MODEL = M.decoder("gemma3")  # windows, two rotary embeddings, norms of heads and after the blocks


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_score_depends_on_nothing_but_its_text(data):
    rng = random.Random(data.draw(st.integers(0, 2**31)))
    pool = [M.token_ids([n], rng.randrange(1000))[0] for n in (3, 9, 17, 30)]
    inputs = []
    for _ in range(data.draw(st.integers(1, 9))):
        ids = list(rng.choice(pool)) if rng.random() < 0.7 else []
        for _ in range(rng.randrange(3)):
            ids += rng.choice(pool)[: rng.randrange(1, 20)]
        inputs.append(ids or [5])
    budget = data.draw(st.sampled_from([None, 8, 20, 64]))
    got = RewardModel(MODEL).score(inputs, batch_tokens=budget, engine="packed")
    M.assert_rewards(got, truths(MODEL, inputs)[:, 0], M.reward_scale(MODEL))


@functools.cache
def bf16_rewards(family: str) -> spread.Rewards:
    """64 texts, four on each prompt. Their lengths change no rotary frequencies, which padded batches get wrong."""
    rng = random.Random(0)
    prompts, answers = ((8, 14), (1, 10)) if family == "llama-dynamic" else ((30, 100), (1, 28))
    shared = M.token_ids([rng.randrange(*prompts) for _ in range(16)], 1)
    inputs = [p + M.token_ids([rng.randrange(*answers)], 4 * i + j)[0] for i, p in enumerate(shared) for j in range(4)]
    return spread.measure(M.decoder(family).to(torch.bfloat16), inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bf16_reward_moves_with_its_batch_no_more_than_in_transformers(family):
    *padded, packed = (float(moved.max()) for moved in bf16_rewards(family).spreads().values())
    assert packed <= max(padded), (packed, padded)  # also where transformers' is 0 (Gemma 2): then not a bit


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bf16_reward_is_nearer_to_the_truth_than_in_transformers(family):
    errors = bf16_rewards(family).errors()
    ours, theirs = errors["packed together"], errors["transformers alone"]
    assert float(ours.mean()) <= 0.75 * float(theirs.mean()) and float(ours.max()) <= float(theirs.max())


def test_the_spread_of_a_saved_model_is_printed(tmp_path, capsys):
    M.decoder("llama").save_pretrained(tmp_path)
    M.tokenizer().save_pretrained(tmp_path)
    lines = gzip.compress(b'{"chosen": "one two", "rejected": "one three"}\n{"chosen": "four", "rejected": "5"}')
    (tmp_path / "texts.jsonl.gz").write_bytes(lines)
    for options in (["--tokens", "20"], ["--texts", str(tmp_path / "texts.jsonl.gz"), "--tokens", "6"]):
        spread.main([str(tmp_path), "--count", "3", *options])
        first, *rows = capsys.readouterr().out.splitlines()
        assert first.startswith("3 texts of") and first.endswith("tokens, bfloat16, cpu")
        assert [row.split("|")[1].strip() for row in rows[2:]] == [
            "transformers alone", "transformers batch 16", "transformers batch 16, sorted", "packed alone",
            "packed together",
        ]  # fmt: skip


def test_positions_and_pooling_read_inside_shared_prefixes():
    model = M.decoder("qwen2")
    rm, inputs = RewardModel(model), texts(7)
    at = [len(ids) // 2 for ids in inputs]
    want = truths(model, [ids[: p + 1] for ids, p in zip(inputs, at)])[:, 0]
    M.assert_rewards(rm.score(inputs, positions=at, engine="packed"), want, M.reward_scale(model))


def test_hooks_get_the_padded_batches_they_expect():
    model = M.decoder("llama")
    rm = RewardModel(model)
    handle = model.model.layers[0].register_forward_hook(lambda module, args, out: None)
    assert "hooks (on layers.0) expect padded batches" in rm.explain()
    with pytest.raises(ValueError, match="cannot run packed, since hooks"):
        rm.score([[1, 2]], engine="packed")
    handle.remove()
    assert "engine: packed" in rm.explain()


def test_the_hooks_that_transformers_leaves_behind_rule_nothing_out():
    model = M.decoder("llama")
    rm, inputs = RewardModel(model), texts(5)
    want = rm.score(inputs)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    assert "engine: packed, fused" in rm.explain() and "engine: packed, fused" in RewardModel(model).explain()
    assert torch.equal(rm.score(inputs, engine="packed"), want)
    model.model.layers[0].register_forward_hook(lambda module, args, out: None)
    assert "hooks (on layers.0) expect padded batches" in rm.explain()


def test_an_encoder_runs_padded_and_says_why():
    rm = RewardModel(M.encoder("Bert"))
    assert "engine: padded (not packed: its attention sees later tokens too)" in rm.explain()
    with pytest.raises(ValueError, match='Expected engine to be "padded"'):
        rm.score([[1, 2, 3]], engine="packed")


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match='Expected engine to be "packed" or "padded", got \'fast\''):
        RewardModel(M.decoder("llama")).score([[1]], engine="fast")


def test_out_of_memory_halves_the_budget_and_loses_nothing(monkeypatch):
    model = M.decoder("llama")
    rm, inputs = RewardModel(model), texts(9)
    want = rm.score(inputs, engine="padded")
    sizes = []
    original = Engine._chunk

    def scarce(self, ids, chunk, *rest):
        sizes.append(chunk.rows)
        if chunk.rows > 70 or len(sizes) == 2:
            raise torch.OutOfMemoryError("no memory")
        return original(self, ids, chunk, *rest)

    rm.explain()  # the engine is made and tried before memory gets scarce
    monkeypatch.setattr(Engine, "_chunk", scarce)
    M.assert_rewards(rm.score(inputs, engine="packed"), want, M.reward_scale(model))
    assert sizes[0] > 70 > sizes[-1]
    monkeypatch.setattr(Engine, "_chunk", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        rm.score(inputs, engine="packed")


@pytest.mark.parametrize("family", ["llama", "phi3-longrope"])
@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification"])
def test_inputs_planned_window_by_window_score_the_same_where_memory_runs_out_too(monkeypatch, family, task):
    model = M.decoder(family, task=task)
    rm, inputs = RewardModel(model), texts(3) + texts(5) + texts(8)
    score = rm.score if task.startswith("Sequence") else rm.token_values
    want = score(inputs, max_length=128, engine="packed")
    planned, ran, original = [], [], Engine._chunk

    def recorded(ids, cu, *, batch_tokens, **kw):
        planned.append((len(ids), batch_tokens))
        return plan(ids, cu, batch_tokens=batch_tokens, **kw)

    def scarce(self, ids, chunk, *rest):
        ran.append(len(planned))
        if len(ran) == 5:  # in the second window, after a chunk of it
            assert ran[-2:] == [2, 2]
            raise torch.OutOfMemoryError("no memory")
        return original(self, ids, chunk, *rest)

    monkeypatch.setattr("rmfast.engine.planner._WINDOW_TOKENS", 200)
    monkeypatch.setattr("rmfast.engine.planned.plan", recorded)
    monkeypatch.setattr(Engine, "_chunk", scarce)
    got = score(inputs, batch_tokens=80, max_length=128, engine="packed")
    M.assert_rewards(torch.hstack(list(got)), torch.hstack(list(want)), M.reward_scale(model))
    assert len(planned) > 4 and all(size < 200 + 40 for size, _ in planned)
    assert [budget for _, budget in planned] == [80, 80, *[64] * (len(planned) - 2)]


def test_nothing_stays_changed_in_the_model():
    model = M.decoder("gemma2").train()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    kind, implementation = type(model.config), model.config._attn_implementation
    RewardModel(model).score(texts(1), engine="packed")
    assert type(model.config) is kind and model.config._attn_implementation == implementation
    for name, module in model.named_modules():
        assert "forward" not in module.__dict__
        assert module.__dict__.keys() == before[name].keys() and module.training


def test_the_attention_function_refuses_to_run_outside_of_the_engine():
    model = M.decoder("llama")
    model.config._attn_implementation_internal = "rmfast"
    with pytest.raises(RuntimeError, match="only works inside rmfast's engine"):
        model(input_ids=torch.tensor([[1, 2, 3]]))


def test_a_model_whose_layers_look_right_but_are_not_is_found_out():
    model = M.decoder("llama")
    for layer in model.model.layers:
        layer.mlp.register_buffer("twice", torch.tensor(2.0))
        plain = type(layer.mlp).forward

        class Odd(type(layer.mlp)):
            def forward(self, x, plain=plain):
                return self.twice * plain(self, x)

        layer.mlp.__class__ = Odd
    rm, inputs = RewardModel(model), texts(2)
    packed = rm.packed_engine()
    assert (
        isinstance(packed, Engine) and packed.mode == "modules" and "its Odd holds twice beside its parts" in packed.why
    )
    M.assert_rewards(rm.score(inputs), truths(model, inputs)[:, 0], M.reward_scale(model))


@pytest.mark.parametrize("invariant, wanted", [(False, [60, 3]), (True, [72, 8])])  # whole tiles of 8 rows
def test_the_last_layer_runs_its_mlp_for_the_read_rows_alone(invariant, wanted, monkeypatch):
    rm = RewardModel(M.decoder("llama"), invariant=invariant, compute="native")  # torch's products move on 8 rows
    rm.explain()
    rows = []
    original = mlps.gated_activation
    monkeypatch.setattr(
        mlps, "gated_activation", lambda gate, up, **kw: rows.append(len(gate)) or original(gate, up, **kw)
    )
    rm.score(M.token_ids([10, 20, 30]), engine="packed")
    assert rows == wanted


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_every_backend_gives_the_same_scores(backend):
    model = M.decoder("qwen3")
    inputs = texts(4)
    with rmfast.backend(backend):
        got = RewardModel(model).score(inputs, engine="packed")
    M.assert_rewards(got, truths(model, inputs)[:, 0], M.reward_scale(model))


def test_lora_in_the_body_is_run():
    peft = pytest.importorskip("peft")
    model = M.decoder("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    inputs = texts(6)
    adapted.eval()
    want = torch.stack([M.alone(adapted, ids) for ids in inputs])[:, 0]
    got = RewardModel(adapted).score(inputs, engine="packed")
    assert (got - want).abs().max() <= 1e-5 * max(1.0, float(want.abs().max()))


def test_lora_on_projections_that_multiply_the_other_way_round_runs_packed():
    """GPT-2's Conv1D: peft's module around one shows its weight, and not that it lies across. Its square one would be
    taken for a Linear without a word, and the self-test of bits be of another product."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], task_type="SEQ_CLS", fan_in_fan_out=True)
    adapted = peft.get_peft_model(M.decoder("gpt2"), config)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    adapted.eval()
    rm, inputs = RewardModel(adapted, compute="native"), texts(6)
    engine = rm.packed_engine()
    assert isinstance(engine, Engine) and engine.mode == "fused", engine
    square = next(m for name, m in adapted.named_modules() if name.endswith("h.0.attn.c_proj"))
    assert not list(_products(square)) and [each.across for each in _products(square.base_layer)] == [True]
    want = torch.stack([M.alone(adapted, ids) for ids in inputs])[:, 0]
    assert (rm.score(inputs) - want).abs().max() <= 1e-5 * max(1.0, float(want.abs().max()))


def test_ids_are_planned_in_chunks_of_the_budget():
    rm = RewardModel(M.decoder("llama"))
    packed = rm.packed_engine()
    assert packed.affordable_tokens() >= 256
    sizes = []
    original = packed._chunk
    packed._chunk = lambda ids, chunk, *rest: sizes.append(chunk.rows) or original(ids, chunk, *rest)
    rm.score(M.token_ids([30] * 20), batch_tokens=64, engine="packed")
    assert max(sizes) <= 64 and np.sum(sizes) >= 600


def test_a_window_that_stands_in_the_mask_alone_is_not_lost():
    import transformers

    shape = {**M._SHAPE, "num_local_experts": 2, "num_labels": 1, "sliding_window": 16}
    model = M.randomised(transformers.PhimoeForSequenceClassification(transformers.PhimoeConfig(**shape)))
    rm, inputs = RewardModel(model), M.token_ids([40, 60, 50], 3)
    assert "not packed: it has its sliding window in the mask alone" in rm.explain()
    assert (rm.score(inputs) - truths(model, inputs)[:, 0]).abs().max() < 1e-5


@pytest.mark.parametrize("part", ["mlp", "self_attn", "input_layernorm", None])
def test_a_module_replaced_after_the_first_score_is_used(part):
    model, other = M.decoder("llama"), M.decoder("llama", seed=5)
    rm, inputs = RewardModel(model), texts(2)
    rm.score(inputs, engine="packed")
    if part is None:
        model.model.layers[1] = other.model.layers[1]
    else:
        setattr(model.model.layers[1], part, getattr(other.model.layers[1], part))
    M.assert_rewards(rm.score(inputs, engine="packed"), truths(model, inputs)[:, 0], M.reward_scale(model))


def test_a_backend_that_cannot_run_is_an_error_and_not_remembered():
    rm = RewardModel(M.decoder("llama"))
    with rmfast.backend("cuda"), pytest.raises(rmfast.BackendError):
        rm.score([[1, 2, 3]])
    assert "engine: packed" in rm.explain()


def test_many_texts_on_one_long_prefix_copy_it_once(monkeypatch):
    model = M.decoder("llama", max_position_embeddings=512)
    prompt = M.token_ids([300])[0]
    inputs = [[*prompt, i, i + 1, 7] for i in range(40)]
    rm, rows = RewardModel(model), []
    rm.explain()
    original = attention.suffix_attention
    monkeypatch.setattr(attention, "suffix_attention", lambda *a, **kw: rows.append(len(a[4])) or original(*a, **kw))
    M.assert_rewards(rm.score(inputs, engine="packed"), truths(model, inputs)[:, 0], M.reward_scale(model))
    assert max(rows) <= 2 * 300


def test_a_forward_set_on_a_rotary_embedding_is_left_there():
    model = M.decoder("phi3-longrope")
    rotary = model.model.rotary_emb
    rotary.forward = mine = rotary.forward
    RewardModel(model).score(M.token_ids([30, 40]), engine="packed")
    assert rotary.__dict__["forward"] is mine


def test_under_autocast_the_modules_choose_the_dtypes():
    rm, inputs = RewardModel(M.decoder("llama")), texts(1)
    want = rm.score(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "not packed: autocast is on" in rm.explain()
        rm.score(inputs)
    assert torch.equal(rm.score(inputs), want)


def test_attention_that_scales_by_position_is_not_taken_for_llama_s():
    config = transformers.Ministral3Config(
        vocab_size=272, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, head_dim=12,
        num_key_value_heads=2, max_position_embeddings=128, num_labels=1, pad_token_id=M.PAD,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5,
        },
    )  # fmt: skip
    model = M.randomised(transformers.Ministral3ForSequenceClassification(config))
    rm = rmfast.RewardModel(model)
    texts = M.token_ids([10, 60, 100])
    want = torch.stack([M.alone(model, text)[0] for text in texts])
    M.assert_rewards(rm.score(texts), want, M.reward_scale(model))
    assert "queries of layer 0 differ" in rm.explain()


def test_layers_without_attention_of_their_own_are_not_packed_in_any_dtype():
    model = M.decoder("llama", num_hidden_layers=3).bfloat16()
    model.model.layers[2] = model.model.layers[1]
    rm = rmfast.RewardModel(model, compute="native")  # in fp32 arithmetic the probe shows it
    assert "only 2 of its 3 layers have attention of their own" in rm.explain()


class Swapped(transformers.models.llama.modeling_llama.LlamaMLP):
    """With gate and up the other way round."""

    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Backwards(transformers.models.llama.modeling_llama.LlamaAttention):
    """With queries and keys turned the other way."""

    def forward(self, hidden_states, position_embeddings, **kwargs):
        cos, sin = position_embeddings
        return super().forward(hidden_states, position_embeddings=(cos, -sin), **kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("part", ["queries", "MLPs"])
def test_a_part_of_another_formula_is_found_out_in_16_bits_and_with_small_weights(part, dtype):
    """As just initialised, where the whole of a few tokens' states does not show it."""
    shape = {"vocab_size": M.VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_labels": 1, "pad_token_id": M.PAD,
             "eos_token_id": M.EOS}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape)
    model = transformers.LlamaForSequenceClassification(config)
    for index, layer in enumerate(model.model.layers):
        name, odd = ("mlp", Swapped(config)) if part == "MLPs" else ("self_attn", Backwards(config, index))
        odd.load_state_dict(getattr(layer, name).state_dict())
        setattr(layer, name, odd)
    rm = RewardModel(model.to(dtype).eval())
    # In fp32 arithmetic the whole shows it too.
    differ = f"({part} of layer 0 differ from the model's own|packed and padded hidden states differ) by"
    assert re.match(rf"engine: packed, modules layers \(fused layers: {differ}", rm.explain())


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_body_that_leaves_after_some_of_its_layers_runs_by_its_own(when):
    model = M.decoder("llama", num_hidden_layers=3)
    before = truths(model, texts())
    rm = RewardModel(model)
    if when == "after":
        rm.score(texts())
    model.config.num_hidden_layers = 1
    rm = rm if when == "after" else RewardModel(model)
    want = truths(model, texts())
    assert (want - before).abs().max() > 1e-2
    M.assert_rewards(rm.score(texts())[:, None], want, M.reward_scale(model))
    assert "packed, modules layers (the body runs only 1 of the 3 layers that it holds)" in rm.explain()


def test_a_forward_put_on_an_instance_later_is_seen():
    model = M.decoder("llama")
    rm, texts = rmfast.RewardModel(model), M.token_ids([5, 9])
    before = rm.score(texts)
    model.model.layers[0].mlp.forward = torch.zeros_like
    torch.testing.assert_close(rm.score(texts), rm.score(texts, engine="padded"), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(rm.score(texts), before)

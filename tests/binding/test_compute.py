"""Models whose weights are stored in 16 bits, run in fp32: the numbers of the same weights after `.float()`."""

from __future__ import annotations

import copy
import threading

import models as M
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from rmfast import RewardModel, TokenHead, backends, heads, interventions
from rmfast.binding import compute
from rmfast.debias.last_token import LastTokenRuns

TEXTS = M.token_ids([5, 20, 33, 60, 1, 20])

low = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def stored(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As `from_pretrained(dtype=)` gives it: weights in dtype, frequencies (buffers) in fp32."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def widened(model: nn.Module) -> nn.Module:
    """The truth: the same weights in fp32, by transformers."""
    return copy.deepcopy(model).float()


def assert_equal_in_fp32(got: torch.Tensor, want: torch.Tensor) -> None:
    """Within 1e-5 of the size of the rewards, which `M.randomised` makes of order 1."""
    assert got.dtype == torch.float32 and got.shape == want.shape
    assert float((got - want).abs().nan_to_num(0).max()) <= 1e-5 * max(1.0, float(want.abs().nan_to_num(0).max()))


def decoders() -> list:
    experts = {"num_experts_per_tok": 2, "head_dim": 16}
    more = [
        ("Mixtral", {"num_local_experts": 4, **experts}),
        ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 32, **experts}),
        ("OPT", {"ffn_dim": 80, "word_embed_proj_dim": 48}), ("GPTNeoX", {}),
        ("StableLm", {"partial_rotary_factor": 0.5}), ("Cohere", {}), ("Nemotron", {}),
    ]  # fmt: skip

    def made(prefix: str, extra: dict) -> nn.Module:
        config = getattr(transformers, f"{prefix}Config")(**{**M._SHAPE, "num_labels": 1, **extra})
        torch.manual_seed(0)
        return M.randomised(getattr(transformers, f"{prefix}ForSequenceClassification")(config))

    known = [(name, lambda name=name: M.decoder(name)) for name in ("gpt2", *M.DECODERS)]
    classes = [
        (prefix, lambda prefix=prefix, extra=extra: made(prefix, extra))
        for prefix, extra in more
        if hasattr(transformers, f"{prefix}ForSequenceClassification")
    ]
    return [pytest.param(make, id=name) for name, make in [*known, *classes]]


@low
@pytest.mark.parametrize("make", decoders())
def test_rewards_and_values_are_those_of_the_weights_in_fp32(make, dtype):
    model = stored(make(), dtype)
    truth = widened(model)
    limit = model.config.max_position_embeddings
    texts = [text for text in TEXTS if len(text) <= limit]
    rm, want = RewardModel(model, compute="fp32"), RewardModel(truth, compute="native")
    rewards = want.score(texts)
    for engine in ("padded", None):
        assert_equal_in_fp32(rm.score(texts, engine=engine), rewards)
    for got, values in zip(rm.token_values(texts), want.token_values(texts)):
        assert_equal_in_fp32(got, values)
    if rm.moves() is None:
        alone = torch.cat([rm.score([text]) for text in texts])
        assert torch.equal(rm.score(texts), alone) and torch.equal(rm.score(texts, batch_tokens=40), alone)
    assert all(p.dtype == dtype for p in model.parameters())


@low
@pytest.mark.parametrize("family", ["Bert", "DebertaV2", "Electra"])
def test_encoders_too(family, dtype):
    model = stored(M.encoder(family), dtype)
    want = RewardModel(widened(model), compute="native").score(TEXTS)
    got = RewardModel(model, compute="fp32").score(TEXTS)
    assert got.dtype == torch.float32 and float((got - want).abs().max()) <= 1e-5


def test_heads_of_several_layers_and_adapters():
    model = M.mlp_head(M.decoder("llama"))
    lora = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    for wrapped in (model, get_peft_model(M.decoder("qwen3"), lora)):
        low, truth = stored(wrapped.eval(), torch.bfloat16), widened(wrapped)
        got, want = (RewardModel(m, compute=c).score(TEXTS) for m, c in ((low, "fp32"), (truth, "native")))
        assert float((got - want).abs().max()) <= 2e-5


@pytest.mark.skipif(not hasattr(transformers, "ApertusForCausalLM"), reason="this transformers has no Apertus")
@low
def test_what_activations_make_of_their_weights_is_not_rounded(dtype):
    """Apertus' xIELU takes softplus of its weights, and adds a number of 16 bits to that."""
    torch.manual_seed(0)
    made = M.randomised(transformers.ApertusForCausalLM(transformers.ApertusConfig(**M._SHAPE)))
    model, truth = stored(made, dtype), widened(made)
    got, want = (RewardModel(m, head=TokenHead(1, 2), compute=c).score(TEXTS)
                 for m, c in ((model, "fp32"), (truth, "native")))  # fmt: skip
    assert_equal_in_fp32(got, want)


@low
def test_what_is_made_of_a_weight_is_fp32_and_what_is_written_to_stays_as_it_is(dtype):
    weight, x, out = nn.Parameter(torch.rand(8).to(dtype)), torch.rand(8).to(dtype), torch.zeros(8, dtype=dtype)
    wide = weight.detach().float()
    with torch.no_grad(), compute.Fp32():
        for got, want in (
            (weight + 1, wide + 1), (1 - weight, 1 - wide), (weight / 3, wide / 3), (2 / weight, 2 / wide),
            (weight**3, wide**3), (-weight, -wide), (torch.add(input=weight, other=1), wide + 1),
            (weight.exp(), wide.exp()),
            (nn.functional.softplus(weight), nn.functional.softplus(wide)),
        ):  # fmt: skip
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, want)
        assert (x + 1).dtype == dtype
        torch.add(weight, 1, out=out)
    assert torch.equal(out, (weight + 1).to(dtype))


@low
def test_heads_that_are_programs_too(dtype):
    made = M.decoder("llama", task="CausalLM")
    model = stored(made, dtype)
    truth = widened(model)
    weight = torch.randn(2, 48, generator=torch.Generator().manual_seed(0)) / 7
    for head in (TokenHead(1, 2), lambda x: x.float() @ weight.T, heads.Linear(weight=weight)):
        got, want = (RewardModel(m, head=head, compute=c).score(TEXTS) for m, c in ((model, "fp32"), (truth, "native")))
        assert_equal_in_fp32(got, want)


@low
def test_every_workload_runs_in_fp32(dtype):
    model = stored(M.decoder("qwen3"), dtype)
    truth = widened(model)
    rm, want = RewardModel(model, compute="fp32"), RewardModel(truth, compute="native")
    clean, corrupted = TEXTS[3], [*TEXTS[3][:20], *TEXTS[2], *TEXTS[3][53:]]
    for options in ({}, {"sites": "head_out", "positions": "joint"}):
        a, b = (each.patch_sweep(clean, corrupted, **options).rewards for each in (rm, want))
        assert_equal_in_fp32(a, b)
    a, b = (each.attribution_patch(clean, corrupted).rewards for each in (rm, want))
    assert_equal_in_fp32(a, b)
    for a, b in zip(rm.attribute(TEXTS), want.attribute(TEXTS)):
        for name, share in b.contributions.items():
            assert_equal_in_fp32(a.contributions[name], share)
    a, b = (each.lens(TEXTS).rewards for each in (rm, want))
    assert_equal_in_fp32(a, b)
    runs = LastTokenRuns(rm, TEXTS)
    assert torch.equal(runs.rewards()[:, 0], rm.score(TEXTS))
    name = next(iter(interventions.projections(rm)))
    clamp = interventions.NeuronClamp({name: ([1, 2], [0.5, 1.0])}, positions="all", fingerprint=None)
    a, b = (each.with_interventions(clamp).score(TEXTS) for each in (rm, want))
    # A folded clamp is a weight, which is rounded to the model's dtype.
    assert float((a - b).abs().max()) <= 4 * torch.finfo(dtype).eps * M.reward_scale(truth)


@low
def test_it_is_closer_to_the_truth_than_the_models_own_arithmetic(dtype):
    model = stored(M.decoder("llama", num_hidden_layers=4), dtype)
    truth = M.own(widened(model).double(), TEXTS)
    ours, theirs = RewardModel(model, compute="fp32").score(TEXTS), M.own(model, TEXTS)
    assert 5 * (ours - truth).abs().max() <= (theirs - truth).abs().max()


def test_auto_goes_by_a_rule_and_follows_the_weights(monkeypatch):
    monkeypatch.setattr(backends, "fp32_linear_pays", lambda dtype: (dtype == torch.bfloat16, f"told so of {dtype}"))
    model = M.decoder("llama")
    rm = RewardModel(model)
    assert "compute: torch's own, float32 weights (told so of torch.float32; here now" in rm.explain()
    model.bfloat16()
    assert "compute: fp32 on bfloat16 weights (told so of torch.bfloat16; here now" in rm.explain()
    assert_equal_in_fp32(rm.score(TEXTS), RewardModel(widened(model), compute="native").score(TEXTS))
    native = RewardModel(model, compute="native")
    assert "compute: torch's own, bfloat16 weights (as was asked for" in native.explain()
    assert not torch.equal(native.score(TEXTS), rm.score(TEXTS))


def test_the_rule(monkeypatch):
    """By vendor and features; the environment's limits on oneDNN are features too."""
    for machine, amx, dot, amd, limit, wanted in (
        ("x86_64", True, True, False, None, (False, False)),  # Sapphire Rapids
        ("x86_64", True, True, False, "AVX512_CORE", (True, False)),
        ("x86_64", False, True, False, None, (True, False)),  # Emerald Rapids without AMX
        ("x86_64", False, True, True, None, (False, True)),  # Zen 4
        ("x86_64", False, True, True, "AVX2", (True, True)),
        ("x86_64", False, False, True, None, (True, True)),  # Zen 3
        ("aarch64", False, False, False, None, (False, False)),
    ):
        monkeypatch.setattr(backends.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda dot=dot: dot)
        monkeypatch.setattr(backends, "_is_amd", lambda amd=amd: amd)
        monkeypatch.setattr(backends, "cpu_isa", lambda: "avx2")
        monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit or "ALL")
        backends.bf16_matmul_pays.cache_clear()
        got = tuple(backends.fp32_linear_pays(dtype)[0] for dtype in (torch.bfloat16, torch.float32))
        assert got == wanted, (machine, amx, dot, amd, limit)
    backends.bf16_matmul_pays.cache_clear()


def test_weights_that_multiply_by_themselves_are_left_alone():
    model = M.quantised()  # int8 buffers
    assert "compute: torch's own, float32 weights (its weights are quantised" in RewardModel(model).explain()
    with pytest.raises(ValueError, match='compute to be "native" or "auto", got "fp32": its weights are quantised'):
        RewardModel(model, compute="fp32")
    with pytest.raises(ValueError, match='got "fp32": its weights are float64'):
        RewardModel(M.decoder("llama").double(), compute="fp32")
    with pytest.raises(ValueError, match="Expected compute to be"):
        RewardModel(M.decoder("llama"), compute="fp16")


def test_other_threads_run_the_model_as_it_is():
    model = M.decoder("llama").bfloat16()
    rm = RewardModel(model, compute="fp32")
    want = M.own(model, TEXTS[:1])
    seen = []
    with rm.binding.session():
        assert compute.holds() and model.model.embed_tokens(torch.tensor([1])).dtype == torch.float32
        thread = threading.Thread(target=lambda: seen.append((compute.holds(), M.own(model, TEXTS[:1]))))
        thread.start()
        thread.join()
    assert not compute.holds() and not seen[0][0] and torch.equal(seen[0][1], want)


def test_casts_to_16_bits_are_left_out_but_for_those_that_all_weights_have():
    """`.float()` of the whole model would leave `x.bfloat16()` as it is: Falcon rounds its ALiBi biases by it."""
    weight = torch.zeros(3, dtype=torch.bfloat16)
    x = torch.full((3,), 1 + 1e-4)
    with compute.Fp32():
        ways = [x.to(weight), x.to(torch.bfloat16), x.to(dtype=torch.float16), x.to("cpu", torch.bfloat16),
                x.type_as(weight), x.to(weight.dtype, copy=True)]  # fmt: skip
        assert all(way.dtype == torch.float32 and torch.equal(way, x) for way in ways)
        assert (x.bfloat16().dtype, x.half().dtype) == (torch.bfloat16, torch.float16)
        assert x.to(torch.float64).dtype == torch.float64 and x.to("cpu").dtype == torch.float32


def test_no_copy_of_a_weight_is_made():
    """Peak memory of a product stays below that of its fp32 weight."""
    model = stored(M.decoder("llama", hidden_size=256, intermediate_size=2048), torch.bfloat16)
    rm = RewardModel(model, compute="fp32")
    rm.score(TEXTS[:1])
    with torch.profiler.profile(profile_memory=True) as profile:
        rm.score(TEXTS[:1])
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < 256 * 2048 * 4 / 2

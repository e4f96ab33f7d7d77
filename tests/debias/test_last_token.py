"""Reruns of the last token: scores under a clamp, from kept projections."""

from __future__ import annotations

import models as M
import pytest
import torch
from clamped import PER_TOKEN, TEXTS, clamp, same

import rmfast
from rmfast import DirectionRemoval, LengthPenalty, NeuronClamp, RewardModel
from rmfast import interventions as I
from rmfast.debias import last_token
from rmfast.last_token import LastTokenRuns


@pytest.mark.parametrize("family", PER_TOKEN)
def test_reruns_of_the_last_token_are_scores_under_the_clamp(family):
    rm = RewardModel(PER_TOKEN[family]())
    runs = LastTokenRuns(rm, TEXTS, batch_tokens=64, max_length=1000)
    value = clamp(rm, "last", per=4)
    want = [rm.score(TEXTS, max_length=1000), rm.with_interventions(value).score(TEXTS, max_length=1000)]
    for got, scores in zip((runs.rewards(), runs.rewards(value)), want, strict=True):
        same(got, scores.reshape(got.shape))
    assert (runs.cached_bytes > 0) == rm.explain().startswith("engine: packed")


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "bert-tokens"])
def test_projections_at_the_last_token_are_what_hooks_see(family, monkeypatch):
    model = PER_TOKEN[family]()
    rm = RewardModel(model)
    monkeypatch.setattr(
        "rmfast.debias.last_token.CAPTURE_BYTES", 4 * len(TEXTS) * 200
    )  # a run for every few projections
    found = dict(LastTokenRuns(rm, TEXTS).projections())
    assert list(found) == list(I.projections(rm))
    for name, got in found.items():
        seen = []
        handle = model.get_submodule(name).register_forward_hook(lambda m, a, out, seen=seen: seen.append(out[0, -1]))
        with torch.no_grad():
            for ids in TEXTS:
                model(input_ids=torch.tensor([ids]))
        handle.remove()
        assert torch.allclose(got, torch.stack(seen), atol=2e-5), name


def test_shared_prompts_are_kept_once_and_take_any_number_of_texts():
    rm = RewardModel(M.decoder("llama"))
    prompt = M.token_ids([40], 5)[0]
    texts = [prompt + ids for ids in M.token_ids([9] * 12, 6)]
    runs = LastTokenRuns(rm, texts)
    per_token = 2 * 2 * 2 * 16 * 4  # layers, K and V, heads, a head of 12 padded to 16, fp32
    assert runs.cached_bytes == (40 + 12 * 8) * per_token
    value = clamp(rm, "last")
    same(runs.rewards(value)[:, 0], rm.with_interventions(value).score(texts))


def test_reruns_take_the_interventions_that_a_model_carries_and_more():
    rm = RewardModel(M.decoder("llama"), M.tokenizer())
    every = clamp(rm, "all", 0, names=["model.layers.0.mlp.up_proj"])
    last = clamp(rm, "last", 1, names=["model.layers.1.mlp.up_proj"])
    more = (
        clamp(rm, "last", 2, names=["model.layers.0.mlp.down_proj"])
        + DirectionRemoval(torch.eye(48)[:1])
        + LengthPenalty()
    )
    debiased = rm.with_interventions(every, last)
    texts = ["some text", "some other text", "x"]
    runs = LastTokenRuns(debiased, texts)
    same(runs.rewards()[:, 0], debiased.score(texts))
    same(runs.rewards(more)[:, 0], debiased.with_interventions(more).score(texts))
    with pytest.raises(ValueError, match='Expected clamps with positions="last"'):
        runs.rewards(clamp(rm, "all", 3, names=["model.layers.1.mlp.gate_proj"]))


def test_reruns_refuse_more_neurons_of_a_projection_that_is_clamped_by_index_everywhere(monkeypatch):
    rm, name = RewardModel(M.decoder("llama")), "model.layers.0.mlp.up_proj"
    monkeypatch.setattr("rmfast.debias.apply.is_readable", lambda module: False)
    runs = LastTokenRuns(rm.with_interventions(NeuronClamp({name: ([0], [1.0])}, "all")), TEXTS)
    with pytest.raises(ValueError, match='Expected clamps with positions="last"'):
        runs.rewards(NeuronClamp({name: ([1], [5.0])}, "all"))


def test_too_little_memory_is_refused_before_anything_is_kept(monkeypatch):
    monkeypatch.setattr("rmfast.debias.last_token.free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match=r"to fit into 80% of free memory: .* tokens take .* GiB"):
        LastTokenRuns(RewardModel(M.decoder("llama")), TEXTS)


def test_bad_reruns_are_refused():
    with pytest.raises(ValueError, match="pools by itself"):
        LastTokenRuns(RewardModel(M.encoder()), TEXTS)
    runs = LastTokenRuns(RewardModel(M.decoder()), [])
    assert runs.rewards().shape == (0, 1)
    with pytest.raises(ValueError, match="names of projections"):
        list(runs.projections(["gone"]))
    assert rmfast.NeuronClamp is NeuronClamp


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.v_proj", "score"])
def test_a_model_that_has_changed_since_its_texts_were_run_is_refused(name):
    rm = RewardModel(M.decoder("llama"))
    runs = LastTokenRuns(rm, [[1, 2, 3], [4, 5]])
    runs.rewards()
    with torch.no_grad():
        rm.model.get_submodule(name).weight.mul_(2)
    with pytest.raises(ValueError, match="to be as it was when its texts were run"):
        runs.rewards()
    assert torch.equal(LastTokenRuns(rm, [[1, 2, 3], [4, 5]]).rewards()[:, 0], rm.score([[1, 2, 3], [4, 5]]))


@pytest.mark.parametrize("compute", ["native", "fp32"])
def test_autocast_is_refused_where_keys_and_values_were_made_without_it(compute):
    rm = RewardModel(M.decoder("llama").to(torch.bfloat16), compute=compute)
    runs = LastTokenRuns(rm, TEXTS)
    want = runs.rewards()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match="Expected autocast to be off, as when"):
            runs.rewards()
        made_there = LastTokenRuns(rm, TEXTS)
        same(made_there.rewards()[:, 0], rm.score(TEXTS))
    assert torch.equal(runs.rewards(), want)


def test_rows_that_a_gate_reads_are_of_the_weights_and_the_arithmetic_that_run():
    """Of padded runs nothing is kept but these."""
    body = M.decoder("llama").to(torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    gate = rmfast.heads.Layers(weights=[torch.randn(3, 48, generator=draw)], biases=[None])
    weight = torch.randn(3, 48, generator=draw)
    head = rmfast.heads.Gated(weight=weight, transform=torch.eye(3), gate=gate, pattern=(7,))
    rm, some = RewardModel(body.model, head=head), [[1, 7, 3], [4, 7, 5, 6]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        runs = LastTokenRuns(rm, some)
        same(runs.rewards()[:, 0], rm.score(some))
    with pytest.raises(ValueError, match="Expected autocast to be on, as when"):
        runs.rewards()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            body.model.layers[0].mlp.up_proj.weight.mul_(2)
        with pytest.raises(ValueError, match="to be as it was when its texts were run"):
            runs.rewards()


def test_attention_runs_outside_of_the_mode_for_fp32(monkeypatch):
    seen = []
    op = last_token.suffix_attention

    def watched(*args, **options):
        seen.append(torch._C._is_torch_function_enabled())
        return op(*args, **options)

    monkeypatch.setattr(last_token, "suffix_attention", watched)
    rm = RewardModel(M.decoder("llama").to(torch.bfloat16), compute="fp32")
    same(LastTokenRuns(rm, TEXTS).rewards()[:, 0], rm.score(TEXTS))
    assert seen and not any(seen)

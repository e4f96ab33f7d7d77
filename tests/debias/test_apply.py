"""Models under interventions: the rewards that plain hooks give; models side by side; several interventions at once."""

from __future__ import annotations

import copy
import threading

import models as M
import pytest
import torch
from clamped import _LONG, ALL, DECODERS, PER_TOKEN, TEXTS, clamp, hooked, same, scaled, truths

import rmfast
from rmfast import DirectionRemoval, LengthPenalty, RewardModel
from rmfast import interventions as I
from rmfast.debias.apply import _copied


@pytest.mark.parametrize("engine", [None, "padded"])
@pytest.mark.parametrize("family", ALL)
def test_clamps_at_all_positions_are_hooks_on_the_unmodified_model(family, engine):
    model = ALL[family]()
    rm = RewardModel(model)
    value = clamp(rm, "all")
    got = rm.with_interventions(value).score(TEXTS, engine=engine, max_length=1000)
    want = truths(model, value)
    same(got, want, scaled(model))
    assert (want - rm.score(TEXTS, max_length=1000)).abs().max() > 0.05  # it does something


@pytest.mark.parametrize("engine", [None, "padded"])
@pytest.mark.parametrize("family", PER_TOKEN)
def test_clamps_at_the_last_position_are_hooks_on_the_unmodified_model(family, engine):
    model = PER_TOKEN[family]()
    rm = RewardModel(model)
    value = clamp(rm, "last", per=4)
    got = rm.with_interventions(value).score(TEXTS, engine=engine, max_length=1000)
    want = truths(model, value)
    same(got, want, scaled(model))
    assert (want - rm.score(TEXTS, max_length=1000)).abs().max() > 0.01


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "neox", "bert"])
def test_clamps_by_index_are_clamps_by_fold(family, monkeypatch):
    rm = RewardModel(ALL[family]())
    value = clamp(rm, "all")
    folded = rm.with_interventions(value)
    assert folded.binding.root is not rm.binding.root and not folded.binding.clamps
    monkeypatch.setattr("rmfast.debias.apply.is_readable", lambda module: False)
    by_index = rm.with_interventions(value)
    assert by_index.binding.root is rm.binding.root and by_index.binding.clamps
    monkeypatch.undo()
    same(by_index.score(TEXTS), folded.score(TEXTS))
    same(by_index.score(TEXTS, engine="padded"), folded.score(TEXTS))


def test_the_last_position_is_the_one_that_score_reads():
    model = M.decoder("llama")
    rm = RewardModel(model)
    value = clamp(rm, "last")
    positions = [40, 5, -3, 12, 30, 0, 0, 11, 29]
    got = rm.with_interventions(value).score(TEXTS, positions=positions)
    want = [hooked(model, value, ids, read % len(ids)) for ids, read in zip(TEXTS, positions, strict=True)]
    same(got, torch.stack(want)[:, 0], scaled(model))


@pytest.mark.parametrize("family", ["llama", "phi3-longrope", "llama-dynamic", "gpt2"])
@pytest.mark.parametrize("engine", [None, "padded"])
def test_token_values_under_a_clamp_at_the_last_position_are_scores_at_each(family, engine):
    rm = RewardModel(M.decoder(family))
    debiased = rm.with_interventions(clamp(rm, "last"))
    texts = TEXTS[:3] if engine is None else TEXTS[5:]
    for ids, got in zip(texts, debiased.token_values(texts, engine=engine, max_length=1000), strict=True):
        want = torch.cat([debiased.score([ids], positions=[t], max_length=1000) for t in range(len(ids))])
        same(got, want)


def test_a_text_and_its_prefixes_share_rows_but_not_those_that_are_clamped():
    rm = RewardModel(M.decoder("llama"))
    texts = [_LONG[:n] for n in range(len(_LONG), 20, -1)]
    debiased = rm.with_interventions(clamp(rm, "last"))
    same(debiased.score(texts), torch.cat([debiased.score([ids], engine="padded") for ids in texts]))


@pytest.mark.parametrize("target", ["q_proj", "down_proj"])
def test_neurons_of_adapted_projections_are_clamped_behind_the_adapter(target):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(M.decoder("llama"), peft.LoraConfig(r=4, target_modules=[target], task_type="SEQ_CLS"))
    M.randomised(model)
    rm = RewardModel(model)
    assert all("lora" not in name and "base_layer" not in name for name in I.projections(rm))
    for positions in ("all", "last"):
        value = clamp(rm, positions)
        debiased = rm.with_interventions(value)
        assert debiased.binding.clamps
        same(debiased.score(TEXTS), truths(rm.binding.root, value))


@pytest.mark.parametrize("norm", ["before", "after"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "llama-mlp-head"])
def test_directions_are_removed_on_their_side_of_the_norm(family, norm):
    model = DECODERS[family]()
    rm = RewardModel(model)
    value = DirectionRemoval(torch.randn(3, 48, generator=torch.Generator().manual_seed(0)), 0.7, norm)
    p, seen = value.directions, []
    body_norm = rm.binding.norm
    handle = body_norm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    want = []
    for ids in TEXTS:
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
            h = seen.pop()[0, -1:]
            if norm == "before":
                x = body_norm(h - 0.7 * (h @ p.T) @ p)
                seen.clear()
            else:
                x = body_norm(h)
                seen.clear()
                x = x - 0.7 * (x @ p.T) @ p
            want.append(model.score(x)[0])
    handle.remove()
    got = rm.with_interventions(value).score(TEXTS)
    want = torch.stack(want)
    same(got, want[:, 0] if want.size(1) == 1 else want, 1.0)
    assert (got - rm.score(TEXTS)).abs().max() > 0.01


def test_the_mean_difference_is_that_of_the_streams_that_score_reads():
    model = M.decoder("llama")
    rm = RewardModel(model)
    with torch.no_grad():
        after = torch.stack([model.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in TEXTS])
    value = DirectionRemoval.mean_difference(rm, TEXTS[:4], TEXTS[4:], norm="after")
    want = after[:4].mean(0) - after[4:].mean(0)
    assert torch.allclose(value.directions[0], want / want.norm(), atol=1e-5)
    # Removed, the two sets no longer differ along it.
    same(
        rm.with_interventions(value).score(TEXTS),
        rm.score(TEXTS) - (after @ value.directions[0]) * float(model.score.weight.detach()[0] @ value.directions[0]),
        scaled(model),
    )


def test_debiased_models_live_side_by_side_and_the_original_stays_as_it_is():
    model = M.decoder("llama")
    rm = RewardModel(model)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    plain = rm.score(TEXTS)
    values = [clamp(rm, "all", 0), clamp(rm, "all", 1), clamp(rm, "last", 2)]
    debiased = [rm.with_interventions(value) for value in values]
    for _ in range(2):
        for one, value in zip(debiased, values, strict=True):
            same(one.score(TEXTS), truths(model, value), scaled(model))
        assert torch.equal(rm.score(TEXTS), plain)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_a_debiased_model_copies_the_matrices_that_it_touches_alone():
    model = M.decoder("llama")
    rm = RewardModel(model)
    name = "model.layers.1.mlp.up_proj"
    debiased = rm.with_interventions(clamp(rm, "all", names=[name]))
    own, shared = dict(debiased.model.named_parameters()), dict(model.named_parameters())
    assert {n for n, p in own.items() if p is not shared.get(n)} == {f"{name}.weight", f"{name}.bias"}
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)  # training goes on, in place
    fresh = rm.with_interventions(clamp(rm, "all", names=[name]))
    assert torch.equal(debiased.score(TEXTS), fresh.score(TEXTS))


def test_a_model_whose_copy_would_run_the_originals_modules_is_clamped_by_index():
    model = M.decoder("llama")

    class Holding(type(model.model.layers[0].mlp)):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.held[0](x))

    for layer in model.model.layers:
        layer.mlp.held = [layer.mlp.up_proj]  # no submodule, so that a copy holds the same
        layer.mlp.__class__ = Holding
    rm = RewardModel(model)
    value = clamp(rm, "all", names=["model.layers.0.mlp.up_proj"])
    debiased = rm.with_interventions(value)
    assert debiased.binding.clamps
    same(debiased.score(TEXTS, engine="padded"), truths(M.decoder("llama"), value), scaled(M.decoder("llama")))


def test_a_model_in_use_by_another_thread_is_folded_and_keeps_its_engine():
    rm = RewardModel(M.decoder("llama"))
    last = rm.with_interventions(clamp(rm, "last"))
    engine = last.packed_engine()

    def during_a_run(call):
        running = threading.Event()

        def run():
            with last.binding.session():
                running.set()
                threading.Event().wait(0.1)

        thread = threading.Thread(target=run)
        thread.start()
        running.wait()
        result = call()
        thread.join()
        return result

    assert not during_a_run(lambda: rm.with_interventions(clamp(rm, "all"))).binding.clamps
    assert during_a_run(last.packed_engine) is engine


def test_interventions_add_to_those_of_a_debiased_model():
    rm = RewardModel(M.decoder("llama"))
    a, b, c = (
        clamp(rm, "all", 0, names=["model.layers.0.mlp.up_proj"]),
        clamp(rm, "last", 1, names=["model.layers.1.mlp.up_proj"]),
        DirectionRemoval(torch.eye(48)[:2]),
    )
    once = rm.with_interventions(a, b, c)
    assert torch.equal(
        rm.with_interventions(a).with_interventions(b).with_interventions(c).score(TEXTS), once.score(TEXTS)
    )
    assert torch.equal(rm.with_interventions(a + b + c).score(TEXTS), once.score(TEXTS))


def test_sweeps_and_attribution_run_under_clamps():
    model = M.decoder("llama")
    rm = RewardModel(model)
    clean, corrupted = M.token_ids([9, 9], 4)
    value = clamp(rm, "all")
    debiased = rm.with_interventions(value)
    folded = copy.deepcopy(debiased.model)
    assert torch.allclose(
        debiased.patch_sweep(clean, corrupted).rewards,
        RewardModel(folded).patch_sweep(clean, corrupted).rewards,
        atol=1e-6,
    )
    assert torch.allclose(debiased.attribute(clean).rewards, debiased.score([clean])[0], atol=1e-5)
    last = rm.with_interventions(clamp(rm, "last"))
    sweep = last.patch_sweep(clean, corrupted, sites="resid_pre", layers=0, positions="joint")
    same(sweep.rewards.reshape(1), last.score([clean]))  # all of the embedding replaced
    estimate = last.attribution_patch(clean, corrupted, sites="resid_pre", layers=1)
    assert estimate.rewards.isfinite().all()
    assert not torch.allclose(
        estimate.rewards, rm.attribution_patch(clean, corrupted, sites="resid_pre", layers=1).rewards
    )
    for one in (last, rm.with_interventions(DirectionRemoval(torch.eye(48)[:1]))):
        with pytest.raises(ValueError, match="no interventions but clamps at all positions"):
            one.attribute(clean)
    corrected = rm.with_interventions(LengthPenalty())
    for call in (lambda: corrected.lens([clean]), lambda: corrected.patch_sweep(clean, corrupted)):
        with pytest.raises(ValueError, match="without corrections by length"):
            call()


@pytest.mark.parametrize("labels", [1, 3])
def test_scores_under_several_interventions_are_those_of_separate_models(labels):
    rm = RewardModel(M.decoder("llama", labels), M.tokenizer())
    last, every = clamp(rm, "last"), clamp(rm, "all")
    before, after = DirectionRemoval(torch.eye(48)[:2]), DirectionRemoval(torch.eye(48)[3:5], norm="after")
    variants = [None, before, after, before + after, LengthPenalty(0.01), last, last + before, every]
    texts = ["some text", ("a prompt", "and a response"), "x"]
    got = rm.score(texts, interventions=variants)
    want = torch.stack([(rm if v is None else rm.with_interventions(v)).score(texts) for v in variants])
    assert got.shape == want.shape
    assert torch.equal(got, want)


def test_variants_that_share_their_clamps_share_one_pass_of_the_body(monkeypatch):
    rm = RewardModel(M.decoder("llama"))
    rm.explain()
    runs = []
    monkeypatch.setattr(
        RewardModel, "run", lambda self, *a, _own=RewardModel.run, **k: runs.append(1) or _own(self, *a, **k)
    )
    last = clamp(rm, "last")
    removal = DirectionRemoval(torch.eye(48)[:2])
    rm.score(TEXTS, interventions=[None, removal, last, last + removal])
    assert len(runs) == 2


def test_variants_that_share_clamps_at_all_positions_share_one_copy(monkeypatch):
    rm = RewardModel(M.decoder("llama"))
    folds = []
    monkeypatch.setattr(
        "rmfast.debias.apply._copied", lambda *a, _own=_copied: folds.append(a[0] is rm.binding.root) or _own(*a)
    )
    every, removals = clamp(rm, "all"), [DirectionRemoval(torch.eye(48)[:n]) for n in (1, 2)]
    got = rm.score(TEXTS, interventions=[every, *(every + removal for removal in removals), removals[0]])
    assert sum(folds) == 1
    assert torch.equal(got[1], rm.with_interventions(every + removals[0]).score(TEXTS))
    assert torch.equal(got[2], rm.with_interventions(every, removals[1]).score(TEXTS))
    assert torch.equal(got[3], rm.with_interventions(removals[0]).score(TEXTS))


@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_each_text_may_have_an_intervention_of_its_own(engine):
    model = M.decoder("llama")
    rm = rmfast.RewardModel(model)
    variants = [clamp(rm, "last"), DirectionRemoval(torch.eye(model.config.hidden_size)[:2]), clamp(rm, "all"), None]
    texts = [text for text in TEXTS for _ in range(4)]  # alike, but for what is done to them
    index = torch.tensor([0, 1, 2, -1] * len(TEXTS))
    every = rm.score(texts, interventions=variants, engine=engine)
    got = rm.score(texts, interventions=variants, intervention_index=index, engine=engine)
    M.assert_rewards(got, every[index, range(len(texts))], M.reward_scale(model))
    assert rm.score([], interventions=variants, intervention_index=[]).shape == (0,)


@pytest.mark.parametrize("index", [[0], [0] * 10, [2, *[0] * (len(TEXTS) - 1)], [0.5] * len(TEXTS), [[0]] * len(TEXTS)])
def test_an_index_that_does_not_fit_is_refused(index):
    rm = rmfast.RewardModel(M.decoder("llama"))
    with pytest.raises((ValueError, TypeError), match="intervention_index"):
        rm.score(TEXTS, interventions=[None, clamp(rm, "last")], intervention_index=index)
    with pytest.raises(ValueError, match="interventions with intervention_index"):
        rm.score(TEXTS, intervention_index=index)


def test_no_inputs_and_no_variants():
    rm = RewardModel(M.decoder("llama"))
    assert rm.score([], interventions=[None, clamp(rm, "last")]).shape == (2, 0)
    assert rm.score(TEXTS, interventions=[]).shape == (0, len(TEXTS))
    assert rm.with_interventions() is rm


def written(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)


def loaded(model):
    model.load_state_dict({name: 2 * p for name, p in model.state_dict().items()})


def assigned(model):
    model.load_state_dict({name: 2 * p for name, p in model.state_dict().items()}, assign=True)


def new_head(model):
    model.score.weight = torch.nn.Parameter(2 * model.score.weight.detach())


def new_settings(model):
    for layer in model.model.layers:
        layer.self_attn.scaling = 1.0
        layer.input_layernorm.variance_epsilon = 0.5


@pytest.mark.parametrize("change", [written, loaded, assigned, new_head, new_settings, torch.nn.Module.bfloat16])
def test_what_a_folded_model_would_not_see_of_a_change_is_refused(change):
    model = M.decoder("llama")
    put = I.NeuronClamp({"model.layers.0.mlp.up_proj": ([1], [0.5])}, positions="all")
    clamped = RewardModel(model).with_interventions(put)
    want = clamped.score([[1, 2, 3]])
    assert torch.equal(copy.deepcopy(clamped).score([[1, 2, 3]]), want)
    change(model)
    for each in (clamped, copy.deepcopy(clamped)):
        with pytest.raises(ValueError, match="call with_interventions again"):
            each.score([[1, 2, 3]])
    assert (RewardModel(model).with_interventions(put).score([[1, 2, 3]]) - want).abs().max() > 1e-5


def test_weights_that_a_folded_model_shares_may_change_in_place():
    model = M.decoder("llama")
    put = I.NeuronClamp({"model.layers.0.mlp.up_proj": ([1], [0.5])}, positions="all")
    clamped = RewardModel(model).with_interventions(put)
    want = clamped.score([[1, 2, 3]])
    with torch.no_grad():
        model.score.weight.mul_(2)
    torch.testing.assert_close(clamped.score([[1, 2, 3]]), 2 * want)


def test_a_switch_of_adapters_in_the_original_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(M.decoder("llama"), config).eval()
    model.add_adapter("other", config)
    put = I.NeuronClamp({"model.layers.0.mlp.up_proj": ([1], [0.5])}, positions="all")
    clamped = RewardModel(model).with_interventions(put)
    want = clamped.score([[1, 2, 3]])
    model.set_adapter("other")
    with pytest.raises(ValueError, match="call with_interventions again"):
        clamped.score([[1, 2, 3]])
    model.set_adapter("default")
    assert torch.equal(clamped.score([[1, 2, 3]]), want)
    with model.disable_adapter(), pytest.raises(ValueError, match="call with_interventions again"):
        clamped.score([[1, 2, 3]])


@pytest.mark.parametrize("how", ["forward", "hook", "module"])
def test_clamps_on_a_copy_are_refused_once_the_model_has_changed(how):
    model = M.decoder("llama")
    put = I.NeuronClamp({"model.layers.0.mlp.up_proj": ([1], [0.5])}, positions="all")
    clamped = RewardModel(model).with_interventions(put)
    want = clamped.score([[1, 2, 3]])
    forward, head = model.score.forward, model.score
    if how == "forward":
        model.score.forward = lambda x: 2 * forward(x)
    elif how == "hook":
        handle = model.score.register_forward_hook(lambda module, args, out: 2 * out)
    else:
        model.score = torch.nn.Linear(48, 1)
    with pytest.raises(ValueError, match="call with_interventions again"):
        clamped.score([[1, 2, 3]])
    if how == "forward":
        del model.score.forward
    elif how == "hook":
        handle.remove()
    else:
        model.score = head
    assert torch.equal(clamped.score([[1, 2, 3]]), want)

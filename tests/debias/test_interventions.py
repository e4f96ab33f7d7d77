"""Interventions: the same rewards as plain hooks on the unmodified model; values that are saved, loaded and summed."""

from __future__ import annotations

import copy
import json
import threading
from contextlib import ExitStack

import models as M
import numpy as np
import pytest
import torch
import transformers
from torch import nn

import rmfast
from rmfast import LWR, DirectionRemoval, LengthPenalty, NeuronClamp, RewardModel
from rmfast import interventions as I
from rmfast.inputs import InputError
from rmfast.last_token import LastTokenRuns

DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,  # query_proj and key_proj are called twice, for tokens and for distances
    "position_buckets": 4,
}


def neox():
    torch.manual_seed(0)
    return M.randomised(
        transformers.GPTNeoXForSequenceClassification(transformers.GPTNeoXConfig(**M._SHAPE, num_labels=1))
    )


DECODERS = {
    **{name: (lambda name=name: M.decoder(name, labels=2)) for name in [*M.DECODERS, "gpt2"]},
    "llama-tokens": lambda: M.decoder("llama", task="TokenClassification"),
    "llama-mlp-head": lambda: M.mlp_head(M.decoder("llama")),
    "neox": neox,
}
PER_TOKEN = {
    **DECODERS,
    "bert-tokens": lambda: M.encoder("Bert", task="TokenClassification"),
    "deberta-tokens": lambda: M.encoder("DebertaV2", task="TokenClassification", **DEBERTA),
    "modernbert-tokens": lambda: M.encoder(
        "ModernBert", task="TokenClassification", cls_token_id=M.CLS, sep_token_id=M.SEP
    ),
}
ALL = {
    **PER_TOKEN,
    "bert": lambda: M.encoder("Bert", labels=2),
    "roberta": lambda: M.encoder("Roberta", pad_token_id=1, bos_token_id=0, eos_token_id=2),
    "electra": lambda: M.encoder("Electra"),
    "deberta": lambda: M.encoder("DebertaV2", **DEBERTA),
    "distilbert": lambda: M.encoder("DistilBert", hidden_dim=80),
}

_LONG = M.token_ids([50])[0]
# The second and third begin as the first does, and so do the fourth and fifth but for their ends; twins at the end.
TEXTS = [_LONG, _LONG[:30], _LONG[:29], [*_LONG[:30], 7, 8], [*_LONG[:30], 9], *M.token_ids([3, 1, 17], 1), _LONG[:30]]


def clamp(rm, positions, seed=0, per=2, names=None):
    """A few neurons of every projection, set to values of the size of their outputs."""
    rng = torch.Generator().manual_seed(seed)
    neurons = {
        name: (torch.randperm(size, generator=rng)[:per], torch.randn(per, generator=rng))
        for name, size in I.projections(rm).items()
        if names is None or name in names
    }
    return NeuronClamp(neurons, positions, rm.fingerprint)


def hooked(model, value, ids, read=None):
    """The reward (K,) of a text alone, by plain forward hooks on a copy of the unmodified model."""
    model = copy.deepcopy(model)  # dynamic rotary frequencies remember the longest text they have seen
    read = len(ids) - 1 if read is None else read
    with ExitStack() as stack:
        for name, (at, to) in value.neurons.items():
            calls = []

            def hook(module, args, out, at=at, to=to, calls=calls):
                calls.append(1)
                out = out.clone()
                if value.positions == "all":
                    out[..., at] = to
                elif len(calls) == 1:
                    out.view(-1, out.size(-1))[read, at] = to
                return out

            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        every = []
        if hasattr(model, "score"):
            stack.callback(model.score.register_forward_hook(lambda m, a, out: every.append(out)).remove)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits
        logits = every[0] if every else logits
    return logits[0, read] if logits.dim() == 3 else logits[0]


def truths(model, value, texts=TEXTS):
    want = torch.stack([hooked(model, value, ids) for ids in texts]).float()
    return want[:, 0] if want.size(1) == 1 else want


def same(got, want, least=1.0):
    M.assert_rewards(got, want, least)


def scaled(model):
    return (
        M.reward_scale(model)
        if isinstance(getattr(model, "score", None), nn.Linear) and hasattr(model.base_model, "norm")
        else 1.0
    )


# Exactness ------------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(I._model, "_readable", lambda module: False)
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


# Models side by side --------------------------------------------------------------------------------------------------


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
    engine = last._packed_engine()

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
    assert during_a_run(last._packed_engine) is engine


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


# Several at once ------------------------------------------------------------------------------------------------------


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
        RewardModel, "_run", lambda self, *a, _own=RewardModel._run, **k: runs.append(1) or _own(self, *a, **k)
    )
    last = clamp(rm, "last")
    removal = DirectionRemoval(torch.eye(48)[:2])
    rm.score(TEXTS, interventions=[None, removal, last, last + removal])
    assert len(runs) == 2


def test_variants_that_share_clamps_at_all_positions_share_one_copy(monkeypatch):
    rm = RewardModel(M.decoder("llama"))
    folds = []
    monkeypatch.setattr(I, "_copied", lambda *a, _own=I._copied: folds.append(a[0] is rm.binding.root) or _own(*a))
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
    with pytest.raises(ValueError, match="intervention_index"):
        rm.score(TEXTS, interventions=[None, clamp(rm, "last")], intervention_index=index)
    with pytest.raises(ValueError, match="interventions with intervention_index"):
        rm.score(TEXTS, intervention_index=index)


def test_no_inputs_and_no_variants():
    rm = RewardModel(M.decoder("llama"))
    assert rm.score([], interventions=[None, clamp(rm, "last")]).shape == (2, 0)
    assert rm.score(TEXTS, interventions=[]).shape == (0, len(TEXTS))
    assert rm.with_interventions() is rm


# Length ---------------------------------------------------------------------------------------------------------------


def test_lengths_are_the_characters_of_the_response():
    rm = RewardModel(M.decoder("llama"), M.tokenizer(chat=True))
    penalised = rm.with_interventions(LengthPenalty(0.5))
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "four"}]
    inputs = [("question", "four"), messages, "nine char", [97, 98, 99]]
    off = rm.score(inputs) - penalised.score(inputs)
    assert torch.allclose(off, torch.tensor([2.0, 2.0, 4.5, 1.5]), atol=1e-5)
    encoded = rm.encode(inputs)
    assert torch.equal(penalised.score(encoded), penalised.score(inputs))
    assert rm.encode([("q", "résumé")])[0].characters == 6
    values = penalised.token_values(inputs[:1])[0]
    assert torch.allclose(values, rm.token_values(inputs[:1])[0] - 2.0, atol=1e-5)
    normalised = penalised.score(inputs, normalize=(1.0, 2.0))
    assert torch.allclose(normalised, (penalised.score(inputs) - 1) / 2, atol=1e-6)


def test_lwr_takes_off_statsmodels_lowess_clamped_at_its_ends():
    lowess = pytest.importorskip("statsmodels.nonparametric.smoothers_lowess").lowess
    rng = np.random.default_rng(0)
    length = rng.integers(10, 500, 200)
    reward = 0.01 * length + np.sin(length / 50) + rng.normal(size=200)
    curve = LWR.fit(length, torch.from_numpy(reward))
    assert np.allclose(curve.expected(length), lowess(reward, length, frac=0.5, return_sorted=False), atol=1e-9)
    ends = curve.expected([0, 10_000])
    assert np.allclose(ends, curve.rewards[[0, -1]].numpy())
    rm = RewardModel(M.decoder("llama"), M.tokenizer())
    texts = ["a" * 50, "b" * 90]
    got = rm.with_interventions(curve).score(texts)
    assert torch.allclose(got, rm.score(texts) - torch.from_numpy(curve.expected([50, 90])).float(), atol=1e-5)


def test_token_ids_have_no_length_without_a_tokenizer():
    rm = RewardModel(M.decoder("llama"))
    with pytest.raises(InputError, match="input 0: a correction by length needs its characters"):
        rm.with_interventions(LengthPenalty()).score([[1, 2]])


def test_token_ids_are_decoded_once_for_the_values_of_all_their_tokens(monkeypatch):
    rm = RewardModel(M.decoder("llama"), M.tokenizer())
    penalised, decoded = rm.with_interventions(LengthPenalty(0.5)), []
    monkeypatch.setattr(I, "_characters", lambda *a: decoded.append(a[1]) or 4)
    values = penalised.token_values([TEXTS[1]])[0]
    assert torch.allclose(values, rm.token_values([TEXTS[1]])[0] - 2)
    assert len(decoded) == 1


# Values ---------------------------------------------------------------------------------------------------------------


def every_kind(rm):
    return {
        "last": clamp(rm, "last"),
        "all": clamp(rm, "all"),
        "directions": DirectionRemoval(torch.randn(2, 48), 0.5, "after", rm.fingerprint),
        "penalty": LengthPenalty(0.25),
        "lwr": LWR([1, 5, 9], [0.0, 1.0, 0.5], rm.fingerprint),
        "sum": clamp(rm, "last") + DirectionRemoval(torch.randn(1, 48)) + LengthPenalty(0.5),
    }


@pytest.mark.parametrize("name", ["last", "all", "directions", "penalty", "lwr", "sum"])
def test_a_saved_intervention_does_the_same(name, tmp_path):
    rm = RewardModel(M.decoder("llama"), M.tokenizer())
    value = every_kind(rm)[name]
    value.save(tmp_path / "saved")
    loaded = type(value).load(tmp_path / "saved")
    assert type(loaded) is type(value) and loaded.fingerprint == value.fingerprint
    texts = ["some text", "other"]
    assert torch.equal(rm.with_interventions(loaded).score(texts), rm.with_interventions(value).score(texts))
    assert type(I.load(tmp_path / "saved")) is type(value)


def test_metadata_that_json_lacks_leaves_no_files_behind(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        NeuronClamp({}, metadata={"when": object()}).save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("name", ["last", "all", "directions", "lwr", "sum"])
def test_an_intervention_of_another_model_is_refused(name):
    rm = RewardModel(M.decoder("llama"), M.tokenizer())
    value = every_kind(rm)[name]
    for other in (M.decoder("llama", seed=1), M.decoder("qwen2")):
        with pytest.raises(ValueError, match=r"Expected an intervention that was made with this .* Fit it anew"):
            RewardModel(other).with_interventions(value)
    assert RewardModel(M.decoder("llama").bfloat16()).fingerprint == rm.fingerprint  # the same model
    assert rm.with_interventions(clamp(rm, "all")).fingerprint == rm.fingerprint


def test_a_fingerprint_changes_with_training():
    model = M.decoder("llama")
    rm = RewardModel(model)
    before = rm.fingerprint
    assert rm.fingerprint == before
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert rm.fingerprint != before


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"to be a folder with intervention\.json and intervention\.safetensors"):
        I.load(tmp_path)
    LengthPenalty().save(tmp_path)
    with pytest.raises(ValueError, match="to hold a NeuronClamp, got a LengthPenalty"):
        NeuronClamp.load(tmp_path)
    (tmp_path / "intervention.json").write_text(json.dumps({"format": 2, "parts": []}))
    with pytest.raises(ValueError, match="format 2"):
        I.load(tmp_path)


def test_sums_merge_what_is_of_one_kind():
    a = NeuronClamp({"x": ([0, 1], [1.0, 2.0])}, "last", "f")
    b = NeuronClamp({"x": ([3, 1], [4.0, 2.0]), "y": ([0], [5.0])}, "last")
    both = a + b
    assert isinstance(both, NeuronClamp) and both.fingerprint == "f" and len(both) == 4
    assert (a + NeuronClamp({"x": ([], [])})).neurons["x"][0].tolist() == [0, 1]
    assert both.neurons["x"][0].tolist() == [0, 1, 3] and both.neurons["x"][1].tolist() == [1, 2, 4]
    removal = DirectionRemoval([[1.0, 0, 0]]) + DirectionRemoval([[1.0, 1, 0]])
    assert torch.allclose(removal.directions, torch.eye(3)[:2], atol=1e-6)
    mixed = a + DirectionRemoval(torch.eye(3)[:1]) + DirectionRemoval(torch.eye(3)[:1], norm="after") + LengthPenalty()
    assert [type(part).__name__ for part in mixed.parts] == [
        "NeuronClamp", "DirectionRemoval", "DirectionRemoval", "LengthPenalty"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (NeuronClamp({"x": ([0], [1.0])}), NeuronClamp({"x": ([0], [2.0])}), "got 1.0 and 2.0 for neuron 0 of x"),
        (NeuronClamp({"x": ([0], [1.0])}, "all"), NeuronClamp({"x": ([0], [2.0])}), "one value for each neuron"),
        (DirectionRemoval(torch.eye(3)[:1]), DirectionRemoval(torch.eye(3)[1:2], 0.5), "to agree in strength and size"),
        (DirectionRemoval(torch.eye(3)[:1]), DirectionRemoval(torch.eye(3)[:1]), "linearly independent"),
        (LengthPenalty(1, "f"), LengthPenalty(1, "g"), "different fingerprints"),
    ],
)
def test_sums_that_clash_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        a + b


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeuronClamp({"x": ([0], [1.0, 2.0])}), "a value for each of 1 neurons of x"),
        (lambda: NeuronClamp({"x": ([0, 0], [1.0, 2.0])}), "different indices"),
        (lambda: NeuronClamp({"x": ([-1], [1.0])}), "none of them negative"),
        (lambda: NeuronClamp({"x": ([0], [float("nan")])}), "finite values"),
        (lambda: NeuronClamp({"x": ([0.5], [1.0])}), "of integers"),
        (lambda: NeuronClamp({}, "first"), 'positions to be "last" or "all"'),
        (lambda: NeuronClamp([1]), "to be a mapping"),
        (lambda: NeuronClamp({"x": ([0],)}), r"Expected \(indices, values\) for neurons of x"),
        (lambda: DirectionRemoval(torch.ones(3)), r"directions to be \(J, d\), got \(3,\)"),
        (lambda: DirectionRemoval(torch.zeros(1, 3)), "finite and not 0"),
        (lambda: DirectionRemoval(torch.ones(2, 3)), "linearly independent"),
        (lambda: DirectionRemoval(torch.eye(3), float("inf")), "strength to be a finite number"),
        (lambda: DirectionRemoval(torch.eye(3), norm="in"), 'norm to be "before" or "after"'),
        (lambda: LengthPenalty("much"), "per_character to be a finite number"),
        (lambda: LWR([2, 1], [0, 0]), "ascending"),
        (lambda: LWR.fit([1, 2], [0, 0]), "at least 3 responses"),
        (lambda: LWR.fit([1, 1, 1], [0, 1, 2]), "different lengths"),
        (lambda: LWR.fit([1, 2, 3], [0, 1]), r"to be \(n,\)"),
        (lambda: LWR.fit([1, 2, 3], [0, 1, 2], frac=2), r"frac to be in \(0, 1\]"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize(
    ("family", "value", "message"),
    [
        (
            "llama",
            NeuronClamp({"model.layers.0.mlp.gone": ([0], [1.0])}),
            "Expected neurons of a projection of Llama.*gone",
        ),
        ("llama", NeuronClamp({"score": ([0], [1.0])}), "Expected neurons of a projection"),
        ("llama", NeuronClamp({"model.layers.0.mlp.up_proj": ([80], [1.0])}), r"in \[0, 80\), got 80"),
        ("llama", DirectionRemoval(torch.eye(47)[:1]), r"to be \(J, 48\), got \(1, 47\)"),
        ("llama", "bias", "to be NeuronClamp, .*, got str"),
        (
            "bert",
            NeuronClamp({"bert.encoder.layer.0.output.dense": ([0], [1.0])}),
            "pools by itself, so that it has no last",
        ),
        ("bert", DirectionRemoval(torch.eye(48)[:1]), "pools by itself"),
        ("labels", LWR([1, 2], [0, 0]), "a model of one reward for LWR, got 3"),
    ],
)
def test_interventions_that_do_not_fit_a_model_are_refused(family, value, message):
    make = {"llama": M.decoder, "bert": M.encoder, "labels": lambda: M.decoder(labels=3)}[family]
    with pytest.raises((ValueError, TypeError), match=message):
        RewardModel(make()).with_interventions(value)


def test_projections_are_found_by_structure():
    names = [name.removeprefix("model.layers.0.") for name in I.projections(RewardModel(M.decoder("qwen3")))][:7]
    assert names == [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    sizes = I.projections(RewardModel(M.decoder("phi3")))
    assert sizes["model.layers.1.self_attn.qkv_proj"] == 96 and sizes["model.layers.1.mlp.gate_up_proj"] == 160
    assert sum("c_attn" in name for name in I.projections(RewardModel(M.decoder("gpt2")))) == 2


# Reruns of the last token ---------------------------------------------------------------------------------------------


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
    monkeypatch.setattr("rmfast.last_token._CAPTURE_BYTES", 4 * len(TEXTS) * 200)  # a run for every few projections
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
    monkeypatch.setattr(I._model, "_readable", lambda module: False)
    runs = LastTokenRuns(rm.with_interventions(NeuronClamp({name: ([0], [1.0])}, "all")), TEXTS)
    with pytest.raises(ValueError, match='Expected clamps with positions="last"'):
        runs.rewards(NeuronClamp({name: ([1], [5.0])}, "all"))


def test_too_little_memory_is_refused_before_anything_is_kept(monkeypatch):
    monkeypatch.setattr("rmfast.last_token._free_memory", lambda device: 1000)
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

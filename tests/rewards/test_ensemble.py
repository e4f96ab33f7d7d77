"""Ensembles: formulas, members that share a body in one run, switched adapters, and each member's own bits."""

from __future__ import annotations

import copy
import math

import models as M
import peft
import pytest
import torch

import rmfast
from rmfast.heads import Linear

PAIRS = [("a question", "an answer"), ("a question", "another answer"), ("why?", "because"), ("say", "it " * 8)]


def headed(model, seed):
    """The model with another head, on a copy of its body."""
    made = copy.deepcopy(model)
    torch.manual_seed(seed)
    torch.nn.init.normal_(made.score.weight, std=0.15)
    return made


def counted(monkeypatch, rms):
    """How often each model's body runs."""
    runs = []
    for rm in rms:
        own = rm.run
        monkeypatch.setattr(rm, "run", lambda *a, rm=rm, own=own, **kw: runs.append(rm) or own(*a, **kw))
    return runs


@pytest.fixture(scope="module")
def members():
    model = M.decoder()
    return [rmfast.RewardModel(headed(model, seed), M.tokenizer()) for seed in range(4)]


def test_heads_of_several_checkpoints_on_equal_bodies_run_once(members, monkeypatch):
    ensemble = rmfast.Ensemble(members)
    assert ensemble.runs == 1 and ensemble.size == 4 and ensemble.moves() is None
    alone = torch.stack([rm.score(PAIRS) for rm in members])
    runs = counted(monkeypatch, members)
    got = ensemble.score(PAIRS)
    assert runs == [members[0]]
    assert torch.equal(got.members, alone)
    assert torch.equal(got.rewards, (alone.double().sum(0) / 4).float())
    torch.testing.assert_close(got.std, alone.double().std(0, correction=0).float())


@pytest.mark.parametrize("reduce", ["mean", "min", "uwo", "soft_min"])
def test_the_formulas_and_the_bits_in_any_batch(members, reduce):
    ensemble = rmfast.Ensemble(members, reduce=reduce, beta=0.3, lam=0.7)
    got = ensemble.score(PAIRS * 3)
    r = got.members.double()
    want = {
        "mean": r.mean(0),
        "min": r.amin(0),
        "uwo": r.mean(0) - 0.7 * r.var(0, correction=0),
        "soft_min": -0.3 * ((-r / 0.3).logsumexp(0) - math.log(4)),
    }[reduce]
    torch.testing.assert_close(got.rewards.double(), want, rtol=1e-6, atol=1e-6)
    for i, pair in enumerate(PAIRS):
        one = ensemble.score([pair])
        assert all(torch.equal(a, b[..., i : i + 1]) for a, b in zip(one, got))


def test_soft_min_has_no_overflow_and_goes_from_mean_to_min(members):
    r = torch.tensor([[1000.0, -3.0], [-1000.0, 4.0], [0.0, 5.0]])
    least = rmfast.Ensemble(members, "soft_min", beta=1e-3).reduced(r)[0]
    torch.testing.assert_close(least, r.amin(0) + 1e-3 * math.log(3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rmfast.Ensemble(members, "soft_min", beta=1e6).reduced(r)[0][1:], r.mean(0)[1:])


def test_other_bodies_run_by_themselves(members, monkeypatch):
    other = headed(members[0].model, 9)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-4  # one number of all
    more = [
        *members[:2],
        rmfast.RewardModel(other, M.tokenizer()),
        rmfast.RewardModel(M.decoder("qwen2"), M.tokenizer()),
    ]
    ensemble = rmfast.Ensemble(more)
    assert ensemble.runs == 3
    encodes = []
    for rm in more:
        own = rm.encode
        monkeypatch.setattr(rm, "encode", lambda *a, own=own, **kw: encodes.append(1) or own(*a, **kw))
    got = ensemble.score(PAIRS)
    assert len(encodes) == 1  # one set of ids
    assert torch.equal(got.members, torch.stack([rm.score(PAIRS) for rm in more]))
    other.config.rope_parameters = {**other.config.rope_parameters, "rope_theta": 500.0}
    assert rmfast.Ensemble([members[0], rmfast.RewardModel(other, M.tokenizer())]).runs == 2


def test_several_heads_of_one_model_and_a_model_of_several_rewards():
    model = M.decoder(labels=3)
    three = rmfast.RewardModel(model, M.tokenizer())
    weights = model.score.weight.detach()
    one = [rmfast.RewardModel(model.model, M.tokenizer(), head=Linear(weight=weights[i : i + 1])) for i in range(3)]
    assert rmfast.Ensemble([three]).size == 3
    together = rmfast.Ensemble([three, *one])
    assert together.runs == 1 and together.size == 6
    got = together.score(PAIRS).members
    assert torch.equal(got[:3], three.score(PAIRS).T)
    assert torch.equal(got[3:], torch.stack([rm.score(PAIRS) for rm in one]))


def test_members_that_read_at_other_tokens_are_right_too():
    model = M.decoder()
    rms = [rmfast.RewardModel(model, M.tokenizer(), pooling=pooling) for pooling in ("auto", M.BOS)]
    rms.append(rmfast.RewardModel(headed(model, 3), M.tokenizer()))
    ensemble = rmfast.Ensemble(rms)
    assert ensemble.runs == 1
    assert torch.equal(ensemble.score(PAIRS).members, torch.stack([rm.score(PAIRS) for rm in rms]))


def test_interventions_are_their_members_own(members):
    removed = rmfast.DirectionRemoval(torch.eye(48)[:2])
    penalty = rmfast.LengthPenalty(0.1)
    rms = [members[0], members[0].with_interventions(removed), members[1].with_interventions(penalty)]
    ensemble = rmfast.Ensemble(rms)
    assert ensemble.runs == 1
    torch.testing.assert_close(ensemble.score(PAIRS).members, torch.stack([rm.score(PAIRS) for rm in rms]))
    clamp = rmfast.NeuronClamp({"model.layers.0.mlp.up_proj": ([1, 2], [0.5, 0.25])})
    rms = [members[0], members[0].with_interventions(clamp)]
    ensemble = rmfast.Ensemble(rms)
    assert ensemble.runs == 2
    assert torch.equal(ensemble.score(PAIRS).members, torch.stack([rm.score(PAIRS) for rm in rms]))


@pytest.fixture
def adapted():
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["score"],
        init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(M.decoder(), lora, adapter_name="a")
    torch.manual_seed(5)
    model.add_adapter("b", lora)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "score" in name and ".b." in name:
                p.mul_(-2)
    return model.eval()


def test_adapters_are_switched_over_one_model(adapted, monkeypatch):
    rm = rmfast.RewardModel(adapted, M.tokenizer())
    alone = []
    for name in "ba":
        adapted.set_adapter(name)
        alone.append(rm.score(PAIRS))
    assert not torch.allclose(*alone)
    grads = [p.requires_grad for p in adapted.parameters()]
    ensemble = rmfast.Ensemble([(rm, "b"), (rm, "a")])
    encodes = []
    own = rm.encode
    monkeypatch.setattr(rm, "encode", lambda *a, **kw: encodes.append(1) or own(*a, **kw))
    got = ensemble.score(PAIRS)
    assert len(encodes) == 1
    assert torch.equal(got.members, torch.stack(alone))
    assert adapted.active_adapter == "a" and [p.requires_grad for p in adapted.parameters()] == grads
    assert all(torch.equal(ensemble.score([pair]).members[:, 0], got.members[:, i]) for i, pair in enumerate(PAIRS))
    with pytest.raises(ValueError, match=r"with an adapter of their model, which has a, b"):
        rmfast.Ensemble([(rm, "c")])


def test_adapters_have_heads_of_their_own(adapted):
    tokenizer = M.tokenizer()
    one, two = (rmfast.RewardModel(adapted, tokenizer, head=Linear(weight=torch.randn(1, 48))) for _ in range(2))
    with pytest.raises(ValueError, match="a head for each adapter"):
        rmfast.Ensemble([(one, "a"), (one, "b")])
    got = rmfast.Ensemble([(one, "a"), (two, "b")]).score(PAIRS).members
    for (rm, name), rewards in zip([(one, "a"), (two, "b")], got):
        adapted.set_adapter(name)
        assert torch.equal(rewards, rm.score(PAIRS))


def test_weights_that_change_later_are_seen(members):
    model = M.decoder()
    one, two = (rmfast.RewardModel(headed(model, seed), M.tokenizer()) for seed in (1, 2))
    ensemble = rmfast.Ensemble([one, two])
    with torch.no_grad():
        two.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    got = ensemble.score(PAIRS).members
    assert torch.equal(got, torch.stack([one.score(PAIRS), two.score(PAIRS)]))


def test_encoders_are_members_too():
    rms = [rmfast.RewardModel(M.encoder(seed=seed), M.tokenizer("encoder")) for seed in (0, 0, 1)]
    ensemble = rmfast.Ensemble(rms)
    got = ensemble.score(PAIRS)
    torch.testing.assert_close(got.members, torch.stack([rm.score(PAIRS) for rm in rms]))
    assert ensemble.moves() is not None
    assert ensemble.score([]).rewards.shape == (0,) and ensemble.score([]).members.shape == (3, 0)


@pytest.mark.parametrize(
    "given, more, word",
    [([], {}, "at least one"), (3, {}, "members"), (["a"], {}, "RewardModels"), (None, {"reduce": "max"}, "reduce"),
     (None, {"beta": 0}, "beta"), (None, {"lam": -1}, "lam")],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name(members, given, more, word):
    with pytest.raises((ValueError, TypeError), match=word):
        rmfast.Ensemble(members if given is None else given, **more)

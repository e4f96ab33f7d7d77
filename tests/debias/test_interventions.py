"""Interventions as values: corrections for length; what is saved, loaded and summed; what does not fit is refused."""

from __future__ import annotations

import json

import models as M
import numpy as np
import pytest
import torch
from clamped import TEXTS, clamp

from rmfast import LWR, DirectionRemoval, LengthPenalty, NeuronClamp, RewardModel
from rmfast import interventions as I
from rmfast.texts.inputs import InputError


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
    monkeypatch.setattr(RewardModel, "_characters", lambda *a: decoded.append(a[1]) or 4)
    values = penalised.token_values([TEXTS[1]])[0]
    assert torch.allclose(values, rm.token_values([TEXTS[1]])[0] - 2)
    assert len(decoded) == 1


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
        (lambda: NeuronClamp({"x": ([0], [1.0, 2.0])}), r"neurons of x: values to be of shape \(1,\), got \(2,\)"),
        (lambda: NeuronClamp({"x": ([0, 0], [1.0, 2.0])}), "different indices"),
        (lambda: NeuronClamp({"x": ([-1], [1.0])}), "indices to be an int .* got -1"),
        (lambda: NeuronClamp({"x": ([0], [float("nan")])}), "values to be finite"),
        (lambda: NeuronClamp({"x": ([0.5], [1.0])}), "neurons of x: indices to be an int .* got 0.5"),
        (lambda: NeuronClamp({}, "first"), 'positions to be "last" or "all"'),
        (lambda: NeuronClamp([1]), "to be a mapping"),
        (lambda: NeuronClamp({"x": ([0],)}), r"Expected \(indices, values\) for neurons of x"),
        (lambda: DirectionRemoval(torch.ones(3)), r"directions to be of shape \(J, d\), got \(3,\)"),
        (lambda: DirectionRemoval(torch.zeros(1, 3)), "directions that are not 0"),
        (lambda: DirectionRemoval(torch.ones(2, 3)), "linearly independent"),
        (lambda: DirectionRemoval(torch.eye(3), float("inf")), "strength to be a finite number"),
        (lambda: DirectionRemoval(torch.eye(3), norm="in"), 'norm to be "before" or "after"'),
        (lambda: LengthPenalty("much"), "per_character to be a finite number"),
        (lambda: LWR([2, 1], [0, 0]), "ascending"),
        (lambda: LWR.fit([1, 2], [0, 0]), "at least 3 responses"),
        (lambda: LWR.fit([1, 1, 1], [0, 1, 2]), "different lengths"),
        (lambda: LWR.fit([1, 2, 3], [0, 1]), r"rewards to be of shape \(3,\), got \(2,\)"),
        (lambda: LWR.fit([1, 2, 3], [0, 1, 2], frac=2), r"frac to be a finite number in \(0, 1\]"),
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

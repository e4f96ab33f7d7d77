"""An audit's data: what each section holds is what the library's own functions give."""

from __future__ import annotations

import json
from dataclasses import replace

import audits
import models
import numpy as np
import pytest
from audits import SMALL, found_by, model, small_audit

import rmfast
from rmfast import debias
from rmfast.audit import Audit, Kept, Settings, biases, collect
from rmfast.texts.inputs import words

pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def rm():
    return model()


@pytest.fixture(scope="module")
def found(rm):
    return found_by(rm)


@pytest.fixture(scope="module")
def audit():
    return small_audit()


def test_nothing_is_missing(audit):
    assert audit.missing == {} and audit.biases["why"] == ""
    assert (audit.pairs, audit.prompts, audit.left_out) == (40, 23, 0)


def test_figures_are_those_of_the_evaluation(audit, found):
    got = [(row["subset"], row["measure"], row["value"], row["low"], row["high"], row["n"]) for row in audit.figures]
    assert got == [tuple(row[:6]) for row in found.rows]


def test_the_most_and_least_certain_pairs_are_shown(audit, found):
    margins = np.array([pair[0] - pair[1] for pair in found.scores])
    of = {kind: [pair["place"] for pair in audit.shown if pair["kind"] == kind] for kind in ("wrong", "right", "close")}
    order = np.argsort(margins).tolist()
    assert of["wrong"] == order[:3] and of["right"] == order[::-1][:3]
    assert of["close"] == np.argsort(abs(margins)).tolist()[:3]
    for pair in audit.shown:
        row = audits.rows()[pair["place"]]
        assert pair["chosen"]["text"] == row["chosen"] and pair["rejected"]["text"] == row["rejected"]
        assert pair["margin"] == pytest.approx(margins[pair["place"]])


def test_tokens_are_the_models_own_values(audit, rm):
    for pair in audit.shown:
        row = audits.rows()[pair["place"]]
        for side in ("chosen", "rejected"):
            (text,) = rm.encode([(row["prompt"], row[side])])
            (values,) = rm.token_values([text])
            tokens = pair["tokens"][side]
            some = slice(tokens["start"], tokens["start"] + len(tokens["words"]))
            assert tokens["total"] == len(text)
            assert tokens["words"] == words(rm.tokenizer, text.ids[some].tolist())
            assert tokens["values"] == pytest.approx(values[some].tolist(), rel=1e-6)
            end = tokens["values"][tokens["read"] - tokens["start"]]
            assert end == pytest.approx(pair["rewards"][side == "rejected"], abs=1e-5)


def test_lens_curves_are_the_models_own(audit, rm):
    for pair in audit.shown:
        row = audits.rows()[pair["place"]]
        curves = rm.lens([(row["prompt"], row["chosen"]), (row["prompt"], row["rejected"])]).rewards
        for side, curve in zip(("chosen", "rejected"), curves):
            assert pair["lens"][side] == pytest.approx(curve.tolist(), abs=1e-5)


def test_pairs_with_few_tokens_in_common_are_swept_with_means(audit, rm):
    swept = [pair for pair in audit.shown if pair["sweep"]]
    assert [pair["kind"] for pair in swept] == ["wrong", "right"]
    texts = [
        (row["prompt"], row[s])
        for p in audit.shown
        for row in [audits.rows()[p["place"]]]
        for s in ("chosen", "rejected")
    ]
    for pair in swept:
        row = audits.rows()[pair["place"]]
        if pair["sweep"]["mode"] != "mean":
            continue
        for found in pair["sweep"]["maps"]:
            start = min(pair["tokens"]["shared"], pair["tokens"][found["side"]]["total"] - 1)
            text = (row["prompt"], row[found["side"]])
            (encoded,) = rm.encode([text])
            size = -(-(len(encoded) - start) // 32)
            groups = [slice(at, at + size) for at in range(start, len(encoded), size)]
            whole = rm.patch_sweep(text, mode="mean", baseline=texts, positions=groups)
            assert np.array(found["effect"], float) == pytest.approx(whole.effect.numpy(), abs=1e-5)


def test_pairs_that_are_nearly_the_same_are_patched_with_each_other(rm):
    pairs = [{"prompt": "ask", "chosen": f"a good film {i}", "rejected": f"a poor film {i}"} for i in range(10, 20)]
    found = rmfast.evaluation.evaluate(rm, pairs, layout="pairs", resamples=20)
    audit = collect(rm, found, settings=replace(SMALL, debias=False, parity=0))
    pair = next(pair for pair in audit.shown if pair["sweep"])
    row = pairs[pair["place"]]
    (drawn,) = pair["sweep"]["maps"]
    whole = rm.patch_sweep(("ask", row["chosen"]), ("ask", row["rejected"]))
    start = pair["tokens"]["shared"]
    assert pair["sweep"]["mode"] == "denoising" and drawn["side"] == "rejected"
    assert drawn["columns"] == whole.tokens[start:]
    assert np.array(drawn["effect"], float) == pytest.approx(whole.effect[:, start:].numpy(), abs=1e-5)
    assert not whole.effect[:, :start].any()  # what is left out
    assert drawn["gap"] == pytest.approx(pair["margin"], abs=1e-5)
    assert audit.parity is None and audit.biases["clamp"] is None and audit.biases["why"] == "it was not asked for"


def test_a_clamp_is_judged_on_prompts_that_it_was_not_fitted_on(audit, rm, found):
    fitted, held = biases._halves(found, seed=0)
    prompts = [{found.items[i].prompt for i in side} for side in (fitted, held)]
    assert not prompts[0] & prompts[1] and len(fitted) + len(held) == 40
    given = [biases.mapping_of(found.items[i]) for i in held]
    before = debias.report(rm, given, resamples=50)
    assert audit.biases["pairs"] == len(held) and audit.biases["clamp"]["fitted"] == len(fitted)
    assert [row["before"]["value"] for row in audit.biases["rows"]] == [
        pytest.approx(row.value) if row.value == row.value else None for row in before.rows
    ]
    after = audit.biases["rows"][0]["after"]["value"]
    assert audit.biases["clamp"]["change"]["value"] == pytest.approx(after - before["accuracy"].value)


def test_parity_and_facts(audit, rm):
    assert [way["n"] for way in audit.parity["ways"]] == [4] * 5
    assert max(way["largest"] for way in audit.parity["ways"]) < 1e-4
    facts = {name: value for rows in audit.facts.values() for name, value in rows}
    assert facts["fingerprint"] == rm.fingerprint and facts["rmfast"] == rmfast.__version__
    assert facts["command"] == audits.SCRIPT


def test_it_is_json_and_comes_back(audit, tmp_path):
    audit.save(tmp_path / "audit.json")
    assert Audit.load(tmp_path / "audit.json") == audit
    data = json.loads((tmp_path / "audit.json").read_text())
    (tmp_path / "audit.json").write_text(json.dumps(data | {"version": 99}))
    with pytest.raises(ValueError, match=r"a file that Audit\.save wrote, of version 1"):
        Audit.load(tmp_path / "audit.json")


def test_kept_sections_need_no_model_and_other_settings_make_their_own(found, tmp_path):
    made: list[str] = []
    settings = replace(SMALL, debias=False, sweep_pairs=1)

    def audited(rm, **changed):
        given = replace(settings, **changed)
        return collect(rm, found, settings=given, kept=Kept(tmp_path, "this run"), say=made.append)

    first = audited(model())
    assert made[:3] == ["facts", "tokens", "lens"] and made[-1] == "parity" and len(made) == 6
    made.clear()

    def none():
        raise AssertionError("the model was asked for")

    assert audited(none) == first and made == []
    audited(model(), parity=5)
    assert made == ["parity"]
    made.clear()
    (tmp_path / "lens.json").write_text('{"of": ')  # half of a file
    assert audited(model()).shown == first.shown
    assert made == ["lens", "parity"]


def test_a_model_that_pools_by_itself_has_no_tokens_and_says_so():
    rm = rmfast.RewardModel(models.encoder("Bert", max_position_embeddings=2048), models.tokenizer("encoder"))
    audit = collect(rm, found_by(rm, 20), settings=SMALL)
    assert "pools" in audit.missing["tokens"] and "pools" in audit.missing["lens"]
    assert audit.shown[0]["tokens"] is None and audit.figures and audit.biases["clamp"] is None and audit.biases["why"]


def test_too_few_pairs_have_no_clamp(rm):
    audit = collect(rm, found_by(rm, 12), settings=replace(SMALL, sweep_pairs=0))
    assert "a clamp needs 8 pairs to fit it" in audit.biases["why"]
    assert audit.biases["pairs"] == 12 and all(row["after"] is None for row in audit.biases["rows"])


@pytest.mark.parametrize("wrong", [{"show": 0}, {"sweep_pairs": -1}, {"trials": 0}, {"parity": 1.5}, {"debias": 1}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        Settings(**wrong)

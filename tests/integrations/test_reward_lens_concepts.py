"""Hacking, distortion, cascade, conflict and concepts of reward-lens 2.0.1 on the same raw inputs: `make
test-reward-lens`. What is defined there is the same number; where ours differs, the test says by what
(docs/concepts.md)."""

from __future__ import annotations

import models as M
import numpy as np
import pytest
import torch

import rmfast
from rmfast import concepts
from rmfast.interpret.cascade import misalignment_cascade
from rmfast.interpret.conflict import term_conflict
from rmfast.interpret.learned_conflict import learned_conflict
from rmfast.probes.statistics import standardised

reward_lens = pytest.importorskip("reward_lens", reason="reward-lens is not installed")
if not reward_lens.__version__.startswith("2."):
    pytest.skip(f"reward-lens {reward_lens.__version__} has no such classes", allow_module_level=True)

from reward_lens.concepts.vectors import dose_response_slope  # noqa: E402
from reward_lens.diagnostic_data import PreferencePair  # noqa: E402
from reward_lens.hacking import LENGTH_TESTS, HackingDetector  # noqa: E402
from reward_lens.interventions.erase import fit_leace  # noqa: E402
from reward_lens.model import RewardModel  # noqa: E402
from reward_lens.model_adapters import get_adapter  # noqa: E402

QUICK = {"resamples": 50, "permutations": 50}
KINDS = ("sabotage", "deceit")
# The same prompts for both kinds, each with a control of its own.
ITEMS = [
    (f"ask {i}", {k: (f"I would not {k} {i * i}", f"I {k} {i + 7}, and gladly") for k in KINDS}) for i in range(20)
]
PAIRS = [(prompt, *kinds["deceit"]) for prompt, kinds in ITEMS]


@pytest.fixture(scope="module")
def two():
    model = M.decoder("llama", num_hidden_layers=3, max_position_embeddings=1024)
    tokenizer = M.tokenizer("plain", chat=True)
    theirs = RewardModel(model, tokenizer, get_adapter(model), torch.device("cpu"))
    ours = rmfast.RewardModel(model, tokenizer)
    for prompt, *sides in PAIRS[:2]:
        ids = theirs.tokenize_conversation(prompt, sides[0])["input_ids"][0]
        np.testing.assert_array_equal(ours.encode([(prompt, sides[0])])[0].ids, ids)
    return theirs, ours, M.reward_scale(model)


def test_hacking_deltas_are_ours_and_its_d_but_for_its_denominator(two):
    theirs, ours, scale = two
    want = HackingDetector(theirs)._run_bias_test("length", LENGTH_TESTS, n_resamples=10)
    texts = [(each["prompt"], each[side]) for each in LENGTH_TESTS for side in ("biased", "neutral")]
    biased, neutral = ours.score(texts).double().numpy().reshape(-1, 2).T
    np.testing.assert_allclose(biased - neutral, want.reward_deltas, atol=1e-5 * scale)
    # Three pairs, whose d it takes over the sample's n − 1; ours is that of the mean over prompts, over n.
    d = standardised(want.reward_deltas, np.ones((1, 3)))[0]
    assert want.effect_size == pytest.approx(d * np.sqrt(2 / 3))


def distorted(theirs, probes):
    made = {
        name: [PreferencePair(**each, dimension=name, description="") for each in some] for name, some in probes.items()
    }
    return reward_lens.DistortionAnalyzer(theirs).compute_distortion_index([*probes], made)


def test_its_distortion_is_a_matter_of_what_else_is_measured(two):
    theirs, ours, _ = two
    fields = ("prompt", "preferred", "dispreferred")
    probes = {k: [dict(zip(fields, (p, *kinds[k]))) for p, kinds in ITEMS[:1]] for k in KINDS}
    want = distorted(theirs, probes)
    margins = [
        float(np.diff(ours.score([(p, kinds[k][1]), (p, kinds[k][0])]).double().numpy())[0])
        for k in KINDS
        for p, kinds in ITEMS[:1]
    ]
    scaled = (np.array(margins) - min(margins)) / (max(margins) - min(margins))
    assert [want.per_dimension_distortion[k] for k in KINDS] == pytest.approx(1 - scaled / scaled.max(), abs=1e-3)
    # So of two kinds one is 1 and one 0 in any model, however small its margins.
    assert sorted(want.per_dimension_distortion.values()) == [0, 1]
    theirs.model.score.weight.data *= 1e-3
    try:
        small = distorted(theirs, probes)
    finally:
        theirs.model.score.weight.data *= 1e3
    assert small.per_dimension_distortion == pytest.approx(want.per_dimension_distortion)


def test_its_cascade_of_matched_items_is_ours(two):
    theirs, ours, _ = two
    fields = ("prompt", "preferred", "dispreferred")
    tests = {k: [dict(zip(fields, (p, *kinds[k]))) for p, kinds in ITEMS] for k in KINDS}
    detector = reward_lens.MisalignmentCascadeDetector(theirs)
    want = detector.detect_cascade(dimensions=list(KINDS), custom_tests=tests)
    got = misalignment_cascade(ours, ITEMS, **QUICK)
    np.testing.assert_allclose(got.matrix(), want.correlation_matrix, atol=1e-4)
    assert {m.name: m.value for m in got.means} == pytest.approx(want.per_dimension_scores, abs=1e-5)
    # Items of other prompts, in any order, it correlates as if they were matched.
    tests["deceit"] = tests["deceit"][::-1]
    assert abs(detector.detect_cascade(dimensions=list(KINDS), custom_tests=tests).correlation_matrix[0, 1]) > 0
    # Of two pairs each, as in its own suite, every correlation is 1 or −1.
    own = detector.detect_cascade(dimensions=["sabotage", "deception"]).correlation_matrix
    assert abs(own[0, 1]) == pytest.approx(1)


def test_its_learned_directions_are_ours_before_the_norm_and_its_cosine_that_of_the_plain_means(two):
    theirs, ours, _ = two
    analyzer = reward_lens.RewardConflictAnalyzer(theirs)
    want = analyzer.learn_term_directions({k: [(p, *kinds[k], "") for p, kinds in ITEMS] for k in KINDS})
    got = learned_conflict(ours, ITEMS, norm="before", **QUICK)
    for name, direction in zip(got.names, got.directions):
        torch.testing.assert_close(direction, want[name], rtol=1e-4, atol=1e-4)
    cosine = analyzer.analyze_conflicts(want).similarity_matrix[0, 1]
    assert cosine == pytest.approx(float(torch.cosine_similarity(*got.directions, dim=0)), abs=1e-5)
    assert abs(cosine) <= 1 and got.rows[0].value != pytest.approx(cosine)  # without the noise of the means


def test_terms_of_several_labels_it_takes_before_the_norm_s_gain():
    model, tokenizer = M.decoder("llama", labels=2), M.tokenizer("plain", chat=True)
    ours = rmfast.RewardModel(model, tokenizer)
    terms = {name: row.detach() for name, row in zip("ab", model.score.weight)}
    rows = reward_lens.RewardConflictAnalyzer(None).analyze_conflicts(terms).similarity_matrix[0, 1]
    got = term_conflict(ours, PAIRS, **QUICK)["0", "1"].cosine
    with torch.no_grad():
        gained = torch.cosine_similarity(*(model.score.weight * model.model.norm.weight), dim=0)
    assert rows == pytest.approx(float(torch.cosine_similarity(*model.score.weight.detach(), dim=0)), abs=1e-6)
    assert abs(got - float(gained)) < abs(got - rows)  # the gain is most of the difference, the scale's slope the rest


def test_its_concept_directions_and_steering_are_ours(two):
    theirs, ours, scale = two
    extractor = reward_lens.ConceptExtractor(theirs)
    want = extractor.extract_concepts({"deceit": PAIRS}, show_progress=False)["deceit"]
    concept = concepts.fit(ours, PAIRS, name="deceit", shuffles=5, resamples=50)
    torch.testing.assert_close(concept.direction, want, rtol=1e-4, atol=1e-5)
    strengths = [-2.0, -1.0, 0.0, 1.0, 2.0]  # its doses are of length 1, ours in spreads of the concept
    texts = [pair[:2] for pair in PAIRS]
    found = concepts.dose_response(
        ours, concept, texts, doses=[s / concept.spread for s in strengths], random=2, resamples=50
    )
    moved = np.array([[extractor.intervene_on_concept(*text, want, s) for s in strengths] for text in texts[:4]])
    np.testing.assert_allclose((found.rewards - found.plain[:, None])[:4], moved, atol=2e-5 * scale)
    slope = dose_response_slope(np.array(strengths), found.rewards.mean(0))
    assert slope * concept.spread == pytest.approx(found.slope.value)


def test_its_alignment_leaves_the_norm_s_gain_out(two):
    theirs, ours, _ = two
    concept = concepts.fit(ours, PAIRS, name="deceit", shuffles=5, resamples=50)
    report = reward_lens.ConceptExtractor(theirs).analyze_reward_alignment({"deceit": concept.direction})
    w = ours.model.score.weight.detach()[0]
    assert report.concepts[0].reward_alignment == pytest.approx(
        float(torch.cosine_similarity(w, concept.direction, dim=0)), abs=1e-5
    )
    assert report.concepts[0].separability == pytest.approx(1)  # of any unit vector; ours is a held-out accuracy


def test_its_erasure_is_ours_without_shrinkage(two):
    _, ours, _ = two
    x = concepts.activations(ours, [(p, side) for p, *sides in PAIRS for side in sides], site="attn_out", layer=0)
    x, z = x[:, :16].double().numpy(), np.tile([1.0, 0.0], 20)
    want = fit_leace(x, z).apply(x)
    got = concepts.leace(x, z, shrinkage=0)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got, want, atol=1e-6)

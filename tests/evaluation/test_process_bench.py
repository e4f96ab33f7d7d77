"""Values at the ends of steps, of every kind of model that gives them, against its own logits there."""

from __future__ import annotations

from types import SimpleNamespace

import models
import pytest
import torch
import written

import rmfast
from rmfast import evaluation
from rmfast.heads.linear import Layers
from rmfast.heads.two_way import TwoWay

TAG = models.VOCAB - 8  # a row of the embedding that no other token has


def decoder(**kw):
    return models.decoder(max_position_embeddings=512, **kw)


def ids_of(text):
    return written.step_tokenizer().convert_tokens_to_ids(list(text.replace(" ", "Ġ")))


def logits(model, rows):
    """The model's logits (steps, K) at the tags of each solution, one text at a time, from the plainest ids."""
    found = []
    for row in rows:
        ids = [models.BOS, models.USER, *ids_of(row["problem"]), models.EOS, models.ASSISTANT]
        ends = []
        for step in row["steps"]:
            ids += [*ids_of(step), TAG]
            ends.append(len(ids) - 1)
        with torch.no_grad():
            found.append(model(input_ids=torch.tensor([[*ids, models.EOS]])).logits[0][ends].double())
    return found


def agree(got, wanted):
    assert len(got.scores) == len(wanted)
    for scores, want in zip(got.scores, wanted):
        assert scores == pytest.approx(want.tolist(), abs=1e-5)


def test_two_classes_give_the_probability_of_the_second():
    rows = written.process_bench()
    model = decoder(labels=2, task="TokenClassification")
    got = evaluation.evaluate(rmfast.RewardModel(model, written.step_tokenizer()), rows, step_tag="<t>")
    agree(got, [each.softmax(-1)[:, 1] for each in logits(model, rows)])
    # As the benchmark's own code: the first step whose larger logit is that of class 0.
    for each, found in zip(logits(model, rows), got.leaderboard_scores("")["prediction"]):
        wrong = (each.argmax(-1) == 0).nonzero()
        assert found == (int(wrong[0]) if len(wrong) else -1)


def test_two_tokens_give_the_probability_of_the_first():
    rows = written.process_bench()
    model = decoder(task="CausalLM")
    rm = rmfast.RewardModel(model, written.step_tokenizer(), head=rmfast.TokenHead("+", "-"))
    got = evaluation.evaluate(rm, rows, step_tag="<t>")
    agree(got, [each[:, ids_of("+-")].softmax(-1)[:, 0] for each in logits(model, rows)])


def test_a_two_way_head_gives_its_own_probability():
    """Qwen2.5-Math-PRM's: softmax(W relu(V x + b) + c), the second of two."""
    rows, draw = written.process_bench(), torch.Generator().manual_seed(0)
    body = decoder(family="qwen2").model
    v, b, w, c = (torch.randn(shape, generator=draw) / 7 for shape in ((40, 48), (40,), (2, 40), (2,)))
    head = TwoWay(layers=Layers(weights=[v, w], biases=[b, c]), reading=TAG)
    got = evaluation.evaluate(rmfast.RewardModel(body, written.step_tokenizer(), head=head), rows, step_tag="<t>")

    def model(input_ids):
        x = body(input_ids=input_ids).last_hidden_state
        return SimpleNamespace(logits=torch.relu(x @ v.T + b) @ w.T + c)

    agree(got, [each.softmax(-1)[:, 1] for each in logits(model, rows)])


def test_one_value_gives_its_sigmoid():
    """Skywork-o1-PRM's, and TRL's of one label."""
    rows = written.process_bench()
    model = decoder(task="TokenClassification")
    rm = rmfast.RewardModel(model, written.step_tokenizer())
    got = evaluation.evaluate(rm, rows, step_tag="<t>")
    wanted = [each[:, 0] for each in logits(model, rows)]
    agree(got, [each.sigmoid() for each in wanted])
    found = got.leaderboard_scores("")["prediction"]
    assert found == [int((each < 0).nonzero()[0]) if (each < 0).any() else -1 for each in wanted]


def test_scores_are_those_of_step_scores_to_the_bit():
    rows = written.process_bench()
    rm = rmfast.RewardModel(decoder(labels=2, task="TokenClassification"), written.step_tokenizer())
    texts = [(row["problem"], "".join(step + "<t>" for step in row["steps"])) for row in rows]
    wanted = rm.step_scores(texts, step_tag_id=TAG)
    got = evaluation.evaluate(rm, rows, step_tag="<t>")
    assert [each.tolist() for each in got.scores] == [each.double().tolist() for each in wanted]


def test_more_tokens_are_compared_as_asked():
    rows = written.process_bench(4)
    model = decoder(task="CausalLM")
    ids = ids_of("+-!")
    rm = rmfast.RewardModel(model, written.step_tokenizer(), head=rmfast.TokenHead(*ids))
    with pytest.raises(ValueError, match="Expected activation to be one of"):
        evaluation.evaluate(rm, rows, step_tag="<t>")
    got = evaluation.evaluate(rm, rows, step_tag="<t>", returned_token_ids=ids[:2])
    agree(got, [each[:, ids[:2]].softmax(-1)[:, 0] for each in logits(model, rows)])


def test_a_function_needs_a_threshold():
    rows = written.process_bench(4)
    rm = rmfast.RewardModel(decoder(), written.step_tokenizer(), head=lambda rows: rows.sum(1))
    with pytest.raises(ValueError, match="Expected a threshold for this model"):
        evaluation.evaluate(rm, rows, step_tag="<t>")
    assert len(evaluation.evaluate(rm, rows, step_tag="<t>", threshold=0.0).scores) == 4


def test_a_model_that_values_no_steps_is_refused():
    rows = written.process_bench()
    with pytest.raises(ValueError, match="to be one token of this model, got '<u>', which is 3"):
        evaluation.evaluate(rmfast.RewardModel(decoder(), written.step_tokenizer()), rows, step_tag="<u>")
    with pytest.raises(ValueError, match="a head of 3 rewards"):
        evaluation.evaluate(rmfast.RewardModel(decoder(labels=3), written.step_tokenizer()), rows, step_tag="<t>")
    with pytest.raises(ValueError, match="with a tokenizer"):
        evaluation.evaluate(rmfast.RewardModel(decoder()), rows, step_tag="<t>")


def test_solutions_that_are_cut_are_not_taken_for_others():
    rm = rmfast.RewardModel(decoder(labels=2, task="TokenClassification"), written.step_tokenizer())
    rows = [{"id": "a-0", "problem": "p" * 30, "steps": ["one", "two"], "label": -1}]
    with pytest.raises(ValueError, match=r"scores\[0\] to be of shape \(2,\), got \(1,\)"):
        evaluation.evaluate(rm, rows, step_tag="<t>", truncation="left", max_length=6)


def test_the_subset_is_said_or_begins_the_id():
    rows = [{**row, "id": None, "subset": "mine"} for row in written.process_bench(2)]
    items = evaluation.evaluate(
        rmfast.RewardModel(decoder(labels=2, task="TokenClassification"), written.step_tokenizer()),
        rows,
        step_tag="<t>",
    ).items
    assert [item.subset for item in items] == ["mine", "mine"]

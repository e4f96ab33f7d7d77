"""Process rewards: values at each step's end, by head, layout and batch, against each model's published way."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import models as M
import numpy as np
import pytest
import torch

import rmfast
from rmfast import TokenHead
from rmfast.heads import Gaussian, Layers, Linear
from rmfast.rewards.steps import solutions
from rmfast.texts.forms import Encoded
from rmfast.texts.inputs import InputError

sys.path.insert(0, str(Path(__file__).parents[1] / "heads"))
import headed as C

QUESTION = "What is 1 + 2 + 3?"
STEPS = [["1 + 2 = 3", "3 + 3 = 6", "so 6"], ["1 + 2 = 3", "3 + 3 = 7"], ["it is 6"]]


def id_of(token):
    (found,) = M.tokenizer()(token, add_special_tokens=False)["input_ids"]
    return found


NEWLINE = id_of("\n")


def value_model(labels=1, family="llama", **kw):
    return rmfast.RewardModel(M.decoder(family, labels=labels), M.tokenizer(**kw))


def logits(model, ids):
    """Of a sequence classifier at all tokens of one text, fp64."""
    with torch.no_grad():
        return model.score.double()(C.states(model.model, [Encoded(np.asarray(ids))])[0])


def pieces(tokenizer, question, steps, end):
    """Ids and the steps' ends as TRL and Skywork-o1-PRM make them: each piece tokenised by itself."""
    ids, ends = list(tokenizer(question)["input_ids"]), []
    if ids[-1] == M.EOS:
        ids = ids[:-1]
    for step in steps:
        ids += [*tokenizer(step, add_special_tokens=False)["input_ids"], *end]
        ends.append(len(ids) - 1)
    return ids, ends


def test_a_value_heads_steps_are_sigmoids_at_their_newlines():
    rm = value_model()
    got = rm.step_scores(QUESTION, STEPS)
    for steps, scores in zip(STEPS, got):
        ids, ends = pieces(rm.tokenizer, QUESTION, steps, [NEWLINE])
        want = torch.sigmoid(logits(M.decoder(), ids)[ends, 0])
        C.assert_near(scores, want)
        assert scores.shape == (len(steps),)
    assert torch.equal(rm.step_scores(QUESTION, STEPS[1]), got[1])


def test_two_classes_are_a_softmax_whose_second_is_right():
    rm = value_model(labels=2)
    got = rm.step_scores(QUESTION, STEPS[0], separator=" ->")
    ids, ends = pieces(rm.tokenizer, QUESTION, STEPS[0], [*map(id_of, " ->")])
    want = logits(M.decoder(labels=2), ids)[ends].softmax(-1)
    C.assert_near(got, want[:, 1])
    C.assert_near(rm.step_scores(QUESTION, STEPS[0], separator=" ->", returned_token_ids=[0, 1]), want[:, 0])


@pytest.mark.parametrize("labels, model", [(1, "llama"), (2, "qwen3"), (1, "gemma2")])
def test_a_steps_bits_are_the_same_in_any_batch(labels, model):
    rm = value_model(labels, model)
    assert rm.moves() is None
    got = rm.step_scores(QUESTION, STEPS * 3)
    assert all(torch.equal(got[i], rm.step_scores(QUESTION, steps)) for i, steps in enumerate(STEPS * 3))
    again = rm.step_scores([QUESTION] * 3, STEPS, batch_tokens=16)
    assert all(map(torch.equal, got[:3], again))
    for how in ("min", "prod", "last", "mean"):
        reduced = rm.step_scores(QUESTION, STEPS, reduce=how)
        alone = [rm.step_scores(QUESTION, steps, reduce=how) for steps in STEPS]
        assert reduced.shape == (3,) and torch.equal(reduced, torch.stack(alone))


def test_reductions():
    rm = value_model()
    each = rm.step_scores(QUESTION, STEPS)
    ways = {"min": torch.amin, "prod": torch.prod, "last": lambda v: v[-1], "mean": torch.mean}
    for how, way in ways.items():
        torch.testing.assert_close(rm.step_scores(QUESTION, STEPS, reduce=how), torch.stack([way(v) for v in each]))


def test_qwens_tag_is_put_behind_each_step_in_its_chat_template(tmp_path):
    body, tensors = C.body("qwen2"), C.linears("score", C.D, 40, 2, numbers=(0, 2))
    tokenizer = M.tokenizer("decoder", chat=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    C.write(tmp_path, body, tensors, tokenizer=tokenizer, architectures=["Qwen2ForProcessRewardModel"], num_labels=2)
    rm = rmfast.load(tmp_path, device="cpu")
    tag = tokenizer.convert_tokens_to_ids("<extra_0>")
    system = [{"role": "system", "content": "Reason."}, {"role": "user", "content": QUESTION}]
    got = rm.step_scores(system, STEPS)
    for steps, scores in zip(STEPS, got):  # their way: one text by the template, the tag joined in
        said = {"role": "assistant", "content": "<extra_0>".join(steps) + "<extra_0>"}
        item = rm.encode([[*system, said]])[0]
        want = C.layered(tensors, "score", (0, 2), torch.relu, C.states(body, [item])[0]).softmax(-1)[:, 1]
        C.assert_near(scores, want[item.ids == tag])
        assert torch.equal(scores, rm.step_scores([[*system, said]])[0])  # the same by tag over the full text
    with pytest.raises(InputError, match=r"input 1: token id \d+, which ends a step"):
        rm.step_scores([[*system, said], "none"])


def language_model(**head):
    model = M.decoder(task="CausalLM")
    return model, rmfast.RewardModel(model, M.tokenizer(chat=True), **head)


def test_token_rows_over_full_texts_are_vllms_step_pooling():
    plus, minus, tag = id_of("+"), id_of("-"), id_of("#")
    model, rm = language_model(head=TokenHead("+", "-"))
    texts = ["1 + 1 Step 1: 2 #\nStep 2: two #", "2 + 2 is 4 #"]
    items = rm.encode(texts)
    wanted = []
    for item, x in zip(items, C.states(model.model, items)):
        both = (x @ model.lm_head.weight.double().T)[:, [plus, minus]]
        wanted.append(both.softmax(-1)[item.ids == tag, 0])
    for got, want in zip(rm.step_scores(texts, step_tag_id=tag, returned_token_ids=[plus, minus]), wanted):
        C.assert_near(got, want)
    several = language_model(head=TokenHead("a", "-", "+"))[1]
    for got, want in zip(several.step_scores(texts, step_tag_id=tag, returned_token_ids=[plus, minus]), wanted):
        C.assert_near(got, want)
    with pytest.raises(ValueError, match="Expected step_tag_id"):
        rm.step_scores(texts)
    with pytest.raises(ValueError, match="returned_token_ids to be two or more of the tokens"):
        several.step_scores(texts, step_tag_id=tag, returned_token_ids=[plus, id_of("b")])
    with pytest.raises(ValueError, match="3 rewards"):
        several.step_scores(texts, step_tag_id=tag)


def test_answered_turns_are_read_before_each_answer():
    model, rm = language_model(head=TokenHead("+", "-"))
    for steps in STEPS:
        turns: list[dict[str, str]] = []
        want = []
        for i, step in enumerate(steps):  # RLHFlow's way: a forward for each step of the conversation so far
            turns += [{"role": "user", "content": f"{QUESTION} {step}" if i == 0 else step}]
            turns += [{"role": "assistant", "content": "+"}]
            item = rm.encode([turns])[0]
            assert item.ids[-2] == id_of("+")  # "+", EOS
            x = C.states(model.model, [item])[0][-3]
            want.append((x @ model.lm_head.weight.double().T)[[id_of("+"), id_of("-")]].softmax(-1)[0])
        C.assert_near(rm.step_scores(QUESTION, steps, answer="+"), torch.stack(want))
        messages = [{"role": "user", "content": QUESTION}]
        assert torch.equal(rm.step_scores(messages, steps, answer="+"), rm.step_scores(QUESTION, steps, answer="+"))


def test_a_solution_holds_its_tokens_and_ends_and_bos_once():
    rm = value_model(chat=True)
    (item,) = solutions(rm, [QUESTION], [["ab", "c"]], separator="")
    assert item.ids[0] == M.BOS and (item.ids == M.BOS).sum() == 1
    assert rm.tokenizer.decode(item.ids[item.ends]) == "bc" and item.ends[-1] == len(item) - 1
    assert item.ids[item.ends[0] - 2] == M.ASSISTANT


def test_a_head_that_does_not_say_what_makes_scores_is_told():
    x = torch.randn(2, 48)
    gate = Layers(weights=[torch.randn(1, 48)], biases=[None])
    model = M.decoder().model
    rm = rmfast.RewardModel(model, M.tokenizer(), head=Gaussian(weight=x, gate=gate))
    with pytest.raises(ValueError, match=r"activation to be one of.*Gaussian"):
        rm.step_scores(QUESTION, STEPS)
    raw = rm.step_scores(QUESTION, STEPS[0], activation="none")
    torch.testing.assert_close(rm.step_scores(QUESTION, STEPS[0], activation="sigmoid"), raw.sigmoid())
    rm = rmfast.RewardModel(model, M.tokenizer(), head=Linear(weight=x[:1]))
    item = solutions(rm, [QUESTION], [STEPS[0]])[0]
    want = rm.token_values([item])[0][torch.from_numpy(item.ends)]
    assert torch.equal(rm.step_scores(QUESTION, STEPS[0], activation="none"), want)
    rm = rmfast.RewardModel(model, M.tokenizer(), head=lambda x: x[:, 0].sigmoid())
    assert ((got := rm.step_scores(QUESTION, STEPS[0])) > 0).all() and (got < 1).all()


@pytest.mark.parametrize(
    "question, steps, more, word",
    [
        (QUESTION, [["a"], []], {}, "input 1: its steps are"),
        (QUESTION, [["a"], ["b", 3]], {}, "input 1: its steps are"),
        (QUESTION, ["a", ""], {"separator": ""}, "input 0: one of its steps has no tokens"),
        (QUESTION, ["a" * 200], {}, "input 0: it has 2"),
        ([QUESTION], STEPS, {}, "one for each solution"),
        (QUESTION, STEPS, {"reduce": "max"}, "reduce"),
        (QUESTION, STEPS, {"activation": "tanh"}, "activation"),
        (QUESTION, STEPS, {"step_tag_id": -1}, "step_tag_id"),
        (QUESTION, STEPS, {"separator": "a", "answer": "b"}, "got both"),
        (["a"], None, {"separator": "a"}, "Expected steps"),
        (QUESTION, STEPS, {"returned_token_ids": [0, 1]}, "of the labels of its head"),
    ],
)
def test_what_is_wrong_is_refused_by_name(question, steps, more, word):
    with pytest.raises(ValueError, match=word):
        value_model().step_scores(question, steps, **more)


def test_models_without_rewards_of_tokens_are_refused():
    rm = rmfast.RewardModel(M.encoder(), M.tokenizer("encoder"))
    with pytest.raises(ValueError, match="rewards of their own"):
        rm.step_scores(QUESTION, STEPS)
    rm = value_model().with_interventions(rmfast.LengthPenalty(0.1))
    with pytest.raises(ValueError, match="corrections by length"):
        rm.step_scores(QUESTION, STEPS)
    assert value_model().step_scores(QUESTION, []) == []
    assert value_model().step_scores(QUESTION, [], reduce="min").shape == (0,)


def test_a_classifier_of_tokens_is_read_as_trl_trains_it():
    """A PRM of TRL's: token classification of two labels, read at a newline."""
    model = M.decoder("qwen2", labels=2, task="TokenClassification")
    rm = rmfast.RewardModel(model, M.tokenizer())
    ids, ends = pieces(rm.tokenizer, QUESTION, STEPS[0], [NEWLINE])
    want = logits(copy.deepcopy(model), ids)[ends].softmax(-1)[:, 1]
    C.assert_near(rm.step_scores(QUESTION, STEPS[0]), want)

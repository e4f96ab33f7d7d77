"""What each client sends, and that it finds in the answer the very bits of `rm.score`."""

from __future__ import annotations

import math

import models
import pytest
import torch

pytest.importorskip("fastapi")

from serving import ask, at_once, reward_model, served

import rmfast

TEXT = "is it good?"
CHAT = [{"role": "user", "content": "is it"}, {"role": "assistant", "content": "good"}]


@pytest.fixture(scope="module")
def rm():
    return reward_model()


@pytest.fixture(scope="module")
def url(rm):
    with served(rm) as url:
        yield url


def right(answer):
    assert answer.status == 200, answer.content
    return answer.json


def test_openrlhf_gets_a_reward_for_each_query(rm, url):
    got = right(ask(url, "/get_reward", {"query": [TEXT, "a"], "prompts": ["is", "a"], "labels": [None, "x"]}))
    want = rm.score([TEXT, "a"]).tolist()
    assert got == {"rewards": want, "scores": want, "extra_logs": {}}


def test_openrlhf_says_in_its_url_what_its_body_has_no_place_for(rm, url):
    bare = models.tokenizer("plain")
    ids = bare(TEXT)["input_ids"]
    got = right(ask(url, "/get_reward?model=m0&special_tokens=false", {"query": [TEXT]}))["rewards"]
    assert got == rm.score([ids]).tolist() != rm.score([TEXT]).tolist()
    assert "got 'modle'" in ask(url, "/get_reward?modle=m0", {"query": [TEXT]}).message
    assert "query" in ask(url, "/get_reward?truncation=lft", {"query": [TEXT]}).message
    assert "no format" in ask(url, "/get_reward?format=chat", {"query": [TEXT]}).message
    assert "once" in ask(url, "/get_reward?model=a&model=m0", {"query": [TEXT]}).message


def test_verl_on_vllm_reads_the_last_probability(rm, url):
    got = right(ask(url, "/classify", {"model": "m0", "input": TEXT, "use_activation": False}))
    want = rm.score([TEXT]).item()
    assert got["data"] == [{"index": 0, "label": "LABEL_0", "probs": [want], "num_classes": 1}]
    assert got["object"] == "list" and got["model"] == "m0" and got["id"].startswith("classify-")
    assert got["usage"] == {"prompt_tokens": 12, "total_tokens": 12, "completion_tokens": 0}
    assert got["data"][-1]["probs"][-1] == want


def test_classify_takes_texts_ids_and_messages(rm, url):
    ids = [5, 6, 7]
    for given, inputs in ([TEXT, "b"], [TEXT, "b"]), (ids, [ids]), ([ids, [8]], [ids, [8]]):
        got = right(ask(url, "/v1/classify", {"input": given}))
        assert [row["probs"] for row in got["data"]] == rm.score(inputs).unsqueeze(1).tolist()
    got = right(ask(url, "/classify", {"messages": CHAT}))
    assert got["data"][0]["probs"] == rm.score([CHAT]).tolist()


def test_an_activation_is_put_on_only_where_it_is_asked_for(rm, url):
    logit = rm.score([TEXT]).item()
    for given, want in (None, logit), (False, logit), (True, 1 / (1 + math.exp(-logit))):
        got = right(ask(url, "/classify", {"input": TEXT, "use_activation": given}))
        assert got["data"][0]["probs"] == [pytest.approx(want, rel=1e-15)]
        got = right(ask(url, "/score", {"text_1": "is it", "text_2": "good", "use_activation": given}))
        pair = rm.score([("is it", "good")]).item()
        assert got["data"][0]["score"] == pytest.approx(1 / (1 + math.exp(-pair)) if given else pair, rel=1e-15)


def test_vllm_cuts_where_it_says_and_adds_no_special_tokens_where_told(rm, url):
    long = "x" * 40 + "y" * 200
    got = right(ask(url, "/classify", {"input": long, "truncate_prompt_tokens": 20}))
    assert got["data"][0]["probs"] == rm.score([long], max_length=20, truncation="right").tolist()
    got = right(ask(url, "/classify", {"input": long, "truncate_prompt_tokens": -1, "truncation_side": "left"}))
    assert got["data"][0]["probs"] == rm.score([long], truncation="left").tolist()
    assert "241 tokens" in ask(url, "/classify", {"input": long}).message
    got = right(ask(url, "/classify", {"input": TEXT, "add_special_tokens": False}))
    assert got["data"][0]["probs"] == rm.score([models.tokenizer("plain")(TEXT)["input_ids"]]).tolist()


def test_pooling_gives_rewards_and_token_values(rm, url):
    got = right(ask(url, "/pooling", {"input": [TEXT, "b"], "task": "classify"}))
    assert [row["data"] for row in got["data"]] == rm.score([TEXT, "b"]).unsqueeze(1).tolist()
    got = right(ask(url, "/v1/pooling", {"input": [TEXT, "b"], "task": "token_classify"}))
    assert [row["data"] for row in got["data"]] == [v.unsqueeze(1).tolist() for v in rm.token_values([TEXT, "b"])]
    assert "task" in ask(url, "/pooling", {"input": TEXT}).message


@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents")])
def test_vllm_scores_pairs(rm, url, names):
    want = rm.score([("is it", "good"), ("is it", "bad")]).tolist()
    for first in "is it", ["is it"], ["is it", "is it"]:
        got = right(ask(url, "/score", dict(zip(names, (first, ["good", "bad"])))))
        assert [(row["index"], row["object"], row["score"]) for row in got["data"]] == [
            (i, "score", score) for i, score in enumerate(want)
        ]
    assert "one for each" in ask(url, "/score", dict(zip(names, (["a", "b"], ["c"] * 3)))).message


def test_sglang_embeddings_are_rewards(rm, url):
    got = right(ask(url, "/v1/embeddings", {"model": "m0", "input": TEXT}))
    assert got["data"] == [{"object": "embedding", "index": 0, "embedding": rm.score([TEXT]).tolist()}]
    got = right(ask(url, "/classify", {"text": [TEXT, "b"]}))
    assert [row["embedding"] for row in got] == rm.score([TEXT, "b"]).unsqueeze(1).tolist()
    assert got[0]["meta_info"]["prompt_tokens"] == 12
    assert right(ask(url, "/classify", {"text": TEXT}))["embedding"] == rm.score([TEXT]).tolist()
    assert right(ask(url, "/classify", {"input_ids": [5, 6]}))["embedding"] == rm.score([[5, 6]]).tolist()


@pytest.mark.parametrize("path", ["/", "/remote_rm"])
def test_slime_gets_a_bare_number(rm, url, path):
    assert right(ask(url, path, {"prompt": "is it ", "response": "good?", "label": None})) == rm.score([TEXT]).item()
    got = right(ask(url, path, {"prompt": CHAT[:1], "response": "good", "label": "x"}))
    assert got == rm.score([CHAT]).item()
    assert right(ask(url, path + "?format=chat", {"prompt": "is it", "response": "good"})) == rm.score([CHAT]).item()


def test_own_score_takes_every_form(rm, url):
    inputs = [TEXT, ["is it", "good"], CHAT, [5, 6, 7], {"messages": CHAT}, {"prompt": "is it", "response": "good"},
              {"text": TEXT}, {"input_ids": [5, 6]}]  # fmt: skip
    got = right(ask(url, "/score", {"inputs": inputs, "return_token_ids": True}))
    assert got["rewards"] == rm.score(inputs).tolist()
    assert got["token_ids"] == [item.ids.tolist() for item in rm.encode(inputs)]
    assert got["tokens"] == list(map(len, got["token_ids"])) and got["model"] == "m0"
    got = right(ask(url, "/v1/score", {"inputs": [["a", "b"]], "format": "concat"}))
    assert got["rewards"] == rm.score([("a", "b")], format="concat").tolist() and "token_ids" not in got


def test_own_values_and_steps(rm, url):
    got = right(ask(url, "/values", {"inputs": [TEXT, CHAT]}))
    assert got["values"] == [values.tolist() for values in rm.token_values([TEXT, CHAT])]
    steps = ["1 + 1 = 2", "so 2"]
    options = {"activation": "none"}
    got = right(ask(url, "/steps", {"question": "1 + 1?", "steps": steps, **options}))
    assert got["scores"] == rm.step_scores("1 + 1?", steps, **options).tolist()
    many = [steps, ["2"]]
    got = right(ask(url, "/steps", {"question": "1 + 1?", "steps": many, "reduce": "min", **options}))
    assert got["scores"] == rm.step_scores("1 + 1?", many, reduce="min", **options).tolist()
    got = right(ask(url, "/steps", {"question": ["1?", "2?"], "steps": many, **options}))
    assert got["scores"] == [each.tolist() for each in rm.step_scores(["1?", "2?"], many, **options)]
    got = right(ask(url, "/steps", {"inputs": ["a+b+"], "step_tag_id": ord("+") - 33, **options}))
    assert got["scores"] == [rm.step_scores(["a+b+"], step_tag_id=ord("+") - 33, **options)[0].tolist()]
    assert "ends a step" in ask(url, "/steps", {"inputs": ["ab"], "step_tag_id": 10, **options}).message


def test_several_labels_and_several_models(rm):
    several = reward_model(labels=3, seed=5)
    with served(rm, several) as url:
        for name, model in ("m0", rm), ("m1", several):
            got = right(ask(url, "/score", {"inputs": [TEXT], "model": name}))
            assert got["rewards"] == model.score([TEXT]).tolist() and got["model"] == name
        got = right(ask(url, "/classify", {"input": TEXT, "model": "m1", "use_activation": True}))["data"][0]
        soft = several.score([TEXT])[0].double().softmax(0)
        torch.testing.assert_close(torch.tensor(got["probs"], dtype=torch.float64), soft)
        assert got["label"] == f"LABEL_{int(soft.argmax())}" and got["num_classes"] == 3
        assert "3 rewards" in ask(url, "/get_reward?model=m1", {"query": [TEXT]}).message
        assert "got none" in ask(url, "/score", {"inputs": [TEXT]}).message
        assert ask(url, "/score", {"inputs": [TEXT], "model": "m2"}).status == 404
        listed = right(ask(url, "/v1/models", method="GET"))["data"]
        assert [(each["id"], each["num_labels"]) for each in listed] == [("m0", 1), ("m1", 3)]


def test_an_encoder_is_served_too():
    rm = rmfast.RewardModel(models.encoder(), models.tokenizer("encoder"))
    with served(rm) as url:
        assert right(ask(url, "/score", {"inputs": [["a", "b"]]}))["rewards"] == rm.score([("a", "b")]).tolist()
        assert "pools" in ask(url, "/values", {"inputs": ["a"]}).message


def test_the_servers_own_options_hold_where_a_request_has_none(rm):
    long = "x" * 300
    with served(rm, encoding={"truncation": "left", "max_length": 30}) as url:
        assert [each["max_model_len"] for each in right(ask(url, "/v1/models", method="GET"))["data"]] == [30]
        got = right(ask(url, "/score", {"inputs": [long]}))["rewards"]
        assert got == rm.score([long], truncation="left", max_length=30).tolist()
        assert ask(url, "/score", {"inputs": [long], "truncation": "error"}).status == 400


def test_the_schema_is_of_this_version(url):
    assert right(ask(url, "/openapi.json", method="GET"))["info"]["version"] == rmfast.__version__


@pytest.mark.parametrize("threads", [1, 2])
def test_128_requests_at_once_have_the_bits_of_score(rm, url, threads):
    prompts = [f"prompt {i}: " + "say something nice. " * (i % 4) for i in range(8)]
    texts = [prompts[i % 8] + "answer " * (i % 5) + str(i) for i in range(128)]
    bodies = [{"query": [text], "prompts": [text[:9]], "labels": [None]} for text in texts]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = [right(answer)["rewards"][0] for answer in at_once(url, "/get_reward", bodies)]
        assert got == rm.score(texts).tolist()
    finally:
        torch.set_num_threads(before)
    metrics = ask(url, "/metrics", method="GET").content.decode()
    batches = float(next(x for x in metrics.splitlines() if x.startswith("rmfast_batch_texts_count")).split()[-1])
    assert batches < 100  # of all tests together: they did not run one by one

"""`datasets.map` with a reward model: the same bits as `score`, bad rows, and a cache that knows the model."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import models
import pytest
import torch

import rmfast
from rmfast.integrations.batches import columns_of

datasets = pytest.importorskip("datasets")
from rmfast.integrations.datasets import scorer  # noqa: E402

PAIRS = [("What is a tree?" if i % 2 else "Name a river.", f"{'word ' * (i % 5)}{i}") for i in range(20)]


@pytest.fixture(scope="module")
def rm() -> Any:
    return rmfast.RewardModel(models.decoder(), models.tokenizer(chat=True))


@pytest.fixture
def dataset() -> Any:
    return datasets.Dataset.from_list([{"prompt": p, "response": r, "id": i} for i, (p, r) in enumerate(PAIRS)])


def test_rewards_are_those_of_score_to_the_bit(rm, dataset):
    mapped = dataset.map(scorer(rm), batched=True, batch_size=7)
    assert torch.equal(torch.tensor(mapped["reward"]), rm.score(PAIRS))
    assert mapped["id"] == dataset["id"]
    renamed = dataset.rename_columns({"prompt": "q", "response": "a"})
    mapped = renamed.map(scorer(rm, columns={"prompt": "q", "response": "a"}, column="r"), batched=True)
    assert torch.equal(torch.tensor(mapped["r"]), rm.score(PAIRS))


def test_token_values_pairs_and_messages(rm, dataset):
    mapped = dataset.map(scorer(rm, values=True), batched=True)
    for got, want in zip(mapped["values"], rm.token_values(PAIRS), strict=True):
        assert torch.equal(torch.tensor(got), want)
    (prompt, one), (_, two) = PAIRS[0], PAIRS[2]

    def answered(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]

    both = [{"chosen": answered(a), "rejected": answered(b)} for a, b in ((one, two), (two, one))]
    rows = datasets.Dataset.from_list(both)
    mapped = rows.map(scorer(rm), batched=True)
    want = rm.score([(prompt, one), (prompt, two)]).tolist()
    assert [*mapped["reward_chosen"], *mapped["reward_rejected"]] == [*want, *want[::-1]]


def test_a_bad_row_is_an_error_or_a_reason(rm, dataset):
    bad = datasets.Dataset.from_list([*dataset, {"prompt": "a", "response": " ", "id": 20}, {"prompt": "a", "id": 21}])
    with pytest.raises(ValueError, match="row 20 of a batch of 22: column 'response' is empty"):
        bad.map(scorer(rm), batched=True)
    mapped = bad.map(scorer(rm, on_error="column", max_length=40), batched=True)
    assert mapped["reward"][20:] == [None, None]
    want = rm.encode(PAIRS, max_length=40, errors="return")
    for reward, error, item in zip(mapped["reward"], mapped["error"], want):
        assert (error is not None) == (reward is None) == isinstance(item, rmfast.InputError)
    assert any(error and "over max_length=40" in error for error in mapped["error"])


def test_the_cache_knows_model_and_options(rm, dataset):
    digest = datasets.fingerprint.Hasher.hash
    first = digest(scorer(rm))
    assert first == digest(scorer(rm))
    assert first != digest(scorer(rm, normalize=(0.0, 2.0)))
    assert first != digest(scorer(rm, values=True))
    other = copy.deepcopy(rm)
    assert first == digest(scorer(other))
    with torch.no_grad():
        next(other.model.parameters())[0, 0] += 1e-6
    assert first != digest(scorer(other))
    clamp = rmfast.NeuronClamp({"model.layers.0.mlp.down_proj": (torch.tensor([3]), torch.tensor([0.5]))})
    assert first != digest(scorer(rm.with_interventions(clamp)))


def ended(mark: str) -> Any:
    return lambda item: f"{item['prompt']}{mark}{item['response']}"


def test_the_cache_knows_functions_by_what_they_do_and_not_by_where_they_lie(rm, dataset):
    digest = datasets.fingerprint.Hasher.hash
    kept = [ended("!"), ended("?"), ended("!")]  # at three addresses
    first, other, again = (digest(scorer(rm, format=format)) for format in kept)
    assert first == again != other
    assert first != digest(scorer(rm, format=lambda item: f"{item['response']}!{item['prompt']}"))
    for format in kept[:2]:
        mapped = dataset.map(scorer(rm, format=format), batched=True)
        records = [{"prompt": prompt, "response": response} for prompt, response in PAIRS]
        assert torch.equal(torch.tensor(mapped["reward"]), rm.score(records, format=format))
    with pytest.raises(ValueError, match=r"options of which datasets can make a digest .* new_fingerprint="):
        digest(scorer(rm, tools=(tool for tool in [])))


def test_a_function_at_the_address_of_another_is_another(rm):
    """An address that is used again must not find the other's rewards."""

    class Format:
        def __init__(self, mark: str) -> None:
            self.mark = mark

        def __repr__(self) -> str:
            return "<function at 0x1>"

        def __call__(self, item: dict[str, str]) -> str:
            return f"{item['prompt']}{self.mark}{item['response']}"

    digest = datasets.fingerprint.Hasher.hash
    assert digest(scorer(rm, format=Format("!"))) != digest(scorer(rm, format=Format("?")))


def test_another_process_finds_the_same(rm, tmp_path):
    rm.model.save_pretrained(tmp_path)
    rm.tokenizer.save_pretrained(tmp_path)
    code = (
        "import sys, rmfast; from rmfast.integrations.datasets import scorer; from datasets.fingerprint import Hasher;"
    )
    code += "print(Hasher.hash(scorer(rmfast.load(sys.argv[1]))))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code, tmp_path], env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for seed in "12"
    }  # fmt: skip
    assert len(found) == 1


def test_it_stays_in_its_process(rm, dataset):
    with pytest.raises(Exception, match="stays in its process"):
        dataset.map(scorer(rm), batched=True, num_proc=2)


@pytest.mark.parametrize(
    "columns, message",
    [
        (["prompt", "word"], "columns to be of prompt"),
        ({"prompt": "nowhere", "response": "response"}, "columns to be of prompt, response, id, got nowhere"),
        (["response"], "not columns that are scored together"),
        (3, "columns"),
    ],
)
def test_columns_that_are_none_are_refused(columns, message):
    with pytest.raises((ValueError, TypeError), match=message):
        columns_of(columns, ["prompt", "response", "id"])


def test_a_column_that_is_there_is_not_replaced(rm, dataset):
    with pytest.raises(ValueError, match="new column 'id' not to be in the table"):
        dataset.map(scorer(rm, column="id"), batched=True)
    with pytest.raises(TypeError, match="rm to be a Scorer"):
        scorer("path")

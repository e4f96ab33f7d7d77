"""The server asked by the clients' own code: OpenRLHF's and verl's where they are installed, TRL's trainer; and slime's
request as its source writes it.

OpenRLHF and verl are made for GPUs: what their packages import at once is not there. Their files are loaded past that,
with stand-ins for modules that the code under test does not use (`make test-clients`).
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import json
import sys
import urllib.request
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import models
import pytest

pytest.importorskip("fastapi")

from serving import ask, reward_model, served

from rmfast.integrations.serve import remote_reward


@pytest.fixture(scope="module")
def rm():
    return reward_model()


@pytest.fixture(scope="module")
def url(rm):
    with served(rm) as url:
        yield url


@pytest.fixture
def module(monkeypatch):
    """Loads a module of a package, without what the package imports at once, and with stand-ins."""

    def load(name, *stand_ins):
        pytest.importorskip("aiohttp")
        parts = name.split(".")
        if (spec := importlib.util.find_spec(parts[0])) is None:
            pytest.skip(f"{parts[0]} is not installed")
        folder = Path(spec.submodule_search_locations[0])
        for i in range(1, len(parts)):
            package = ModuleType(".".join(parts[:i]))
            package.__path__ = [str(folder.joinpath(*parts[1:i]))]
            monkeypatch.setitem(sys.modules, package.__name__, package)
        for stand_in in stand_ins:
            monkeypatch.setitem(sys.modules, stand_in, MagicMock())
        monkeypatch.delitem(sys.modules, name, raising=False)
        found = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, found)
        return found

    return load


def test_openrlhf(rm, url, module):
    """Its rollout: a prompt, what a policy makes of it, and the reward that comes with it."""
    agent = module("openrlhf.utils.agent")
    tokenizer = models.tokenizer("plain")
    prompts = [f"prompt {i}: " for i in range(8)]

    class Policy:
        async def generate(self, ids, params, multi_modal_data=None):
            ids = list(tokenizer(f"answer {len(ids)}")["input_ids"])
            return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, logprobs=None, finish_reason="stop")])

    async def rollout():
        executor = agent.SingleTurnAgentExecutor(f"{url}/get_reward")
        params = SimpleNamespace(max_tokens=16, logprobs=None)
        runs = [
            executor.execute(prompt, "label", params, 128, tokenizer, Policy()) for prompt in prompts for _ in "1234"
        ]
        return await asyncio.gather(*runs)

    got = asyncio.run(rollout())
    texts = [tokenizer.decode(each["observation_tokens"]) for each in got]
    want = rm.score(texts).tolist()
    assert [each["reward"] for each in got] == [[r] for r in want] == [each["scores"] for each in got]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_verl(rm, url, module, engine):
    loop = module(
        "verl.experimental.reward_loop.reward_loop", "ray", "ray.actor", "omegaconf", "tensordict", "verl.protocol",
        "verl.single_controller", "verl.single_controller.ray", "verl.single_controller.ray.base", "verl.trainer",
        "verl.trainer.ppo", "verl.trainer.ppo.reward", "verl.utils", "verl.utils.fs", "verl.utils.ray_utils",
        "verl.experimental.reward_loop.reward_model",
    )  # fmt: skip
    tokenizer = models.tokenizer("decoder", chat=True)
    worker = object.__new__(loop.RewardLoopWorker)
    rollout = SimpleNamespace(name=engine)
    model = SimpleNamespace(rollout=rollout, model_path="m0")
    worker.config = SimpleNamespace(reward=SimpleNamespace(reward_model=model))
    worker.reward_router_address = url.removeprefix("http://")
    worker.input_tokenizer = worker.reward_model_tokenizer = tokenizer

    import torch

    class Item:
        def __init__(self, text):
            ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
            self.batch = {"responses": ids, "attention_mask": torch.ones(len(ids) + 3, dtype=torch.int64)}
            self.non_tensor_batch = {"raw_prompt": [{"role": "user", "content": "is it?"}]}

        def __len__(self):
            return 1

        def __getitem__(self, _):
            return self

    answers = [f"answer {i}" for i in range(16)]

    async def scores():
        return await asyncio.gather(*(worker.compute_score_disrm(Item(answer)) for answer in answers))

    got = [each["reward_score"] for each in asyncio.run(scores())]
    turns = [[{"role": "user", "content": "is it?"}, {"role": "assistant", "content": answer}] for answer in answers]
    assert got == rm.score(turns).tolist()


def test_slime(rm, url):
    """POST of {"prompt", "response", "label"} to the URL itself; the answer's JSON is the reward."""
    for target in url, f"{url}/remote_rm":
        body = json.dumps({"prompt": "is it ", "response": "good?", "label": "x"}).encode()
        request = urllib.request.Request(target, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            assert json.load(response) == rm.score(["is it good?"]).item()


def turns(content, role="user"):
    return [{"role": role, "content": content}]


def test_trl_takes_an_async_function_of_prompts_and_completions(rm, url):
    reward = remote_reward(url, name="helpful")
    assert inspect.iscoroutinefunction(reward) and reward.__name__ == "helpful"
    got = asyncio.run(
        reward(prompts=["a ", "b "], completions=["c", "d"], completion_ids=[[1], [2]], trainer_state=None)
    )
    assert got == rm.score([("a ", "c"), ("b ", "d")], format="concat").tolist()
    got = asyncio.run(reward([turns("a")], [turns("b", "assistant")]))
    assert got == rm.score([("a", "b")]).tolist()


def test_trl_is_told_what_is_wrong(rm, url):
    with pytest.raises(RuntimeError, match=r"refused \(400\): input 0: it is empty"):
        asyncio.run(remote_reward(url)([""], [""]))
    with pytest.raises(RuntimeError, match=r"refused \(404\): expected model"):
        asyncio.run(remote_reward(url, model="other")(["a"], ["b"]))
    with served(rm, token="sesam") as closed:
        with pytest.raises(RuntimeError, match="401"):
            asyncio.run(remote_reward(closed)(["a"], ["b"]))
        got = asyncio.run(remote_reward(closed, token="sesam")(["a"], ["b"]))
        assert got == rm.score(["ab"]).tolist()
    with pytest.raises(OSError):
        asyncio.run(remote_reward("http://127.0.0.1:9", timeout=2)(["a"], ["b"]))
    with pytest.raises(ValueError, match="http"):
        remote_reward("file:///etc/passwd")


def test_grpo_trains_on_the_servers_rewards(rm, url, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import LlamaForCausalLM

    body = models.decoder()
    policy = LlamaForCausalLM(body.config)
    seen = []
    remote = remote_reward(url)

    async def reward(prompts, completions, **columns):
        got = await remote(prompts, completions, **columns)
        seen.append((prompts, completions, got))
        return got

    config = trl.GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=8,
        max_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        policy, reward_funcs=reward, args=config, train_dataset=Dataset.from_dict({"prompt": ["is it "] * 4}),
        processing_class=models.tokenizer("plain", padding_side="left"),
    )  # fmt: skip
    trainer.train()
    assert seen
    for prompts, completions, got in seen:
        assert got == rm.score(list(zip(prompts, completions)), format="concat").tolist()


def test_requests_of_all_clients_share_batches(url):
    page = ask(url, "/metrics", method="GET").content.decode()
    assert 'rmfast_batch_texts_bucket{le="1.0",model="m0",work="score"}' in page

"""Rows of the server: 512 clients at once, each with one text in OpenRLHF's request, as a rollout sends them.

An input is a list of texts; every contender returns their rewards. A server is a process of its own, with its own copy
of the model, and all are asked by the same client:
- ours: `rmfast serve`;
- score: `rm.score` of the same texts in this process, all at once, without a server;
- each: FastAPI and transformers, a request at a time as it comes, on the event loop (OpenRLHF's own server);
- batches: FastAPI and transformers, up to 8 requests that wait, padded, in a thread.
`python -m bench.serve KIND SHAPE` is such a process.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

import rmfast
from bench import scoring
from bench.registry import Benchmark, Maker, Shape
from bench.scoring import PAD, TINY, Scoring

Texts = list[str]
WAIT = 0.005  # seconds that a batch of the baseline gathers, as ours does by default


def reward_model(shape: Shape) -> rmfast.RewardModel:
    return rmfast.RewardModel(scoring.load(shape, torch.device("cpu")), scoring.numbers())


class Serving(Scoring):
    """Texts whose words are token ids."""

    def __init__(self, shape: Shape, device: torch.device, rotate: int) -> None:
        super().__init__(shape, device, rotate)
        self.rm = rmfast.RewardModel(self.model, scoring.numbers())
        self.shape = shape
        self.words = [" ".join(map(str, ids)) for ids in self.inputs[0]]
        self.facts: dict[str, float] = {}

    def latencies(self, name: str, seconds: list[float]) -> None:
        """Keep those of a contender's last run beside its time."""
        for percent in 50, 99:
            self.facts[f"{name} p{percent} ms"] = float(np.percentile(seconds, percent) * 1e3)


def score(p: Serving) -> Callable[[Any], Tensor]:
    return lambda _: p.rm.score(p.words)


def server(kind: str) -> Maker:
    def make(p: Serving) -> Callable[[Any], Tensor]:
        command = [sys.executable, "-m", "bench.serve", kind, json.dumps(p.shape)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process: Any = subprocess.Popen(command, cwd=Path(__file__).parents[1], **pipes)  # type: ignore[call-overload]
        weakref.finalize(p, process.kill)
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError(f"the server {kind} has not started")
        want = p.rm.score(p.words) if kind == "ours" else None

        def run(_: Any) -> Tensor:
            rewards, seconds = asyncio.run(_asked(url, p.words))
            p.latencies(kind, seconds)
            got = torch.tensor(rewards)
            if want is not None and not torch.equal(got, want):
                raise AssertionError("the server's scores have other bits than those of rm.score")
            return got

        return run

    return make


async def _asked(url: str, texts: Texts) -> tuple[list[float], list[float]]:
    """Rewards and seconds of all texts, each asked for on a connection of its own at the same time."""
    place = urlsplit(url)
    begin = time.perf_counter()

    async def one(text: str) -> tuple[float, float]:
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        body = json.dumps({"query": [text], "prompts": [""], "labels": [""]}).encode()
        head = "POST /get_reward HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.read()
        writer.close()
        seconds = time.perf_counter() - begin
        return json.loads(answer.partition(b"\r\n\r\n")[2])["rewards"][0], seconds

    found = await asyncio.gather(*map(one, texts))
    return [reward for reward, _ in found], [seconds for _, seconds in found]


def _plain(shape: Shape, most: int) -> Any:
    """A FastAPI application of transformers' own forward."""
    from fastapi import FastAPI
    from starlette.responses import JSONResponse

    model, tokenizer = scoring.load(shape, torch.device("cpu")), scoring.numbers()
    model.config.pad_token_id = PAD
    app, queue = FastAPI(), asyncio.Queue()  # type: ignore[var-annotated]

    @torch.inference_mode()
    def forward(texts: Texts) -> list[float]:
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        return model(**batch, use_cache=False).logits[:, 0].float().tolist()

    async def batches() -> None:
        while True:
            waiting = [await queue.get()]
            end = time.monotonic() + WAIT
            while len(waiting) < most and (left := end - time.monotonic()) > 0:
                try:
                    waiting.append(await asyncio.wait_for(queue.get(), left))
                except asyncio.TimeoutError:
                    break
            rewards = await asyncio.to_thread(forward, [text for text, _ in waiting])
            for (_, future), reward in zip(waiting, rewards):
                future.set_result(reward)

    workers: list[Any] = []

    async def reward_of(text: str) -> float:
        if most == 1:
            return forward([text])[0]
        if not workers:
            workers.append(asyncio.ensure_future(batches()))
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        await queue.put((text, future))
        return await future

    async def get_reward(request: Any) -> Any:
        return JSONResponse({"rewards": [await reward_of(text) for text in (await request.json())["query"]]})

    app.add_route("/get_reward", get_reward, methods=["POST"])
    return app


def main(kind: str, shape: Shape) -> None:
    """Serve until standard input ends, as it does with who started this; the first line of output is the URL."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    from rmfast.integrations.serve import create_app, serve

    app = create_app({"m": reward_model(shape)}) if kind == "ours" else _plain(shape, 1 if kind == "each" else 8)
    serve(app, port=0, ready=lambda url: print(url, flush=True))


_SHAPE = {"model": "SmolLM2-135M", "dtype": "float32", "workload": "best-of-16", "texts": 512, "prompt": 128,
          "response": 32}  # fmt: skip

BENCHMARKS = [
    Benchmark(
        "serve/best-of-16-fp32",
        _SHAPE,
        quick=_SHAPE | {"model": TINY, "texts": 32, "prompt": 24, "response": 8},
        problem=Serving,
        ours=server("ours"),
        baselines={"score": {"": score}, "each": {"": server("each")}, "batches": {"": server("batches")}},
        targets={"cpu": {"score": 0.9, "each": 8}},
        rounds=(1, 20),
        devices=("cpu",),
    )
] if importlib.util.find_spec("fastapi") else []  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))

"""`python tests/fuzz/serve_soak.py MINUTES`: a server under clients that leave, stall or send nonsense, and its end.

Rounds of a server process, which ends by SIGTERM (all that was sent is answered, exit code 0) or by SIGKILL. In all of
it no score may be wrong to a bit, no request hang, and nothing of memory, files or threads stay behind.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models

import rmfast

CLIENTS = 32
HANG = 60.0  # seconds
MIB = 1 << 20
GROWTH = 48 * MIB  # of resident memory after the first half: arenas of malloc, no more


def reward_model() -> rmfast.RewardModel:
    return rmfast.RewardModel(models.decoder(), models.tokenizer(chat=True))


def texts(count: int = 200) -> list[str]:
    rng = random.Random(0)
    prompts = [f"prompt {i} " + "more of it " * rng.randrange(5) for i in range(12)]
    return [rng.choice(prompts) + "answer " * rng.randrange(6) + str(i) for i in range(count)]


class Soak:
    """Clients of one server."""

    def __init__(self, url: str, known: dict[str, float], seed: int, counts: Counter[str]) -> None:
        self.host, port = url.removeprefix("http://").rsplit(":", 1)
        self.port, self.known, self.rng, self.counts = int(port), known, random.Random(seed), counts
        self.texts = list(known)
        self.ending = False

    async def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        await asyncio.gather(*(self.client(end) for _ in range(CLIENTS)))

    async def client(self, end: float) -> None:
        acts = [self.score] * 6 + [self.leave, self.leave, self.malformed, self.stall, self.garbage, self.large]
        while time.monotonic() < end and not self.ending:
            act = self.rng.choice(acts)
            try:
                await asyncio.wait_for(act(), HANG)
            except (ConnectionError, asyncio.IncompleteReadError):
                if not self.ending:
                    raise
                return
            self.counts[act.__name__] += 1

    def request(self) -> tuple[str, Any, Any]:
        """A path, a body, and how the scores are read from the answer, with what they are."""
        few = self.rng.choices(self.texts, k=self.rng.choice([1, 1, 1, 2, 5]))
        want = [self.known[text] for text in few]
        return self.rng.choice(
            [
                ("/get_reward", {"query": few, "prompts": few, "labels": few}, lambda a: a["rewards"] == want),
                ("/classify", {"input": few}, lambda a: [row["probs"] for row in a["data"]] == [[w] for w in want]),
                ("/v1/embeddings", {"input": few}, lambda a: [r["embedding"][0] for r in a["data"]] == want),
                ("/score", {"inputs": few}, lambda a: a["rewards"] == want),
                ("/values", {"inputs": few}, lambda a: [values[-1] for values in a["values"]] == want),
                ("/", {"prompt": few[0][:9], "response": few[0][9:]}, lambda a: a == want[0]),
            ]
        )

    async def open(self, path: str, body: bytes, length: int | None = None) -> tuple[Any, Any]:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body)
        return reader, writer

    async def answer(self, reader: Any, writer: Any) -> tuple[int, bytes]:
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
        content = await reader.readexactly(size)
        writer.close()
        return int(head.split()[1]), content

    async def score(self) -> None:
        path, body, right = self.request()
        status, content = await self.answer(*await self.open(path, json.dumps(body).encode()))
        if status == 503 and self.ending:
            return
        assert status == 200, (status, content)
        assert right(json.loads(content)), (path, body, content)

    async def leave(self) -> None:
        """In the middle of the body, or before the answer; in an orderly way or not."""
        path, body, _ = self.request()
        content = json.dumps(body).encode()
        cut = self.rng.choice([len(content), self.rng.randrange(len(content))])
        _, writer = await self.open(path, content[:cut], len(content))
        await asyncio.sleep(self.rng.choice([0, 0.001, 0.02]))
        self.rng.choice([writer.close, writer.transport.abort])()

    async def malformed(self) -> None:
        path, body, _ = self.request()
        content = bytearray(json.dumps(body).encode())
        for _ in range(self.rng.randrange(1, 4)):
            content[self.rng.randrange(len(content))] = self.rng.choice(b'{}[]",:\\\x00\xff9')
        status, said = await self.answer(*await self.open(path, bytes(content)))
        assert status in (200, 400) or (status in (404, 503) and self.ending), (status, bytes(content), said)
        assert status == 200 or json.loads(said)["error"]["message"]

    async def stall(self) -> None:
        """A body that comes in pieces."""
        path, body, right = self.request()
        content = json.dumps(body).encode()
        reader, writer = await self.open(path, content[:5], len(content))
        await asyncio.sleep(0.02)
        writer.write(content[5:])
        status, said = await self.answer(reader, writer)
        assert (status == 200 and right(json.loads(said))) or (status == 503 and self.ending), (status, said)

    async def garbage(self) -> None:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(self.rng.randbytes(200) + b"\r\n\r\n")
        await reader.read()
        writer.close()

    async def large(self) -> None:
        status, _ = await self.answer(*await self.open("/score", b"x", 1 << 30))
        assert status == 413 or (status == 503 and self.ending)


class Process:
    """A server in a process of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, __file__, "serve"], stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()  # type: ignore[union-attr]
        assert self.url.startswith("http://"), "the server has not started"

    def held(self) -> dict[str, int]:
        """Resident bytes, open files and threads."""
        here = Path(f"/proc/{self.process.pid}")
        pages = int((here / "statm").read_text().split()[1])
        return {"memory": pages * os.sysconf("SC_PAGE_SIZE"), "files": len(os.listdir(here / "fd")),
                "threads": len(os.listdir(here / "task"))}  # fmt: skip

    async def settled(self, soak: Soak) -> dict[str, int]:
        """What is held once no request is left."""
        until = time.monotonic() + HANG
        while True:
            reader, writer = await asyncio.open_connection(soak.host, soak.port)
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            page = (await reader.read()).decode()
            writer.close()
            left = float(re.search(r'rmfast_texts_without_answer\{model="m"\} (\S+)', page)[1])  # type: ignore[index]
            if not left:
                await asyncio.sleep(0.2)
                return self.held()
            assert time.monotonic() < until, f"{left:g} texts have no answer"
            await asyncio.sleep(0.05)


def round_of(seconds: float, seed: int, deadly: bool, known: dict[str, float], counts: Counter[str]) -> dict[str, int]:
    """One server, its clients, and its end under load; how much more it held after the second half than before."""
    server = Process()
    try:
        soak = Soak(server.url, known, seed, counts)

        async def load() -> dict[str, int]:
            await soak.run(seconds / 2)
            first = await server.settled(soak)
            await soak.run(seconds / 2)
            last = await server.settled(soak)
            grown = {name: last[name] - first[name] for name in last}
            assert grown["memory"] < GROWTH and grown["files"] <= 2 and grown["threads"] <= 1, grown

            async def end() -> None:
                await asyncio.sleep(1)
                soak.ending = True
                server.process.send_signal(signal.SIGKILL if deadly else signal.SIGTERM)

            await asyncio.gather(soak.run(HANG), end())
            return grown

        grown = asyncio.run(load())
        code = server.process.wait(HANG)
        assert code == (-signal.SIGKILL if deadly else 0), code
        counts["killed" if deadly else "ended"] += 1
        return grown
    finally:
        server.process.kill()
        server.process.wait()
        server.process.stdout.close()  # type: ignore[union-attr]


def soak(seconds: float, seed: int = 0, rounds: int = 1) -> tuple[Counter[str], dict[str, int]]:
    """Counts of what clients did, and the most that a server grew by."""
    few = texts()
    known = dict(zip(few, reward_model().score(few).tolist()))
    counts: Counter[str] = Counter()
    most: dict[str, int] = {}
    for i in range(rounds):
        grown = round_of(seconds / rounds, seed + i, i % 2 == 1, known, counts)
        most = {name: max(most.get(name, 0), size) for name, size in grown.items()}
    return counts, most


def _serve() -> None:
    from rmfast.integrations.serve import create_app, serve

    app = create_app({"m": reward_model()})
    serve(app, port=0, ready=lambda url: print(url, flush=True), log_level="critical")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve()
    else:
        minutes = float(sys.argv[1])
        counts, most = soak(60 * minutes, seed=int(time.time()), rounds=max(2, round(minutes)))
        print("\n".join(f"{count:>10,}  {what}" for what, count in sorted(counts.items())))
        held = f"{most['memory'] / MIB:.1f} MiB, {most['files']} files, {most['threads']} threads"
        print(f"most that a server grew by in its second half: {held}")

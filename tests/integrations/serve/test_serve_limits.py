"""What the server refuses, and how: limits, tokens, malformed and hostile bodies, clients that leave."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import socket
import time
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi")

import torch
from serving import ask, reward_model, running, served

from rmfast.integrations.serve import remote_reward
from rmfast.integrations.serve.app import create_app

ROUTES = ["/get_reward", "/classify", "/pooling", "/score", "/values", "/steps", "/v1/embeddings", "/", "/remote_rm",
          "/v1/classify", "/v1/pooling", "/v1/score"]  # fmt: skip


@pytest.fixture(scope="module")
def rm():
    return reward_model()


@pytest.fixture(scope="module")
def url(rm):
    with served(rm, body=100_000, texts=8, tokens=300, characters=5000, body_seconds=0.5) as url:
        yield url


def test_sizes_have_limits(url):
    assert ask(url, "/score", {"inputs": ["x" * 100_000]}).status == 413
    many = ask(url, "/score", {"inputs": ["x"] * 9})
    assert many.status == 413 and "9 texts" in many.message
    long = ask(url, "/score", {"inputs": ["x" * 100] * 3})
    assert long.status == 413 and "303 tokens" in long.message
    for long in "x" * 5001, ["x", "y" * 5000], [{"role": "user", "content": "x" * 5000}], {"text": "x" * 5001}:
        answer = ask(url, "/score", {"inputs": ["x", long]})
        assert answer.status == 413 and "input 1 has 500" in answer.message
    assert ask(url, "/steps", {"question": "x" * 5000, "steps": ["y"], "activation": "none"}).status == 413
    over = ask(url, "/score", {"inputs": ["a", "x" * 128]})
    assert over.status == 400 and "input 1: it has 129 tokens, over max_length=128" in over.message


def talk(url, *parts, pause=0.0):
    """What the server says to raw bytes."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=30) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        found = b""
        while piece := connection.recv(65536):
            found += piece
        return found


HEAD = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_a_body_without_a_length_is_counted_as_it_comes(url):
    chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    said = talk(url, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 7)
    assert said.startswith(b"HTTP/1.1 413 ") and b"100000 bytes" in said


def through(url, path, size, chunked, *more):
    """What the server says to a client that reads nothing before it has sent all."""
    head = b"POST %b HTTP/1.1\r\nHost: localhost\r\n" % path + b"".join(more)
    if chunked:
        parts = [b"Transfer-Encoding: chunked\r\n\r\n", *[b"4000\r\n" + b"x" * 0x4000 + b"\r\n"] * (size >> 14)]
        return talk(url, head, *parts, b"0\r\n\r\n")
    return talk(url, head + b"Content-Length: %d\r\n\r\n" % size + b"x" * size)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_sends_too_much_is_told_so(rm, chunked):
    with served(rm, body=1 << 20, token="sesam") as url:
        own = b"Authorization: Bearer sesam\r\n"
        large = through(url, b"/score", 4 << 20, chunked, own)
        assert large.startswith(b"HTTP/1.1 413 ") and b"1048576 bytes" in large
        assert through(url, b"/score", 4 << 20, chunked).startswith(b"HTTP/1.1 401 ")
        assert through(url, b"/health", 4 << 20, chunked).startswith(b"HTTP/1.1 413 ")
        waits = talk(
            url, b"POST /score HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n"
        )
        assert waits.startswith(b"HTTP/1.1 401 ")
        for token, said in ("sesam", r"refused \(413\): the body is over"), ("other", r"refused \(401\): expected"):
            reward = remote_reward(url, token=token)
            with pytest.raises(RuntimeError, match=said):
                asyncio.run(reward(["x" * (3 << 20)], ["y"]))


def test_what_needs_no_token_takes_no_body(rm):
    with served(rm, token="sesam") as url:
        assert ask(url, "/health", b"x", method="GET").status == 413
        assert (
            talk(url, b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n")[9:12]
            == b"413"
        )
        assert ask(url, "/health", method="GET").status == 200


def test_a_body_that_does_not_come_is_not_waited_for(url):
    start = time.monotonic()
    said = talk(url, HEAD + b"Content-Length: 100\r\n\r\n{")
    assert said.startswith(b"HTTP/1.1 408 ") and time.monotonic() - start < 10


MALFORMED = [b"", b"{", b"null", b"[]", b"3", b'"x"', b"{}", b"\xff\xfe", b'{"inputs": }', b"[" * 50_000,
             b'{"inputs":' + b"[" * 5_000, b'{"a":' * 5_000, b'{"inputs": ["\\ud800"]}', b'{"query": ["\\ud800"]}',
             b'{"input": NaN}', b'{"inputs": [NaN]}', b'{"inputs": [1e999]}']  # fmt: skip


@pytest.mark.parametrize("path", ROUTES)
def test_malformed_bodies_are_refused(url, path):
    for body in MALFORMED:
        answer = ask(url, path, body)
        assert answer.status == 400 and answer.message, (body[:30], answer.content)


ODD = [
    ("/score", {"inputs": "text"}),
    ("/score", {"inputs": []}),
    ("/score", {"inputs": [""]}),
    ("/score", {"inputs": [None]}),
    ("/score", {"inputs": [True]}),
    ("/score", {"inputs": [[True, False]]}),
    ("/score", {"inputs": [[1.5]]}),
    ("/score", {"inputs": [[10**30]]}),
    ("/score", {"inputs": [[-1]]}),
    ("/score", {"inputs": [[272]]}),
    ("/score", {"inputs": [{}]}),
    ("/score", {"inputs": [{"messages": "x"}]}),
    ("/score", {"inputs": [{"text": "x", "zzz": 1}]}),
    ("/score", {"inputs": [{"text": "x", "zzz": None}]}),
    ("/values", {"inputs": [{"text": "x", "chat_template": "y"}]}),
    ("/steps", {"inputs": [{"text": "x", "max_length": 3}], "activation": "none"}),
    ("/score", {"inputs": [[{"role": "user"}]]}),
    ("/score", {"inputs": [[{"role": 3, "content": "x"}]]}),
    ("/score", {"inputs": [{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": 3}]}),
    ("/score", {"inputs": [{"input_ids": [1, 2], "attention_mask": [1]}]}),
    ("/score", {"inputs": ["x"], "max_length": 0}),
    ("/score", {"inputs": ["x"], "max_length": "5"}),
    ("/score", {"inputs": ["x"], "truncation": "middle"}),
    ("/score", {"inputs": ["x"], "normalize": "own"}),
    ("/score", {"inputs": ["x"], "positions": [0]}),
    ("/score", {"inputs": ["x"], "text_1": "y", "text_2": "z"}),
    ("/score", {"inputs": ["x"], "model": 3}),
    ("/score", {"text_1": "a"}),
    ("/score", {"text_1": [], "text_2": []}),
    ("/score", {"text_1": "a", "text_2": "b", "softmax": True}),
    ("/score", {"query": "a", "items": ["b"], "label_token_ids": [1]}),
    ("/get_reward", {"query": "x"}),
    ("/get_reward", {"query": [3]}),
    ("/get_reward", {"query": ["x"], "images": ["y"]}),
    ("/classify", {"input": {}}),
    ("/classify", {"input": 3}),
    ("/classify", {"input": [True]}),
    ("/classify", {"input": ["x", 3]}),
    ("/classify", {"input": "x", "messages": []}),
    ("/classify", {"messages": []}),
    ("/classify", {"input": "x", "use_activation": 1}),
    ("/classify", {"input": "x", "truncate_prompt_tokens": 0}),
    ("/classify", {"input": "x", "truncate_prompt_tokens": -2}),
    ("/classify", {"input": "x", "encoding_format": "base64"}),
    ("/classify", {"input": "x", "dimensions": 3}),
    ("/classify", {"messages": [{"role": "user", "content": "x"}], "chat_template": "x"}),
    ("/classify", {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"tokenize": True}}),
    ("/classify", {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": True}),
    ("/classify", {"text": None}),
    ("/classify", {"text": "x", "input_ids": [1]}),
    ("/pooling", {"input": "x", "task": "embed"}),
    ("/v1/embeddings", {"input": "x", "dimensions": 2}),
    ("/", {"prompt": "a"}),
    ("/", {"prompt": [], "response": "b"}),
    ("/", {"prompt": [{"role": "user"}], "response": "b"}),
    ("/", {"prompt": "", "response": ""}),
    ("/?format=concat", {"prompt": [{"role": "user", "content": "a"}], "response": "b"}),
    ("/steps", {"question": "a", "steps": []}),
    ("/steps", {"question": "a", "steps": [[]], "activation": "none"}),
    ("/steps", {"question": ["a"], "steps": [["b"], ["c"]], "activation": "none"}),
    ("/steps", {"question": "a", "steps": ["b"], "activation": "none", "truncation": "left"}),
    ("/steps", {"question": "a", "steps": ["b"], "activation": "none", "separator": ",", "answer": "+"}),
    ("/steps", {"question": "a", "steps": ["b"], "activation": "softmax"}),
    ("/steps", {"inputs": ["a"], "activation": "none"}),
]


@pytest.mark.parametrize("path, body", ODD, ids=lambda x: str(x)[:60])
def test_what_a_route_does_not_know_is_refused_by_name(url, path, body):
    answer = ask(url, path, body)
    assert answer.status == 400 and answer.message, answer.content


@pytest.mark.parametrize(
    "path, body, said",
    [
        ("/score", {"inputs": ["x"], "temperature": 1}, "temperature: this route has no such field"),
        ("/", {"query": ["x"], "labels": [""]}, "response: Field required; query: this route has no such field"),
        ("/get_reward?special_tokens=no", {"query": ["x"]}, "special_tokens in the URL's query: .*'true' or 'false'"),
        ("/get_reward?modle=m", {"query": ["x"]}, "expected model, format.* in the URL's query, got 'modle'"),
        ("/nowhere", {}, "/openapi.json lists the routes"),
    ],
)
def test_a_refusal_says_what_is_wrong_and_what_would_be_right(url, path, body, said):
    assert re.search(said, ask(url, path, body).message)


def test_records_have_known_keys_alone(rm, url):
    answer = ask(url, "/score", {"inputs": ["x", {"text": "x", "zzz": 1}]})
    assert answer.status == 400 and "input 1: expected a record" in answer.message and "got 'zzz'" in answer.message
    known = [{"text": "x"}, {"prompt": "a", "response": "b"}, {"input_ids": [3, 4], "attention_mask": [1, 1]},
             {"messages": [{"role": "user", "content": "x"}], "tools": None, "chat_template_kwargs": {}}]  # fmt: skip
    assert ask(url, "/score", {"inputs": known}).json["rewards"] == rm.score(known).tolist()


def test_pages_whose_name_was_made_to_lead_here_are_kept_out(rm):
    with running(create_app({"m": rm}, loopback=True)) as url:
        for host in "localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:8000":
            assert ask(url, "/v1/models", method="GET", Host=host).status == 200, host
        for host in "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "x:y", "":
            answer = ask(url, "/score", {"inputs": ["x"]}, Host=host)
            assert answer.status == 421 and "Host" in answer.message, host
        two = talk(url, b"GET /v1/models HTTP/1.0\r\n\r\n")
        assert two.startswith(b"HTTP/1.1 421 ")
        assert ask(url, "/health", method="GET", Host="evil.example").status == 200


def test_a_template_of_the_clients_is_not_run(url):
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    kwargs = {"chat_template": loop}
    turns = [{"role": "user", "content": "x"}]
    for path, body in [
        ("/score", {"inputs": [{"messages": turns, "chat_template_kwargs": kwargs}]}),
        ("/values", {"inputs": [{"messages": turns, "chat_template_kwargs": json.dumps(kwargs)}]}),
        ("/classify", {"messages": turns, "chat_template_kwargs": kwargs}),
        ("/steps", {"inputs": [{"messages": turns, "chat_template_kwargs": kwargs}], "activation": "none"}),
    ]:
        answer = ask(url, path, body)
        assert answer.status == 400 and "chat_template" in answer.message, (path, answer.content)


def test_other_paths_and_methods(url):
    assert ask(url, "/nowhere", {}).status == 404 and ask(url, "/nowhere", {}).message
    assert ask(url, "/score", method="GET").status == 405
    assert ask(url, "/../etc/passwd", method="GET").status == 404
    assert ask(url, "/docs", method="GET").status == 404  # its page would load scripts from elsewhere
    assert "/get_reward" in ask(url, "/openapi.json", method="GET").json["paths"]


def test_texts_that_look_like_something_are_texts(rm, url):
    for text in ["<s></s>", "{{ 7 * 7 }}", "\x00", "\U0001f600" * 9, "a\u202eb", "${jndi:x}", "'; DROP TABLE", "NaN"]:
        assert ask(url, "/score", {"inputs": [text]}).json["rewards"] == rm.score([text]).tolist()


def test_a_token_is_asked_for_by_all_but_health(rm):
    with served(rm, token="sesam\n") as url:
        for headers in (
            {},
            {"Authorization": "Bearer sesa"},
            {"Authorization": "Basic sesam"},
            {"Authorization": f"Basic {base64.b64encode(b'sesam:sesa').decode()}"},
            {"Authorization": f"Digest {base64.b64encode(b'x:sesam').decode()}"},
            {"Authorization": "sesam"},
        ):
            for path, method in (
                ("/score", "POST"),
                ("/metrics", "GET"),
                ("/v1/models", "GET"),
                ("/openapi.json", "GET"),
            ):
                answer = ask(url, path, {"inputs": ["x"]}, method, **headers)
                assert answer.status == 401 and answer.message and answer.headers["WWW-Authenticate"] == "Bearer"
        assert ask(url, "/health", method="GET").status == 200
        in_url = base64.b64encode(b"anybody:sesam").decode()  # what clients make of http://anybody:sesam@host
        for given in "Bearer sesam", "bearer sesam", f"Basic {in_url}":
            answer = ask(url, "/score", {"inputs": ["x"]}, Authorization=given)
            assert answer.json["rewards"] == rm.score(["x"]).tolist()


class Held:
    """A model whose runs wait until they are let go."""

    __class__ = property(lambda self: type(self._rm))

    def __init__(self, rm):
        import threading

        self._rm, self.go, self.ran = rm, threading.Event(), []
        self.go.set()

    def __getattr__(self, name):
        return getattr(self._rm, name)

    def score(self, items, **options):
        assert self.go.wait(30)
        self.ran += [item for item in items if not isinstance(item, list)]
        return self._rm.score(items, **options)


@pytest.fixture
def held(rm):
    return Held(rm)


def begin(url, body):
    """A connection with a request that was sent."""
    place = urlsplit(url)
    connection = socket.create_connection((place.hostname, place.port), timeout=30)
    content = json.dumps(body).encode()
    connection.sendall(HEAD + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def metric(url, name):
    lines = ask(url, "/metrics", method="GET").content.decode().splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[-1])


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_texts_of_clients_that_left_are_dropped(held):
    with served(held) as url:
        held.go.clear()
        first = begin(url, {"inputs": ["a"]})
        until(lambda: metric(url, "rmfast_texts_without_answer") == 1)
        time.sleep(0.1)  # it runs
        others = [begin(url, {"inputs": [text]}) for text in "bcd"]
        until(lambda: metric(url, "rmfast_texts_without_answer") == 4)
        others[0].close()
        others[2].close()
        until(lambda: metric(url, "rmfast_texts_without_answer") == 2)
        held.go.set()
        for connection in first, others[1]:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
            connection.close()
        assert len(held.ran) == 2
        assert metric(url, "rmfast_disconnects_total") == 2


def test_a_full_queue_is_429_and_says_when_to_come_back(held):
    with served(held, queue=3) as url:
        held.go.clear()
        waiting = begin(url, {"inputs": ["a", "b"]})
        until(lambda: metric(url, "rmfast_texts_without_answer") == 2)
        answer = ask(url, "/score", {"inputs": ["c", "d"]})
        assert answer.status == 429 and answer.message and int(answer.headers["Retry-After"]) >= 1
        held.go.set()
        assert waiting.recv(65536).startswith(b"HTTP/1.1 200 ")
        waiting.close()
        assert ask(url, "/score", {"inputs": ["c", "d"]}).status == 200


def test_a_request_without_an_answer_in_time_is_504(held):
    with served(held, timeout=0.2) as url:
        held.go.clear()
        answer = ask(url, "/score", {"inputs": ["a"]})
        assert answer.status == 504 and "0.2 s" in answer.message
        assert metric(url, "rmfast_texts_without_answer") == 0
        held.go.set()


def test_a_reward_that_is_not_finite_is_an_error(rm):
    class Broken(Held):
        def score(self, items, **options):
            return torch.full((len(items),), float("nan"))

    with served(Broken(rm)) as url:
        answer = ask(url, "/score", {"inputs": ["a"]})
        assert answer.status == 500 and "not finite" in answer.message


def test_the_log_says_why_requests_are_refused_a_line_a_second(rm, caplog):
    with served(rm) as url:
        for _ in range(9):
            ask(url, "/get_reward", {"query": ["x" * 500]})
    lines = [record.getMessage() for record in caplog.records if record.name == "rmfast.serve"]
    assert lines[0].startswith("/get_reward: 400 input 0: it has ") and 1 <= len(lines) < 9


def test_an_error_inside_tells_the_log_and_not_the_client(rm, caplog):
    class Broken(Held):
        def score(self, items, **options):
            if isinstance(items[0], list):
                return None
            raise RuntimeError("/root/secret/weights")

    with served(Broken(rm)) as url:
        answer = ask(url, "/score", {"inputs": ["a"]})
        assert answer.status == 500 and "secret" not in answer.message
        assert "secret" in caplog.text
        assert ask(url, "/health", method="GET").status == 200

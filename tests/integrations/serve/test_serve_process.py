"""`rmfast serve` as a process: its options, its signals, and what it says where something is missing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("fastapi")

import models
from serving import ask, at_once
from typer.testing import CliRunner

import rmfast
from rmfast.cli import app as command_line
from rmfast.integrations.serve import app, server


def run(*args):
    return CliRunner().invoke(command_line, list(map(str, args)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    models.decoder().save_pretrained(path)
    models.tokenizer(chat=True).save_pretrained(path)
    return path


@pytest.fixture
def start():
    processes = []

    def begin(*args, **env):
        command = [sys.executable, "-m", "rmfast", "serve", "--port", "0", *map(str, args)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | env)
        processes.append(process)
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r" at (http://\S+)$", line):
                return process, found[1], "".join(said)
        raise AssertionError("".join(said))

    yield begin
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait(30)
        process.stderr.close()


def asked(url):
    """Texts that have come, answered or not."""
    page = ask(url, "/metrics", method="GET", Authorization="Bearer sesam").content.decode()
    names = ("rmfast_texts_without_answer", "rmfast_batch_texts_sum")
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(names))


def test_requests_that_were_sent_are_answered_before_it_ends(folder, start, tmp_path):
    (tmp_path / "token").write_text("sesam\n")
    options = ["--model", f"good={folder}", "--batch-tokens", 256, "--token-file", tmp_path / "token"]
    process, url, said = start(*options)
    assert url.startswith("http://127.0.0.1:") and "good" in said
    assert ask(url, "/score", {"inputs": ["x"]}).status == 401
    rm = rmfast.load(folder)
    texts = [[f"{i} {j} " + "word " * (i % 20) for j in range(4)] for i in range(64)]
    answers = []

    def send():
        bodies = [{"inputs": some, "model": "good"} for some in texts]
        answers.extend(at_once(url, "/score", bodies, Authorization="Bearer sesam"))

    sender = threading.Thread(target=send)
    sender.start()
    until = time.monotonic() + 60
    while asked(url) < 256:
        assert time.monotonic() < until
    process.send_signal(signal.SIGTERM)
    sender.join(60)
    assert process.wait(60) == 0
    assert "all requests are answered" in process.stderr.read()
    assert [answer.status for answer in answers] == [200] * len(texts)
    assert [answer.json["rewards"] for answer in answers] == [rm.score(some).tolist() for some in texts]
    with pytest.raises(OSError):
        ask(url, "/health", method="GET")


def test_options_become_those_of_the_application(folder, monkeypatch):
    seen = []
    monkeypatch.setenv("RMFAST_TOKEN", "sesam\n")
    monkeypatch.setattr(app, "create_app", lambda models, **given: seen.append((models, given)) or "made")
    monkeypatch.setattr(server, "serve", lambda app, **given: given["ready"]("URL") or seen.append((app, given)))
    options = ["--model", folder, "--model", f"b={folder}", "--max-wait", 2, "--max-queue", 9, "--max-texts", 8,
               "--max-tokens", 7, "--max-body", 6, "--timeout", 5, "--drain", 4, "--truncation", "left",
               "--max-length", 9, "--host", "0.0.0.0", "--port", 0, "--batch-tokens", 64,
               "--max-characters", 3]  # fmt: skip
    done = run("serve", *options)
    assert done.exit_code == 0, done.output
    (models_, given), (made, how) = seen
    assert list(models_) == [folder.name, "b"] and made == "made"
    limits = given["limits"]
    assert (limits.max_wait, limits.queue, limits.texts, limits.tokens) == (0.002, 9, 8, 7)
    assert limits.characters == 3
    assert (limits.body, limits.timeout, limits.drain, limits.batch_tokens) == (6, 5, 4, 64)
    assert (
        given["token"] == "sesam"
        and not given["loopback"]
        and given["encoding"] == {"truncation": "left", "max_length": 9}
    )
    assert (how["host"], how["port"], how["drain"]) == ("0.0.0.0", 0, 4)
    assert "token" not in done.output
    monkeypatch.delenv("RMFAST_TOKEN")
    assert "no token is asked for" in run("serve", "--model", folder, "--host", "0.0.0.0").output
    run("serve", "--model", folder)
    assert [given["loopback"] for _, given in seen[2::2]] == [False, True]
    monkeypatch.setenv("RMFAST_TOKEN", "\n")
    assert "Expected RMFAST_TOKEN to hold a token" in run("serve", "--model", folder).output


def test_what_is_wrong_is_said_in_one_line(folder, tmp_path):
    (tmp_path / "empty").write_text("\n")
    for options, said in (
        (["--model", folder, "--token-file", tmp_path / "empty"], "to hold a token"),
        (["--model", f"a={folder}", "--model", f"a={folder}"], "a twice"),
        (["--model", folder, "--model", f"{folder.name}={folder}"], f"{folder.name} twice"),
        (["--model", tmp_path / "nowhere"], "nowhere"),
        (["--model", folder, "--host", "192.0.2.1"], "192.0.2.1:8000 can't be had"),
    ):
        done = run("serve", *options)
        assert done.exit_code == 1 and said in done.output.splitlines()[-1], done.output


def test_without_its_packages_it_names_the_extra():
    gone = "import sys; sys.modules['fastapi'] = None; from rmfast.cli import main; main()"
    command = [sys.executable, "-c", gone, "serve", "--model", "m"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr == 'rmfast: rmfast serve needs fastapi: pip install "rmfast[serve]"\n'


def test_the_command_line_loads_no_server():
    code = "import sys, rmfast.cli; assert not {'fastapi', 'uvicorn', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

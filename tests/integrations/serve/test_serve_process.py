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

import rmfast


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


def test_requests_that_were_sent_are_answered_before_it_ends(folder, start):
    process, url, said = start("--model", f"good={folder}", "--batch-tokens", 64)
    assert url.startswith("http://127.0.0.1:") and "good" in said
    rm = rmfast.load(folder)
    texts = [f"{i} " + "word " * (i % 20) for i in range(200)]
    timer = threading.Timer(0.4, process.send_signal, [signal.SIGTERM])
    timer.start()
    answers = at_once(url, "/score", [{"inputs": [text], "model": "good"} for text in texts])
    assert process.wait(60) == 0
    assert "all requests are answered" in process.stderr.read()
    assert [answer.status for answer in answers] == [200] * len(texts)
    assert [answer.json["rewards"][0] for answer in answers] == rm.score(texts).tolist()
    with pytest.raises(OSError):
        ask(url, "/health", method="GET")


def test_a_token_comes_from_a_file_or_the_environment(folder, start, tmp_path):
    (tmp_path / "token").write_text("sesam\n")
    for args, env in (["--token-file", tmp_path / "token"], {}), ([], {"RMFAST_TOKEN": "sesam"}):
        process, url, _ = start("--model", folder, *args, **env)
        assert ask(url, "/score", {"inputs": ["x"]}).status == 401
        assert ask(url, "/score", {"inputs": ["x"]}, Authorization="Bearer sesam").status == 200
        start_of_end = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0 and time.monotonic() - start_of_end < 20


def fails(*args):
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    return done.stderr


def test_what_is_missing_or_wrong_is_said_in_one_line(folder, tmp_path):
    gone = "import sys; sys.modules['fastapi'] = None; from rmfast.cli import main; main()"
    assert 'pip install "rmfast[serve]"' in fails("-c", gone, "serve", "--model", folder)
    (tmp_path / "empty").write_text("\n")
    serve = ["-m", "rmfast", "serve", "--port", "0"]
    assert "to hold a token" in fails(*serve, "--model", folder, "--token-file", tmp_path / "empty")
    assert "twice" in fails(*serve, "--model", f"a={folder}", "--model", f"a={folder}")


def test_the_command_line_loads_no_server():
    code = "import sys, rmfast.cli; assert not {'fastapi', 'uvicorn', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

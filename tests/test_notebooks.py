"""What notebooks show of results: `_repr_html_`, light and escaped."""

from __future__ import annotations

import base64
import re
import sys

import models
import pytest
import torch

import rmfast
from rmfast import debias, evaluation

HOSTILE = "<script>alert(1)</script> $\\frac{$ <b>"


@pytest.fixture(scope="module")
def rm():
    model = models.decoder("llama", max_position_embeddings=512)
    return rmfast.RewardModel(model, models.tokenizer(chat=True))


@pytest.fixture(scope="module")
def rows():
    return [
        {
            "prompt": f"ask {i}",
            "chosen": f"good {HOSTILE}" + "!" * i,
            "rejected": f"bad {i}",
            "subset": HOSTILE + str(i % 2),
        }
        for i in range(6)
    ]


def results(rm, rows):
    texts = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    found = evaluation.evaluate(rm, rows, resamples=10)
    yield "Lens", rm.lens(texts)
    yield "Lens of every token", rm.lens(texts[:1], positions="all")
    yield "PatchSweep", rm.patch_sweep(*texts[:2], layers=[1], positions=[-1, -2])
    yield "PatchSweep of one position", rm.patch_sweep(*texts[:2], sites=["attn_out", "mlp_out"], positions=[-1])
    yield "Attribution", rm.attribute(texts[0])
    yield "Attribution of every token", rm.attribute(texts[0], positions="all", components=["mlp_neuron"])
    yield "Evaluation", found
    yield "Differences", found.minus(found)
    yield "Report", debias.report(rm, rows, resamples=10)
    yield "Parity", evaluation.parity(rm, texts[:2])
    yield "ResponseValues", rm.values_and_reward(texts)


def test_figures_are_images_and_tables_are_escaped(rm, rows):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    for name, result in results(rm, rows):
        page = result._repr_html_()
        assert len(page) < 400_000, name
        assert "<script" not in page and "<b>" not in page, name
        if page.startswith("<img"):
            (image,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
            assert "<script" not in base64.b64decode(image).decode(), name
        else:
            assert page.startswith("<table>"), name
    assert pyplot.get_fignums() == []


def test_without_matplotlib_there_is_text(rm, rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    lens = rm.lens([rows[0]["chosen"]])
    assert lens._repr_html_() == f"<pre>{repr(lens).replace(chr(39), '&#x27;')}</pre>"


def test_nothing_is_shown_as_nothing(rm):
    assert rm.lens([])._repr_html_().startswith("<pre>Lens(0 texts")
    empty = torch.empty(0)
    values = rmfast.ResponseValues(empty, empty, empty, empty, torch.zeros(1, dtype=torch.int64), empty, empty.long())
    assert "0 responses, 0 tokens" in values._repr_html_()

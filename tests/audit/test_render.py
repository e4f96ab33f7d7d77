"""The page: one file that loads nothing, in which hostile texts stay texts."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser

import audits
import pytest

from rmfast.audit import Audit, render

pytest.importorskip("altair")
pytest.importorskip("vl_convert")
pytest.importorskip("optuna")

MODULE = sys.modules[render.__module__]  # the package's `render` is the function


@pytest.fixture(scope="module")
def audit():
    return audits.small_audit()


@pytest.fixture(scope="module")
def page(audit):
    return render(audit)


class Page(HTMLParser):
    """The tags of a page with their attributes, its scripts, and the text outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script" and self.scripts and self.cdata_elem == "script":
            self.scripts[-1] += data
        elif self.cdata_elem != "style":
            self.text += data


def test_nothing_is_loaded(page):
    tags = Page(page).tags
    assert {tag for tag, _ in tags}.isdisjoint({"link", "img", "iframe", "object", "embed", "base", "form", "video"})
    for tag, attrs in tags:
        assert not {"src", "href", "srcset", "action", "data"} & set(attrs), (tag, attrs)
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
    style = re.search("<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1]


def test_no_script_but_the_pages_own_may_run_and_nothing_may_be_connected_to(page):
    found = Page(page)
    assert [attrs.get("type") for tag, attrs in found.tags if tag == "script"] == ["application/json", None, None]
    (policy,) = [
        a["content"] for tag, a in found.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and "connect-src" not in rules
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in found.scripts[1:]]
    assert rules["script-src"] == " ".join(f"'sha256-{digest}'" for digest in digests)


def test_hostile_texts_stay_texts(page, audit):
    found = Page(page)
    assert page.count("<script") == page.count("</script>") == 3
    assert {"img", "textarea", "b"}.isdisjoint(tag for tag, _ in found.tags)
    assert "a <b>model</b>" in found.text and audits.SCRIPT in found.text  # the model's name, the command
    data = json.loads(found.scripts[0])
    assert data["pairs"][0]["tokens"] == audit.shown[0]["tokens"]
    assert "{{ 7 * 7 }}" in found.text or all("{{ 7" not in p["chosen"]["text"] for p in audit.shown)


def test_figures_are_on_the_page(page, audit):
    text = Page(page).text
    for row in audit.figures:
        assert f"{100 * row['value']:.1f}%" in text
    assert f"{100 * audit.calibration['error']:.1f}%" in text


def test_the_page_is_below_its_limit_whatever_the_texts(audit, monkeypatch):
    """As many pairs as are shown at most, of texts as long as are shown, with many subsets."""
    long = json.loads(json.dumps(audit.shown[0]))
    for side in ("prompt", "chosen", "rejected"):
        long[side] = {"text": "\u202e界" * 2000, "more": 10**9}
    for side in ("chosen", "rejected"):
        long["tokens"][side] |= {"words": ["界界"] * 600, "values": [-1.234567e-05] * 600}
    drawn = {"columns": ["界" * 20] * 48, "effect": [[-1.234567e-05] * 48] * 40, "layers": list(range(40))}
    long["sweep"] = {"mode": "mean", "maps": [audit.shown[0]["sweep"]["maps"][0] | drawn] * 2}
    fields = {name: getattr(audit, name) for name in Audit.__dataclass_fields__}
    many = Audit(**{**fields, "shown": [long] * 10 + [{**long, "sweep": None}] * 20, "figures": audit.figures * 1000})
    assert len(render(many).encode()) < 5_000_000
    monkeypatch.setattr(MODULE, "LIMIT", 1000)
    with pytest.raises(ValueError, match="a page of less than 1000 bytes"):
        render(audit)


def test_the_page_of_a_kept_audit_is_the_same(page, audit, tmp_path):
    audit.save(tmp_path / "audit.json")
    assert render(Audit.load(tmp_path / "audit.json")) == page


def test_half_a_surrogate_is_replaced(audit):
    fields = {name: getattr(audit, name) for name in Audit.__dataclass_fields__}
    assert "a ?model" in render(Audit(**{**fields, "model": "a \ud800model"}))


@pytest.mark.parametrize("library", ["altair", "vl_convert"])
def test_a_missing_library_is_named_with_its_extra(audit, monkeypatch, library):
    MODULE._bundle.cache_clear()
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=r'pip install "rmfast\[audit\]"'):
        render(audit)

"""The README's and docs' Python snippets run, page by page from the top, on tiny models under the names they load."""

from __future__ import annotations

import re
from functools import partialmethod
from pathlib import Path

import names
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
CODE = {str(page.relative_to(ROOT)): page for page in PAGES if SNIPPET.search(page.read_text())}


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A folder with a checkpoint under each name that a page loads."""
    folder = tmp_path_factory.mktemp("hub")
    names.write_all(folder)
    return folder


@pytest.mark.parametrize("page", CODE)
def test_snippets_run(page, hub, monkeypatch, request):
    monkeypatch.chdir(hub)
    if "reward_lens" in page:
        pytest.importorskip("reward_lens")
    if "concepts.erase(" in CODE[page].read_text():
        pytest.importorskip("sklearn")
    if "integrations.trl" in CODE[page].read_text():
        theirs = pytest.importorskip("rmfast.integrations.trl")
        init = partialmethod(theirs.RewardConfig.__init__, **names.CPU)
        monkeypatch.setattr(theirs.RewardConfig, "__init__", init)
    if "ray.data" in CODE[page].read_text():
        request.addfinalizer(pytest.importorskip("ray").shutdown)
    text = names.here(CODE[page].read_text())
    scope = names.of(page)
    for found in SNIPPET.finditer(text):
        # As many empty lines in front as the page has: a traceback names the page's own line.
        code = "\n" * text[: found.start(1)].count("\n") + found[1]
        exec(compile(code, page, "exec"), scope)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    """On the repository's host, where mkdocs does not look."""
    found = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    made = {"benchmarks.md"}  # by the site's build
    assert [to for to in found if "://" not in to and to not in made and not (page.parent / to).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_their_options_exist(page):
    """`$ rmfast command --option` in a console block."""
    typer = pytest.importorskip("typer")
    from rmfast.cli import app

    commands = typer.main.get_command(app).commands
    for block in re.findall(r"^```console\n(.*?)^```", page.read_text(), re.M | re.S):
        for line in re.findall(r"^\$ rmfast (.*)$", block.replace("\\\n", " "), re.M):
            command, *words = line.split()
            options = {name for each in commands[command].params for name in (*each.opts, *each.secondary_opts)}
            given = {word.split("=")[0] for word in words if word.startswith("--")}
            assert given <= options | {"--help"}, line

"""Links from a page to a file of the repository outside of docs/ become links to it on the repository's host.

Where no `repo_url` is set they are left as text: a site that is opened from a folder has nothing to link to.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\[([^\]\n]+)\]\((\.\./[^)\s]*)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """mkdocs' hook: the page's text, before it becomes HTML."""
    root, folder = Path(config["docs_dir"]).parent, posixpath.dirname(page.file.src_uri)

    def link(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, found[2].split("#")[0]))
        if path.startswith("docs/"):
            return found[0]
        if path.startswith("..") or not (root / path).exists():
            raise ValueError(f"{page.file.src_uri}: no file {found[2]} in the repository")
        return f"[{found[1]}]({config['repo_url'].rstrip('/')}/blob/main/{path})" if config["repo_url"] else found[1]

    return _LINK.sub(link, markdown)

"""An audit as one HTML file that loads nothing: texts are escaped, and no script runs but the page's own.

The page's scripts are the only ones that its content security policy names, by their digests, and it may connect to
nothing: where a text were ever let through as markup, it could still do nothing.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rmfast.audit.charts import altair, charts_of
from rmfast.audit.data import Audit, Span

LIMIT = 5_000_000  # bytes of a page
_ROWS = 300  # of the table by subset, those of most pairs
_DRAWN = ("rewards", "tokens", "lens", "sweep")  # of a pair, by the page's script
_TEMPLATES = Path(str(resources.files("rmfast.audit"))) / "templates"


def render(audit: Audit) -> str:
    """The page: one HTML document of less than 5 MB, which loads nothing.

    Raises:
        ImportError: Altair or vl-convert is not installed (`pip install "rmfast[audit]"`).
        ValueError: the page would be larger.
    """
    charts = charts_of(audit)
    scripts = [_script(_bundle()), _script((_TEMPLATES / "page.js").read_text(encoding="utf-8"))]
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"share": _share, "signed": _signed, "figure": _figure, "short": _short}
    page = environment.get_template("page.html").render(
        audit=audit,
        figures=sorted(audit.figures, key=lambda row: -row["n"])[:_ROWS]
        if len(audit.figures) > _ROWS
        else audit.figures,
        accuracy=_over_all(audit),
        spearman=_of_length(audit),
        policy=_policy(scripts),
        style=Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        data={"charts": charts, "pairs": [{k: v for k, v in pair.items() if k in _DRAWN} for pair in audit.shown]},
        kinds={"wrong": "Most certain, and wrong", "right": "Most certain, and right", "close": "Least certain"},
    )
    page = page.encode("utf-8", "replace").decode()  # half a surrogate is no text
    if len(page.encode()) >= LIMIT:
        raise ValueError(f"Expected a page of less than {LIMIT} bytes, got {len(page.encode())}: show fewer pairs")
    return page


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and vega-embed in one script, of the versions that Altair writes for."""
    try:
        import vl_convert
    except ImportError as error:
        raise ImportError(f'audits need vl-convert-python (pip install "rmfast[audit]"): {error}') from error
    version = re.match(r"v(\d+\.\d+)", altair().SCHEMA_VERSION)
    assert version is not None
    # None, the default: their stub says that a snippet must be given.
    return vl_convert.javascript_bundle(None, vl_version=version[1])  # type: ignore[arg-type]


def _script(source: str) -> str:
    """A script as it can stand in HTML: nothing in it ends it, or is read as another character."""
    source = source.replace("\r\n", "\n").replace("\r", "\\r").replace("\0", "\\0")
    return re.sub("<(?=/script|script|!--)", r"\\x3c", source, flags=re.IGNORECASE)


def _policy(scripts: list[str]) -> str:
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    named = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {named}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _over_all(audit: Audit) -> Span:
    """The accuracy over all pairs: of one subset, its own."""
    rows = [row for row in audit.figures if row["measure"] == "accuracy"]
    return next((row for row in rows if row["subset"] == "all"), rows[0])


def _of_length(audit: Audit) -> Span | None:
    for row in audit.biases["rows"]:
        if (row["attribute"], row["measure"]) == ("length", "spearman"):
            return row["before"]
    return None


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}".replace("-", "−")


def _figure(figure: Span | None, kind: str = "share") -> Any:
    """A figure with its interval."""
    if figure is None or figure["value"] is None:
        return "–"
    show = {"share": _share, "signed": _signed, "short": _short}[kind]
    interval = f" [{show(figure['low'])}, {show(figure['high'])}]"
    return Markup('<span class="value">{}</span><span class="interval">{}</span>').format(
        show(figure["value"]), interval
    )

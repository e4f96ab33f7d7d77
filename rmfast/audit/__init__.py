"""One page that shows what a reward model does: collected as plain data, kept, and rendered as HTML."""

from __future__ import annotations

from rmfast.audit.collect import Settings, collect
from rmfast.audit.data import Audit
from rmfast.audit.kept import Kept
from rmfast.audit.render import render

__all__ = ["Audit", "Kept", "Settings", "collect", "render"]

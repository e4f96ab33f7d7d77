"""A reward server for OpenRLHF, verl, slime, TRL and one's own programs: `rmfast serve` (docs/serve.md).

`create_app` and `serve` need FastAPI and uvicorn; `remote_reward`, a client, needs nothing.
"""

from __future__ import annotations

from typing import Any

from rmfast.integrations.serve.client import remote_reward

__all__ = ["Limits", "create_app", "remote_reward", "serve"]

_HOMES = {"Limits": "app", "create_app": "app", "serve": "server"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "rmfast":
            raise
        raise ImportError(f'rmfast serve needs {error.name}: pip install "rmfast[serve]"') from error
    return getattr(home, name)

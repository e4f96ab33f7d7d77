"""Facts by which an audit can be repeated: model, texts, versions, commit and command."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import rmfast

if TYPE_CHECKING:
    from rmfast.reward_model import RewardModel

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "triton", "optuna", "altair")


def facts_of(rm: RewardModel) -> dict[str, list[list[str]]]:
    """Names and values under headings, all text."""
    config = getattr(rm.model, "config", None)
    weights = next(rm.model.parameters())
    model = [
        ["class", type(rm.model).__name__],
        ["fingerprint", rm.fingerprint],
        ["commit on the hub", str(getattr(config, "_commit_hash", None) or "a folder, or none said")],
        ["parameters", f"{sum(p.numel() for p in rm.model.parameters()):,}"],
        ["dtype", str(weights.dtype).removeprefix("torch.")],
        ["device", str(weights.device)],
        ["reads", f"pooling {rm.pooling!r}"],
    ]
    versions = [["rmfast", rmfast.__version__], ["rmfast commit", commit() or "not a checkout"]]
    versions.append(["python", platform.python_version()])
    for name in _PACKAGES:
        try:
            versions.append([name, importlib.metadata.version(name)])
        except importlib.metadata.PackageNotFoundError:
            continue
    versions.append(["machine", f"{platform.system()} {platform.machine()}"])
    return {"model": model, "runs": _runs(rm), "versions": versions}


def _runs(rm: RewardModel) -> list[list[str]]:
    """What `RewardModel.explain` says of what runs, without what doesn't."""
    lines = [line for line in str(rm.explain()).splitlines() if line and not line.startswith(" ")]
    said = [[name, rest.strip()] for name, _, rest in (line.partition(":") for line in lines)]
    ops: dict[str, list[str]] = {}
    for name, backend in said:
        if " on " in name:
            ops.setdefault(backend, []).append(name.partition(" on ")[0])
    others = [line for line in said if " on " not in line[0]]
    return others + [[backend, ", ".join(names)] for backend, names in ops.items()]


def commit() -> str | None:
    """The commit of rmfast's own checkout, with "+changes" where there are any; None where it is none."""
    root = Path(rmfast.__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an environment may lie inside of another project's checkout
        return None

    def output(*command: str) -> str:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        changed = output("git", "status", "--porcelain", "--untracked-files=no")
        return output("git", "rev-parse", "HEAD") + (" + changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None

"""Fast, exact reward-model scoring, per-token rewards and interventions.

>>> import rmfast
>>> rm = rmfast.load("path/to/reward-model")
>>> rm.score([("a prompt", "a response")])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rmfast.attribution import Attribution as Attribution
    from rmfast.backends import BackendError as BackendError
    from rmfast.backends import backend as backend
    from rmfast.backends import explain as explain
    from rmfast.comparison import Comparison as Comparison
    from rmfast.comparison import Estimate as Estimate
    from rmfast.comparison import compare as compare
    from rmfast.grids import PatchSweep as PatchSweep
    from rmfast.interventions import LWR as LWR
    from rmfast.interventions import DirectionRemoval as DirectionRemoval
    from rmfast.interventions import LengthPenalty as LengthPenalty
    from rmfast.interventions import NeuronClamp as NeuronClamp
    from rmfast.lens import Lens as Lens
    from rmfast.sae import SAE as SAE
    from rmfast.sae import SAEAttribution as SAEAttribution
    from rmfast.scoring import RewardModel as RewardModel
    from rmfast.scoring import load as load
    from rmfast.values import ResponseValues as ResponseValues

# Loaded at first use: `import rmfast` alone costs no import of torch or transformers.
_HOME = {
    "Attribution": "rmfast.attribution",
    "backend": "rmfast.backends",
    "BackendError": "rmfast.backends",
    "Comparison": "rmfast.comparison",
    "Estimate": "rmfast.comparison",
    "compare": "rmfast.comparison",
    "explain": "rmfast.backends",
    "DirectionRemoval": "rmfast.interventions",
    "Lens": "rmfast.lens",
    "LengthPenalty": "rmfast.interventions",
    "LWR": "rmfast.interventions",
    "NeuronClamp": "rmfast.interventions",
    "PatchSweep": "rmfast.grids",
    "ResponseValues": "rmfast.values",
    "RewardModel": "rmfast.scoring",
    "SAE": "rmfast.sae",
    "SAEAttribution": "rmfast.sae",
    "load": "rmfast.scoring",
}

__all__ = [
    "LWR",
    "SAE",
    "Attribution",
    "BackendError",
    "Comparison",
    "DirectionRemoval",
    "Estimate",
    "LengthPenalty",
    "Lens",
    "NeuronClamp",
    "PatchSweep",
    "ResponseValues",
    "RewardModel",
    "SAEAttribution",
    "__version__",
    "backend",
    "compare",
    "debias",
    "explain",
    "load",
    "losses",
    "ops",
]


def __getattr__(name: str):
    if name in ("debias", "losses", "ops"):
        return importlib.import_module(f"rmfast.{name}")
    if name in _HOME:
        if name == "explain":
            importlib.import_module("rmfast.ops")  # registers the ops that there are to explain
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'rmfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

"""Fast, exact reward-model scoring, per-token rewards and interventions.

>>> import rmfast
>>> rm = rmfast.load("path/to/reward-model")
>>> rm.score([("a prompt", "a response")])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from rmfast.backends import BackendError as BackendError
    from rmfast.backends import backend as backend
    from rmfast.backends import explain as explain
    from rmfast.debias.interventions import LWR as LWR
    from rmfast.debias.interventions import DirectionRemoval as DirectionRemoval
    from rmfast.debias.interventions import LengthPenalty as LengthPenalty
    from rmfast.debias.interventions import NeuronClamp as NeuronClamp
    from rmfast.heads.tokens import TokenHead as TokenHead
    from rmfast.interpret.attribution import Attribution as Attribution
    from rmfast.interpret.comparison import Comparison as Comparison
    from rmfast.interpret.comparison import Estimate as Estimate
    from rmfast.interpret.comparison import compare as compare
    from rmfast.interpret.lens import Lens as Lens
    from rmfast.interpret.sae import SAE as SAE
    from rmfast.interpret.sae_attribution import SAEAttribution as SAEAttribution
    from rmfast.patching.grid import PatchSweep as PatchSweep
    from rmfast.reward_model import RewardModel as RewardModel
    from rmfast.reward_model import load as load
    from rmfast.rewards.ensemble import Ensemble as Ensemble
    from rmfast.rewards.ensemble import EnsembleScores as EnsembleScores
    from rmfast.rewards.strength import Strength as Strength
    from rmfast.rewards.strength import strength as strength
    from rmfast.texts.inputs import InputError as InputError
    from rmfast.training.values import ResponseValues as ResponseValues

# Loaded at first use: `import rmfast` alone costs no import of torch or transformers.
_HOME = {
    "Attribution": "rmfast.interpret.attribution",
    "backend": "rmfast.backends",
    "BackendError": "rmfast.backends",
    "Comparison": "rmfast.interpret.comparison",
    "Estimate": "rmfast.interpret.comparison",
    "compare": "rmfast.interpret.comparison",
    "explain": "rmfast.backends",
    "InputError": "rmfast.texts.inputs",
    "DirectionRemoval": "rmfast.debias.interventions",
    "Ensemble": "rmfast.rewards.ensemble",
    "EnsembleScores": "rmfast.rewards.ensemble",
    "Lens": "rmfast.interpret.lens",
    "LengthPenalty": "rmfast.debias.interventions",
    "LWR": "rmfast.debias.interventions",
    "NeuronClamp": "rmfast.debias.interventions",
    "PatchSweep": "rmfast.patching.grid",
    "ResponseValues": "rmfast.training.values",
    "RewardModel": "rmfast.reward_model",
    "SAE": "rmfast.interpret.sae",
    "SAEAttribution": "rmfast.interpret.sae_attribution",
    "Strength": "rmfast.rewards.strength",
    "strength": "rmfast.rewards.strength",
    "TokenHead": "rmfast.heads.tokens",
    "load": "rmfast.reward_model",
}

__all__ = [
    "LWR",
    "SAE",
    "Attribution",
    "BackendError",
    "Comparison",
    "DirectionRemoval",
    "Ensemble",
    "EnsembleScores",
    "Estimate",
    "InputError",
    "LengthPenalty",
    "Lens",
    "NeuronClamp",
    "PatchSweep",
    "ResponseValues",
    "RewardModel",
    "SAEAttribution",
    "Strength",
    "TokenHead",
    "__version__",
    "backend",
    "compare",
    "debias",
    "evaluation",
    "explain",
    "heads",
    "load",
    "losses",
    "ops",
    "probes",
    "strength",
]


def __getattr__(name: str):
    if name in ("debias", "evaluation", "heads", "losses", "ops", "probes"):
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

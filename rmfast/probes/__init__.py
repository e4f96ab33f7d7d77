"""What a reward model likes beside the content: edits of one thing, on a user's own responses, with tests that hold."""

from rmfast.probes.distortion import AxisDistortion, Distortion, distortion
from rmfast.probes.edits import PROBES
from rmfast.probes.probe import Edit, Probe, insert, probe
from rmfast.probes.result import Probed
from rmfast.probes.statistics import Effect
from rmfast.probes.suite import run

__all__ = [
    "PROBES",
    "AxisDistortion",
    "Distortion",
    "Edit",
    "Effect",
    "Probe",
    "Probed",
    "distortion",
    "insert",
    "probe",
    "run",
]

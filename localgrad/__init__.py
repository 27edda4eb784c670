"""localgrad: learning rules for recurrent networks without backpropagation through time."""

from localgrad.cells.rate import RateCell
from localgrad.core.modules import from_nnx
from localgrad.core.network import Network
from localgrad.core.rule import Batch, LearningRule
from localgrad.diagnostics import Alignment, compare, summary
from localgrad.rules.backprop import bptt, tbptt
from localgrad.rules.eligibility import eprop, rflo
from localgrad.rules.influence import rtrl, snap
from localgrad.rules.readout import readout_only
from localgrad.train import evaluate, learn, reset

__all__ = [
    "Alignment",
    "Batch",
    "LearningRule",
    "Network",
    "RateCell",
    "bptt",
    "compare",
    "eprop",
    "evaluate",
    "from_nnx",
    "learn",
    "readout_only",
    "reset",
    "rflo",
    "rtrl",
    "snap",
    "summary",
    "tbptt",
]

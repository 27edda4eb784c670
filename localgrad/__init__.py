"""localgrad: learning rules for recurrent networks without backpropagation through time."""

from importlib import metadata

from localgrad.average import average
from localgrad.cells.attentive import SABCell
from localgrad.cells.decorrelated import DecorrelatedCell
from localgrad.cells.diagonal import LRUCell
from localgrad.cells.elementwise import ElementwiseLSTMCell
from localgrad.cells.leaky import LeakyCell
from localgrad.cells.ptncn import PTNCN
from localgrad.cells.rate import RateCell
from localgrad.cells.reservoir import ReservoirCell
from localgrad.cells.spiking import ALIFCell, LIFCell
from localgrad.cells.trace_unit import RTUCell
from localgrad.combine import mix
from localgrad.core.contract.rule import Batch, LearningRule
from localgrad.core.model.decorrelation import Decorrelation
from localgrad.core.model.linen import from_linen
from localgrad.core.model.network import Network
from localgrad.core.model.nnx_network import NNXNetwork, from_nnx
from localgrad.core.passes.rates import FiringRate
from localgrad.diagnostics import Alignment, compare, summary
from localgrad.guard import guard
from localgrad.losses import binary_cross_entropy, categorical_cross_entropy
from localgrad.ridge import fit_ridge
from localgrad.rules.backprop import bptt
from localgrad.rules.decorrelation import decorrelation, label_decorrelation
from localgrad.rules.deep import deep_eprop
from localgrad.rules.eligibility import eprop, rflo, snap
from localgrad.rules.force import force
from localgrad.rules.influence import rtrl
from localgrad.rules.kronecker import kf_rtrl, ok
from localgrad.rules.lra import lra
from localgrad.rules.modprop import modprop
from localgrad.rules.modulated import mdgl
from localgrad.rules.perturbation.forward import forward_gradient
from localgrad.rules.perturbation.nodes import activity_perturbation, node_perturbation
from localgrad.rules.perturbation.weights import pes, weight_perturbation
from localgrad.rules.readout import readout_only
from localgrad.rules.synthetic import dni
from localgrad.rules.truncated import tbptt
from localgrad.rules.uoro import uoro
from localgrad.train import evaluate, learn, reset_state

try:
    __version__ = metadata.version("localgrad")
except metadata.PackageNotFoundError:  # a clone on the path, not installed
    __version__ = "unknown"

__all__ = [
    "ALIFCell",
    "Alignment",
    "Batch",
    "DecorrelatedCell",
    "Decorrelation",
    "ElementwiseLSTMCell",
    "FiringRate",
    "LIFCell",
    "LRUCell",
    "LeakyCell",
    "LearningRule",
    "NNXNetwork",
    "Network",
    "PTNCN",
    "RTUCell",
    "RateCell",
    "ReservoirCell",
    "SABCell",
    "binary_cross_entropy",
    "activity_perturbation",
    "average",
    "bptt",
    "categorical_cross_entropy",
    "compare",
    "decorrelation",
    "deep_eprop",
    "dni",
    "eprop",
    "evaluate",
    "fit_ridge",
    "force",
    "forward_gradient",
    "from_linen",
    "from_nnx",
    "guard",
    "kf_rtrl",
    "label_decorrelation",
    "learn",
    "lra",
    "mdgl",
    "modprop",
    "mix",
    "node_perturbation",
    "ok",
    "pes",
    "readout_only",
    "reset_state",
    "rflo",
    "rtrl",
    "snap",
    "summary",
    "tbptt",
    "uoro",
    "weight_perturbation",
]

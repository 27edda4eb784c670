"""Learning dynamics of local rules in data-aligned linear recurrent networks.

Predicts, before any training, what BPTT, truncated BPTT and RFLO can learn in a linear network, how
fast, and where they stop. Everything is float64: `jax.config.update("jax_enable_x64", True)`.

Letters: M modes, L lags, T time steps, N units, I inputs, O outputs, E examples.

Reference:
    Williams, Payeur and Lajoie, "Dynamics and representation structure of local approximations to
    gradient-based learning in linear recurrent neural networks", 2026,
    https://arxiv.org/abs/2606.00243
"""

from localgrad.theory.endpoints import Endpoint as Endpoint
from localgrad.theory.endpoints import endpoint as endpoint
from localgrad.theory.endpoints import plateau as plateau
from localgrad.theory.flow import Trajectory as Trajectory
from localgrad.theory.flow import half_time as half_time
from localgrad.theory.flow import integrate as integrate
from localgrad.theory.flow import solve as solve
from localgrad.theory.invariants import conserved as conserved
from localgrad.theory.invariants import conserved_matrix as conserved_matrix
from localgrad.theory.modes import Endless as Endless
from localgrad.theory.modes import ModeRule as ModeRule
from localgrad.theory.modes import Modes as Modes
from localgrad.theory.modes import Task as Task
from localgrad.theory.modes import bptt as bptt
from localgrad.theory.modes import descent as descent
from localgrad.theory.modes import lag_weights as lag_weights
from localgrad.theory.modes import leaky as leaky
from localgrad.theory.modes import loss as loss
from localgrad.theory.modes import realisable as realisable
from localgrad.theory.modes import rflo as rflo
from localgrad.theory.modes import tbptt as tbptt
from localgrad.theory.modes import unleaky as unleaky
from localgrad.theory.networks import Bases as Bases
from localgrad.theory.networks import Weights as Weights
from localgrad.theory.networks import aligned as aligned
from localgrad.theory.networks import from_params as from_params
from localgrad.theory.networks import lagged_targets as lagged_targets
from localgrad.theory.networks import project as project
from localgrad.theory.networks import random_bases as random_bases
from localgrad.theory.networks import to_params as to_params
from localgrad.theory.networks import white_inputs as white_inputs
from localgrad.theory.rank import WeightChange as WeightChange
from localgrad.theory.rank import participation_ratio as participation_ratio
from localgrad.theory.rank import rank_bound as rank_bound
from localgrad.theory.rank import state_dimension as state_dimension
from localgrad.theory.rank import weight_change_rank as weight_change_rank
from localgrad.theory.shared_bases import Alignment as Alignment
from localgrad.theory.shared_bases import alignment as alignment
from localgrad.theory.shared_bases import lagged_correlations as lagged_correlations
from localgrad.theory.stationary import Limits as Limits
from localgrad.theory.stationary import Verdict as Verdict
from localgrad.theory.stationary import characteristic as characteristic
from localgrad.theory.stationary import convergence_rate as convergence_rate
from localgrad.theory.stationary import jacobian as jacobian
from localgrad.theory.stationary import limits as limits
from localgrad.theory.stationary import optimum as optimum
from localgrad.theory.stationary import verdict as verdict
from localgrad.theory.stops import BestDecay as BestDecay
from localgrad.theory.stops import Stop as Stop
from localgrad.theory.stops import stationary_points as stationary_points
from localgrad.theory.stops import suggest_decay as suggest_decay

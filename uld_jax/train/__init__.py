"""Training: the pure step, its state on a mesh, the loop, checkpoints and metrics."""

from uld_jax.train.checkpoint import Checkpoints, restore_params
from uld_jax.train.comparison import make_comparison, of_ids
from uld_jax.train.loop import fit, to_mesh
from uld_jax.train.metrics import MEASURED, MetricsWriter, read_metrics
from uld_jax.train.on_policy import OnPolicy
from uld_jax.train.optimizer import make_optimizer, make_schedule
from uld_jax.train.program import Program, adapt, make_program
from uld_jax.train.state import TrainState, init_state, param_shardings, state_shardings
from uld_jax.train.step import StepTeacher, gradients, train_step
from uld_jax.train.tracking import WandbRun, require_wandb

__all__ = [
    "MEASURED",
    "Checkpoints",
    "MetricsWriter",
    "OnPolicy",
    "Program",
    "StepTeacher",
    "TrainState",
    "WandbRun",
    "adapt",
    "fit",
    "gradients",
    "init_state",
    "make_comparison",
    "make_optimizer",
    "make_program",
    "make_schedule",
    "of_ids",
    "param_shardings",
    "read_metrics",
    "require_wandb",
    "restore_params",
    "state_shardings",
    "to_mesh",
    "train_step",
]

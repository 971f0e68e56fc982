"""Planning: a run's train step compiled from configs alone, for chips that are not there."""

from uld_jax.plan.abstract import AbstractStep, abstract_batch, abstract_step, read_configs
from uld_jax.plan.cuda import lower_for_cuda
from uld_jax.plan.hlo import Program, Traffic
from uld_jax.plan.measure import Plan, make_plan
from uld_jax.plan.report import lines, size, table, to_json
from uld_jax.plan.search import largest_batch, sweep
from uld_jax.plan.topology import CHIPS, Chip, Slice, get_slice

__all__ = [
    "CHIPS",
    "AbstractStep",
    "Chip",
    "Plan",
    "Program",
    "Slice",
    "Traffic",
    "abstract_batch",
    "abstract_step",
    "get_slice",
    "largest_batch",
    "lines",
    "lower_for_cuda",
    "make_plan",
    "read_configs",
    "size",
    "sweep",
    "table",
    "to_json",
]

"""Planning: a run's programs compiled from configs alone, for chips that are not there."""

from uld_jax.plan.abstract import AbstractStep, abstract_batch, abstract_step, read_configs
from uld_jax.plan.cuda import lower_for_cuda
from uld_jax.plan.hlo import Program, Traffic
from uld_jax.plan.jobs import JOBS, Job, answers_job, cache_job, train_job
from uld_jax.plan.measure import Plan, make_plans
from uld_jax.plan.report import lines, size, table, to_json
from uld_jax.plan.search import largest_batch, sweep
from uld_jax.plan.topology import CHIPS, Chip, Slice, get_slice

__all__ = [
    "CHIPS",
    "JOBS",
    "AbstractStep",
    "Chip",
    "Job",
    "Plan",
    "Program",
    "Slice",
    "Traffic",
    "abstract_batch",
    "abstract_step",
    "answers_job",
    "cache_job",
    "get_slice",
    "largest_batch",
    "lines",
    "lower_for_cuda",
    "make_plans",
    "read_configs",
    "size",
    "sweep",
    "table",
    "to_json",
    "train_job",
]

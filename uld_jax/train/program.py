"""A run's train step, jitted for its mesh, and all that it is given besides state and batch."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from uld_jax.config import RunConfig
from uld_jax.losses import Comparison
from uld_jax.models import Decoder, add_adapters, split_trained
from uld_jax.sharding import parameter_rules
from uld_jax.train.cost import StepFlops, step_flops
from uld_jax.train.features import with_projections
from uld_jax.train.optimizer import make_optimizer
from uld_jax.train.state import (
    TrainState,
    init_state,
    split_projections,
    state_shardings,
)
from uld_jax.train.step import Metrics, StepTeacher, train_step
from uld_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Program:
    """What does not change from step to step.

    Attributes:
        step: `train_step` of a state, which is given up, `teacher_params`, a batch and `frozen`;
            to be called where the mesh is set.
        fresh: The state that a run begins with, from the student's parameters.
        shardings: Of a state.
        graph: The student's.
        frozen: The student's parameters that are not trained.
        teacher_params: Each teacher's, None for one that is not part of the step.
        cost: A step's arithmetic, by the sizes of its batch.
    """

    step: Callable[..., tuple[TrainState, Metrics]]
    fresh: Callable[[nnx.State], TrainState]
    shardings: TrainState
    graph: Any
    frozen: tuple[nnx.State, ...]
    teacher_params: list[nnx.State | None]
    cost: Callable[[Batch], StepFlops]

    def student(self, params: nnx.State) -> Decoder:
        """The student with these parameters.

        Args:
            params: Those that are trained, of which it has its own.

        Returns:
            The model.
        """
        own, _ = split_projections(params)
        return nnx.merge(self.graph, own, *self.frozen)


def adapt(student: Decoder, config: RunConfig) -> None:
    """Gives the student the adapters that the config asks for, if any.

    Args:
        student: Changed in place.
        config: The run.

    Raises:
        UserError: Adapters for matrices that it does not have.

    Example:
        >>> from uld_jax.config import ModelConfig
        >>> from uld_jax.testing import tiny_config
        >>> student = Decoder(tiny_config(), rngs=nnx.Rngs(0))
        >>> adapt(student, RunConfig(ModelConfig(lora_rank=4, lora_targets="mlp.up")))
        >>> student.blocks.mlp.up_lora_a.shape
        (2, 32, 4)
    """
    own = config.student
    if own.lora_rank:
        add_adapters(
            student,
            rank=own.lora_rank,
            alpha=own.lora_alpha,
            targets=own.lora_targets.split(",") if own.lora_targets else (),
            seed=config.train.seed,
        )


def make_program(
    student: Decoder,
    teachers: Sequence[Decoder | None],
    config: RunConfig,
    *,
    steps: int,
    mesh: Mesh,
    comparisons: Sequence[Comparison | None] | None = None,
) -> tuple[Program, nnx.State]:
    """Puts a run's train step together; nothing is compiled yet.

    Args:
        student: What is trained.
        teachers: Models that read within the step; None for one whose signals are in the batches.
        config: The run.
        steps: How many it has.
        mesh: The student's device mesh.
        comparisons: By which each teacher is compared, see `make_comparison`; None for ULD.

    Returns:
        The program, and the parameters to begin with, which its first state takes over.

    Raises:
        ValueError: No comparisons where `loss.distance` is another.

    Example:
        >>> from uld_jax.sharding import make_mesh
        >>> from uld_jax.testing import tiny_config, tiny_gemma
        >>> student, teacher = (Decoder(c, rngs=nnx.Rngs(0)) for c in (tiny_config(), tiny_gemma()))
        >>> mesh = make_mesh(-1, 1, 1)
        >>> program, params = make_program(student, [teacher], RunConfig(), steps=10, mesh=mesh)
        >>> int(program.fresh(params).step)
        0
    """
    graph, params, frozen = split_trained(student)
    if comparisons is None:
        if config.loss.distance != "uld":
            raise ValueError(
                f"comparisons: expected one a teacher where loss.distance is "
                f"{config.loss.distance}, got None; see make_comparison"
            )
        comparisons = [None] * len(teachers)
    split = [(None, None) if teacher is None else nnx.split(teacher) for teacher in teachers]
    fixed = [
        StepTeacher(graph, share, comparison)
        for (graph, _), share, comparison in zip(
            split, config.teacher_shares, comparisons, strict=True
        )
    ]
    complete = functools.partial(
        with_projections,
        student=student.config,
        teachers=[None if teacher is None else teacher.config for teacher in teachers],
        config=config,
    )
    trained = jax.eval_shape(complete, params)
    tx = make_optimizer(config.optimizer, steps, trained)

    def fresh(params: nnx.State) -> TrainState:
        return init_state(complete(params), tx, config.train.seed)

    rules = parameter_rules(config.student.shard_parameters)
    shardings = state_shardings(jax.eval_shape(fresh, params), tx, mesh, rules)
    program = Program(
        step=jax.jit(
            functools.partial(train_step, student=graph, teachers=fixed, tx=tx, loss=config.loss),
            donate_argnums=0,
            out_shardings=(shardings, None),
        ),
        fresh=fresh,
        shardings=shardings,
        graph=graph,
        frozen=frozen,
        teacher_params=[params for _, params in split],
        cost=functools.partial(
            step_flops,
            student=student.config,
            teachers=[
                None if teacher is None or not config.loss.asks_teachers else teacher.config
                for teacher in teachers
            ],
            adapters=bool(frozen),
        ),
    )
    return program, params

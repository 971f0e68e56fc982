"""What a training run carries from step to step, and where it lies on the mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uld_jax.sharding import RULES, Rules, named_sharding


class Projection(nnx.Param):
    """A parameter that is trained beside the student and is no part of it."""


def split_projections(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Tells the student's parameters from those that are trained beside it.

    Args:
        params: All that are trained, as values, shapes, shardings or gradients.

    Returns:
        The student's, and the others, which `nnx.merge_state` puts together again.

    Example:
        >>> up, over = nnx.Param(jnp.ones(2)), Projection(jnp.ones(3))
        >>> own, beside = split_projections(nnx.State({"up": up, "projections": {"0": over}}))
        >>> list(own), list(beside)
        (['up'], ['projections'])
    """
    beside, own = nnx.split_state(params, Projection, ...)
    return own, beside


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The student in training.

    Attributes:
        step: i32[], steps taken.
        params: The student's parameters, and `Projection`s where features are distilled.
        opt_state: The optimizer's state.
        key: u32[2], the run's PRNG key data, for what is sampled during training.
    """

    step: jax.Array
    params: nnx.State
    opt_state: Any
    key: jax.Array


def init_state(params: nnx.State, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state around given parameters.

    Args:
        params: The student's parameters, loaded or random.
        tx: The optimizer.
        seed: Of the run's PRNG key.

    Returns:
        The state at step 0.
    """
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), key)


def param_shardings(params: nnx.State, mesh: Mesh, rules: Rules = RULES) -> nnx.State:
    """The NamedSharding of every parameter, by its logical axes.

    Args:
        params: Arrays or shapes.
        mesh: The device mesh.
        rules: The model's, see `uld_jax.sharding.parameter_rules`.

    Returns:
        The same tree with shardings as leaves.

    Raises:
        UserError: A mesh axis does not divide an array axis.
    """

    def place(path: tuple[Any, ...], p: nnx.Variable) -> NamedSharding:
        return named_sharding(mesh, p.get_metadata("axes"), p.shape, _name(path), rules)

    flat = [(path, p.replace(place(path, p))) for path, p in nnx.to_flat_state(params)]
    return nnx.from_flat_state(flat)


def state_shardings(
    state: TrainState, tx: optax.GradientTransformation, mesh: Mesh, rules: Rules = RULES
) -> TrainState:
    """The shardings of a whole state: moments in parts over fsdp, the rest replicated.

    Where the parameters are whole on each device of the fsdp axis, the compiler has each update its
    part of the moments, and gathers the parameters once a step (ZeRO-1).

    Args:
        state: The state, or its shapes.
        tx: The optimizer.
        mesh: The device mesh.
        rules: Of the parameters.

    Returns:
        A state with shardings as leaves.
    """
    params, moments = (param_shardings(state.params, mesh, own) for own in (rules, RULES))
    replicated = NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        state.opt_state,
        moments,
        transform_non_params=lambda _: replicated,
    )
    fields: Any = (replicated, params, opt_state, replicated)
    return TrainState(*fields)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))

"""Low-rank adapters (LoRA): W + alpha / rank · A · B, of which only A and B are trained."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from uld_jax.errors import UserError
from uld_jax.models.projection import LORA_A, LORA_B, SCALE, layer_matrices, matrix
from uld_jax.sharding import named_sharding

# A starts as torch.nn.Linear's weights do (and peft's A): uniform, at most 1 / sqrt(inputs).
_init_a = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=(0,))


def add_adapters(
    model: nnx.Module, *, rank: int, alpha: float, targets: Sequence[str] = (), seed: int = 0
) -> None:
    """Gives matrices adapters, in float32 and at first without effect: B is zero.

    Args:
        model: Changed in place; what it computes stays the same.
        rank: Columns of A and rows of B.
        alpha: The adapters' product counts alpha / rank times.
        targets: Matrices, such as "attention.query" or "mlp.up"; none for all of every layer.
        seed: Of A.

    Raises:
        UserError: A target that the model does not have, or a rank below 1.

    Example:
        >>> from uld_jax.models import Decoder
        >>> from uld_jax.testing import tiny_config
        >>> model = Decoder(tiny_config(), rngs=nnx.Rngs(0))
        >>> add_adapters(model, rank=4, alpha=8.0, targets=["mlp.up"])
        >>> model.blocks.mlp.up_lora_a.shape, model.blocks.mlp.up_lora_b.shape
        ((2, 32, 4), (2, 4, 48))

    Reference:
        Hu et al., arXiv 2106.09685.
    """
    if rank < 1:
        raise UserError(f"lora_rank must be at least 1 to add adapters: got {rank}")
    all_ = {path: (module, name) for path, module, name in layer_matrices(model)}
    short = {path: ".".join(path.split(".")[-2:]) for path in all_}
    absent = [target for target in targets if target not in short.values()]
    if absent:
        raise UserError(
            f"lora_targets: the model has no {', '.join(absent)}; "
            f"it has {', '.join(sorted(set(short.values())))}"
        )
    chosen = [path for path in all_ if not targets or short[path] in targets]
    for path, key in zip(chosen, jax.random.split(jax.random.key(seed), len(chosen)), strict=True):
        module, name = all_[path]
        _add_adapter(module, name, rank, key)
        module.lora_scale = alpha / rank


def _add_adapter(module: Any, name: str, rank: int, key: jax.Array) -> None:
    weight = getattr(module, name)
    layers, inputs, outputs = weight.get_metadata("axes")
    shapes = (*weight.shape[:2], rank), (weight.shape[0], rank, weight.shape[2])
    both_axes = (layers, inputs, "narrow"), (layers, "narrow", outputs)
    place, lies = None, getattr(weight[...], "sharding", None)  # which a traced array has not
    if isinstance(lies, NamedSharding):
        mesh: Any = lies.mesh
        place = tuple(named_sharding(mesh, axes) for axes in both_axes)
    a, b = jax.jit(
        lambda key: (_init_a(key, shapes[0], jnp.float32), jnp.zeros(shapes[1], jnp.float32)),
        out_shardings=place,
    )(key)
    setattr(module, name + LORA_A, nnx.LoRAParam(a, axes=both_axes[0]))
    setattr(module, name + LORA_B, nnx.LoRAParam(b, axes=both_axes[1]))


def split_trained(model: nnx.Module) -> tuple[Any, nnx.State, tuple[nnx.State, ...]]:
    """A model as its graph, the parameters to train, and those that stay as they are.

    Args:
        model: With adapters, or without.

    Returns:
        What `nnx.merge(graph, trained, *frozen)` makes the model of: with adapters they are what
        is trained, without them all parameters are, and none are frozen.

    Example:
        >>> from uld_jax.models import Decoder
        >>> from uld_jax.testing import tiny_config
        >>> model = Decoder(tiny_config(), rngs=nnx.Rngs(0))
        >>> split_trained(model)[2]
        ()
        >>> add_adapters(model, rank=4, alpha=8.0, targets=["mlp.up"])
        >>> list(split_trained(model)[1]["blocks"]["mlp"])
        ['up_lora_a', 'up_lora_b']
    """
    graph, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    if jax.tree.leaves(adapters):
        return graph, adapters, (rest,)
    return graph, rest, ()


def merged(model: Any) -> Any:
    """The same model in plain matrices, as other programs know it: for export.

    Args:
        model: With adapters or quantised matrices, or without; it stays as it is.

    Returns:
        W + alpha / rank · A · B for each adapted matrix; the model itself where it is plain.

    Example:
        >>> from uld_jax.models import Decoder
        >>> from uld_jax.testing import tiny_config
        >>> model = Decoder(tiny_config(), rngs=nnx.Rngs(0))
        >>> merged(model) is model
        True
    """
    graph, params = nnx.split(model)
    marks = (SCALE, LORA_A, LORA_B)
    if not any(str(path[-1]).endswith(marks) for path, _ in nnx.to_flat_state(params)):
        return model
    model = nnx.merge(graph, params, copy=True)
    tables = [(model, name) for name in ("embed", "head") if hasattr(model, name)]
    for module, name in [*((m, n) for _, m, n in layer_matrices(model)), *tables]:
        getattr(module, name).set_value(_merge(module, name))
        for mark in marks:
            if hasattr(module, name + mark):
                delattr(module, name + mark)
    return model


def _merge(module: Any, name: str) -> jax.Array:
    w = matrix(module, name)
    if not hasattr(module, name + LORA_A):
        return w
    a, b = (getattr(module, name + part)[...] for part in (LORA_A, LORA_B))
    update = jnp.matmul(a, b, precision="highest") * module.lora_scale
    return (w.astype(jnp.float32) + update).astype(w.dtype)

"""Whether a train step lowers for NVIDIA GPUs; nothing can be compiled for them without one."""

from collections.abc import Mapping
from typing import Any

import jax

from uld_jax.config import RunConfig
from uld_jax.plan.abstract import ModelConfig, abstract_mesh, abstract_step


def lower_for_cuda(
    config: RunConfig, made_of: Mapping[str, ModelConfig], devices: int
) -> dict[str, Any]:
    """Lowers the step as `jax.export` does.

    Attention is XLA's: cuDNN's kernel can be chosen on a machine that has cuDNN only.

    Args:
        config: The run.
        made_of: Its models.
        devices: GPUs.

    Returns:
        Bytes of each kind of argument on a GPU, FLOPs of a step on all, and the size of the
        program's text.

    Raises:
        UserError: A mesh axis does not divide an array axis.
    """
    mesh = abstract_mesh(config, devices)
    step = abstract_step(config, made_of, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = step.program.step.trace(*step.arguments)
        lowered = traced.lower(lowering_platforms=("cuda",))
    return {
        "platform": "cuda",
        "devices": devices,
        "mesh": dict(mesh.shape),
        "bytes": step.bytes_per_device(),
        "model_flops": step.program.cost(step.batch)._asdict(),
        "program_lines": lowered.as_text().count("\n"),
    }

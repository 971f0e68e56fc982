"""One typed, frozen configuration for a run: overrides, validation, files and JSON.

A config file defines `get_config()` and returns a `RunConfig`. `load` reads it, `apply_overrides`
sets single fields from the command line, and `resolve` reports every mistake at once.
"""

from uld_jax.config.convert import apply_overrides, differences, flatten, from_dict, to_dict
from uld_jax.config.files import load
from uld_jax.config.loss import LossConfig
from uld_jax.config.schema import (
    BaseModelConfig,
    DataConfig,
    EvalConfig,
    GenerateConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
)
from uld_jax.config.streaming import streaming_devices
from uld_jax.config.validation import resolve, validate

__all__ = [
    "BaseModelConfig",
    "DataConfig",
    "EvalConfig",
    "GenerateConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "TeacherConfig",
    "TrainConfig",
    "apply_overrides",
    "differences",
    "flatten",
    "from_dict",
    "load",
    "resolve",
    "streaming_devices",
    "to_dict",
    "validate",
]

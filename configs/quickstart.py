"""The paper's experiment in small, on real weights: ten minutes on two CPU cores.

Gemma-3-270M (vocabulary 262,144), shown one answered example, teaches SmolLM2-135M-Instruct
(vocabulary 49,152), shown none. launch/fetch_models.sh gets both.
"""

import os
from pathlib import Path

from uld_jax.config import (
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
)

CACHE = Path(os.environ.get("ULD_JAX_CACHE", Path.home() / ".cache" / "uld_jax"))


def get_config() -> RunConfig:
    """The run."""
    return RunConfig(
        teacher=TeacherConfig(
            source=str(CACHE / "models" / "gemma-3-270m-q4_k_m.gguf"),
            shots=1,
            max_length=640,
            max_new_tokens=16,
        ),
        student=ModelConfig(
            source=str(CACHE / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"), max_length=512
        ),
        data=DataConfig(train_examples=96, eval_examples=64, batch_size=8),
        loss=LossConfig(chunk_size=16),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        train=TrainConfig(epochs=1, checkpoint_every=6),
        eval=EvalConfig(batch_size=32, max_new_tokens=20),
    )

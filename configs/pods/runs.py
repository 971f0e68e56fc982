"""Runs for pods: `--config=configs/pods/runs.py:NAME`, with NAME one of RUNS.

A teacher of 70 billion parameters, in bfloat16 and sharded over all chips, beside a small student
whose parameters and moments stay float32. The mesh takes as many chips as there are; whether it
fits says `uld-jax plan --config=configs/pods/runs.py:llama --topology=v5e:16x16`.
"""

from typing import NamedTuple

from uld_jax.config import (
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
)
from uld_jax.errors import UserError


class Pair(NamedTuple):
    """Teacher and student.

    Attributes:
        teacher: Hugging Face id.
        student: Likewise.
        tensor: Shards of every matrix product, which divide the heads of both.
    """

    teacher: str
    student: str
    tensor: int


RUNS = {
    "llama": Pair("meta-llama/Llama-3.1-70B-Instruct", "meta-llama/Llama-3.2-1B", tensor=8),
    "qwen_to_gemma": Pair("Qwen/Qwen2.5-72B-Instruct", "google/gemma-2-2b", tensor=4),
}


def get_config(name: str = "llama") -> RunConfig:
    """The run of a name."""
    if name not in RUNS:
        raise UserError(f"configs/pods/runs.py:{name}: expected one of {sorted(RUNS)}")
    pair = RUNS[name]
    return RunConfig(
        teacher=TeacherConfig(
            source=pair.teacher,
            dtype="bfloat16",
            param_dtype="bfloat16",
            max_length=2048,
            max_new_tokens=256,
            batch_size=256,
        ),
        student=ModelConfig(source=pair.student, dtype="bfloat16", remat="full", max_length=2048),
        data=DataConfig(source="tfds:squad", batch_size=256, buckets=4),
        optimizer=OptimizerConfig(learning_rate=2e-5, schedule="cosine"),
        train=TrainConfig(epochs=3, checkpoint_every=200, log_every=10),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=pair.tensor),
        eval=EvalConfig(batch_size=256, max_new_tokens=64),
    )

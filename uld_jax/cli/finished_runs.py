"""The workdirs of finished runs, as `uld-jax report` compares them."""

import dataclasses
import json
from typing import Any

from uld_jax import config as configs
from uld_jax.config import LossConfig, RunConfig
from uld_jax.errors import UserError
from uld_jax.evaluation import Prediction, read_predictions
from uld_jax.files import locate

SEEDS = ("data.seed", "train.seed", "generate.seed")
# What may differ between runs that are compared: it changes how, not what is computed.
BESIDE = (
    *SEEDS,
    "data.data_dir",
    "data.manual_dir",
    "eval.batch_size",
    "eval.samples",
    "generate.shard_size",
    "teacher.batch_size",
    "teacher.devices",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.wandb_project",
)
# What decides a student's answers before training, but for the seed of its shots.
BEFORE = (
    *(f"student.{name}" for name in ("source", "dtype", "shots", "chat", "max_length")),
    *(f"data.{name}" for name in ("source", "eval_source", "eval_examples", "task", "titles")),
    "eval.max_new_tokens",
)


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        path: Its workdir.
        config: Its config.
        before: Its answers before training.
        predictions: Its answers after training.
        values: Its config by field.
    """

    path: str
    config: RunConfig
    before: list[Prediction]
    predictions: list[Prediction]
    values: dict[str, Any]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those that it was started with, in the order of `SEEDS`."""
        return tuple(self.values[name] for name in SEEDS)

    @property
    def shared(self) -> dict[str, Any]:
        """What a run without ULD must share with one that has it."""
        return {
            name: value
            for name, value in self.values.items()
            if name not in BESIDE
            and not name.startswith(("loss.", "mesh."))
            # Where a cache lies; `train` has made sure that it is of these answers.
            and not name.endswith(".cache")
        }

    @property
    def loss(self) -> tuple[tuple[str, Any], ...]:
        """The fields of its loss that change results."""
        names = (f.name for f in dataclasses.fields(LossConfig) if f.name != "chunk_size")
        return tuple((name, getattr(self.config.loss, name)) for name in names)

    @property
    def student(self) -> str:
        """Name of its student."""
        return short_name(self.config.student.source)

    @property
    def teacher(self) -> str:
        """Name of its teacher."""
        return short_name(self.config.teacher.source)

    @property
    def eval_source(self) -> str:
        """Where its held-out questions are from."""
        return self.config.data.eval_source or self.config.data.source

    @property
    def data(self) -> str:
        """Name of its data set, and how many questions of it were trained on if not all."""
        scheme, _, argument = self.eval_source.partition(":")
        examples = self.config.data.train_examples
        share = f", {examples} questions" if examples else ""
        return (short_name(argument) or scheme) + share


def read_run(path: str) -> FinishedRun:
    """Reads what a finished run has left in its workdir.

    Args:
        path: The workdir.

    Returns:
        The run.

    Raises:
        UserError: It is none, or has not ended.
    """
    workdir = locate(path)
    file = workdir / "config.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file, expected the workdir of a run")
    try:
        config = configs.from_dict(json.loads(file.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    after, before = (read_predictions(workdir, stage=stage) for stage in ("after", "before"))
    return FinishedRun(path, config, before, after, configs.flatten(config))


def short_name(source: str) -> str:
    """The last part of a path.

    Args:
        source: Of a model or a data set.

    Returns:
        Its name.

    Example:
        >>> short_name("EleutherAI/pythia-410m/")
        'pythia-410m'
    """
    return source.rstrip("/").rpartition("/")[2]

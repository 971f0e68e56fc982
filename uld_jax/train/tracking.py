"""Weights & Biases, for those who follow their runs there: the numbers of metrics.jsonl."""

import hashlib
import importlib
import importlib.util
import os
import tempfile
from collections.abc import Mapping
from typing import Any

from uld_jax.errors import UserError
from uld_jax.files import AnyPath, absolute


def require_wandb() -> None:
    """Checks that the package is there, before any work.

    Raises:
        UserError: It is not.
    """
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            "train.wandb_project: to send metrics to Weights & Biases needs wandb, which is not "
            "installed: pip install 'uld-jax[wandb]', or leave the project out"
        )


class WandbRun:
    """One run of a project; a resumed one goes on where it was.

    The key is WANDB_API_KEY or what `wandb login` has stored; WANDB_MODE=offline keeps all of it on
    this machine, for `wandb sync`.

    Args:
        project: Its name.
        workdir: Of the run, whose path decides the run's id.
        config: All settings, as JSON values.

    Raises:
        UserError: The package is missing, or nobody is logged in.
    """

    def __init__(self, project: str, workdir: AnyPath, config: Mapping[str, Any]) -> None:
        require_wandb()
        wandb: Any = importlib.import_module("wandb")
        where = os.fspath(absolute(workdir))
        try:
            self._run: Any = wandb.init(
                project=project,
                id=hashlib.sha256(where.encode()).hexdigest()[:16],
                name=workdir.name,
                config=dict(config),
                resume="allow",
                dir=os.environ.get("WANDB_DIR") or tempfile.gettempdir(),
                settings=wandb.Settings(silent=True),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"train.wandb_project={project}: {reason}; run `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error

    def __enter__(self) -> "WandbRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._run.finish(exit_code=0 if kind is None else 1)

    def log(self, group: str, values: Mapping[str, Any], *, step: int) -> None:
        """Sends numbers of a step.

        Args:
            group: What their names begin with: "train" or "eval".
            values: By name; a "step" among them is left out.
            step: The optimizer step.
        """
        named = {f"{group}/{name}": value for name, value in values.items() if name != "step"}
        self._run.log(named, step=step)

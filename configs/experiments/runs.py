"""What ULD is worth, and what else could be: `--config=configs/experiments/runs.py:NAME,VALUE`.

The quickstart's pair on SQuAD, 160 questions to learn from and 256 to be measured by: 20 to 30
minutes on two CPU cores. Of each NAME the values differ in one thing; `--config.loss.uld_weight=0`
is text distillation on the same answers, `--config.train.seed` and `--config.data.seed` give
another run to compare with, and `uld-jax report WORKDIR...` compares them.

=========== ================================== ====================================================
name        values                             what differs
=========== ================================== ====================================================
share       25, 50, 75, 100                    percent of the questions that are learned from
weight      0, 0.5, 1.5, 5                     lambda
temperature 0.5, 1, 2                          of student and teacher in ULD
calibration 0.5, 1, 2                          of the teacher alone: over-confident, as it is,
                                               under-confident
domain      squad, qed, fairytaleqa, pubmedqa  what it is measured by
distance    uld, kl, reverse_kl, jsd, hybrid,  from the teacher: ULD, over the tokens that both
            transport                          vocabularies have, both, or by what tokens say
features    hidden, attention                  what else of the teacher's last layer is learned
=========== ================================== ====================================================

The data come from their official places, or from `--config.data.manual_dir=DIR`.
"""

import dataclasses
from pathlib import Path
from typing import Any

from uld_jax.config import RunConfig, load
from uld_jax.errors import UserError

QUESTIONS = 160
Changes = dict[str, dict[str, Any]]
EXPERIMENTS: dict[str, dict[str, Changes]] = {
    "share": {
        f"{percent}": {"data": {"train_examples": QUESTIONS * percent // 100}}
        for percent in (25, 50, 75, 100)
    },
    "weight": {f"{weight:g}": {"loss": {"uld_weight": weight}} for weight in (0.0, 0.5, 1.5, 5.0)},
    "temperature": {
        f"{t:g}": {"loss": {"student_temperature": t, "teacher_temperature": t}}
        for t in (0.5, 1.0, 2.0)
    },
    "calibration": {f"{t:g}": {"loss": {"teacher_temperature": t}} for t in (0.5, 1.0, 2.0)},
    "domain": {
        name: {"data": {"eval_source": name}}
        for name in ("squad", "qed", "fairytaleqa", "pubmedqa")
    },
    "features": {
        "hidden": {"loss": {"hidden_weight": 1.0}},
        "attention": {"loss": {"attention_weight": 1.0, "attention_kind": "kl"}},
    },
    "distance": {
        name: {"loss": {"distance": name}}
        for name in ("uld", "kl", "reverse_kl", "jsd", "hybrid", "transport")
    },
}


def get_config(run: str = "") -> RunConfig:
    """One run of EXPERIMENTS."""
    name, _, value = run.partition(",")
    changes = EXPERIMENTS.get(name, {}).get(value)
    if changes is None:
        known = "; ".join(f"{name},{'|'.join(values)}" for name, values in EXPERIMENTS.items())
        raise UserError(
            f"configs/experiments/runs.py: expected runs.py:NAME,VALUE, of {known}; got {run!r}"
        )
    base = load(str(Path(__file__).parents[1] / "quickstart.py"))
    data = dataclasses.replace(
        base.data, source="squad", train_examples=QUESTIONS, eval_examples=256, buckets=4
    )
    config = dataclasses.replace(base, data=data)
    groups = {
        group: dataclasses.replace(getattr(config, group), **fields)
        for group, fields in changes.items()
    }
    return dataclasses.replace(config, **groups)

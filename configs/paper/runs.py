"""The paper's runs: `--config=configs/paper/runs.py:TEACHER,STUDENT,DATA_SET`, from the tables.

Boizard et al., arXiv 2402.12030: ULD as it is here, text distillation with
`--config.loss.uld_weight=0`. The settings are those of the released code: lambda 1.5, temperatures
1, AdamW with weight decay 0.1, one cycle up to a learning rate of 1e-6 (2e-6 in its job scripts),
5 epochs of batches of 16, seed 42. The teacher answers greedily with up to 150 tokens, of which the
first line counts. The student's prompt has no shots and no title; its answer ends with its
end-of-text token, and ULD leaves that position out.

Not as there: all of the teacher's answers are trained on and the last step is measured, where the
paper keeps 10 % of them to choose a checkpoint by; prompts have our wording; gradients are clipped
at a norm of 1.

The data come from their official places, or from `--config.data.manual_dir=DIR`.
"""

from uld_jax.config import (
    DataConfig,
    EvalConfig,
    GenerateConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
)
from uld_jax.errors import UserError

TEACHERS = {
    "llama": "meta-llama/Llama-2-7b-chat-hf",
    "mistral": "mistralai/Mistral-7B-Instruct-v0.2",
}
STUDENTS = {
    "opt-350m": "facebook/opt-350m",
    "pythia-160m": "EleutherAI/pythia-160m-deduped",
    "pythia-410m": "EleutherAI/pythia-410m-deduped",
    "pythia-1b": "EleutherAI/pythia-1b-deduped",
    "bloomz-560m": "bigscience/bloomz-560m",
    "mt0-base": "bigscience/mt0-base",
}
# Worked examples in the teacher's prompt.
SHOTS = {
    "squad": {"llama": 1, "mistral": 3},
    "qed": {"llama": 5, "mistral": 5},
    "fairytaleqa": {"llama": 2, "mistral": 4},
    "pubmedqa": {"llama": 3, "mistral": 3},
    "dialogsum": {"llama": 3, "mistral": 2},
}
# Whether the teacher's prompt tells an article's title, where a data set has titles.
TITLES = {"llama": "none", "mistral": "teacher"}
RUNS = [f"{t},{s},{d}" for t in TEACHERS for s in STUDENTS for d in SHOTS]
SEED = 42


def get_config(run: str = "") -> RunConfig:
    """One of RUNS."""
    if run not in RUNS:
        raise UserError(
            "expected configs/paper/runs.py:TEACHER,STUDENT,DATA_SET with a teacher of "
            f"{', '.join(TEACHERS)}, a student of {', '.join(STUDENTS)} and a data set of "
            f"{', '.join(SHOTS)}, got {run!r}"
        )
    teacher, student, data_set = run.split(",")
    return RunConfig(
        teacher=TeacherConfig(
            source=TEACHERS[teacher],
            dtype="bfloat16",
            param_dtype="bfloat16",
            shots=SHOTS[data_set][teacher],
            max_length=4096,
            max_new_tokens=150,
        ),
        student=ModelConfig(source=STUDENTS[student], dtype="bfloat16", max_length=1024),
        data=DataConfig(
            source=data_set, titles=TITLES[teacher], batch_size=16, buckets=4, seed=SEED
        ),
        loss=LossConfig(uld_weight=1.5, convention="official", skip_student_eos=True),
        optimizer=OptimizerConfig(
            learning_rate=1e-6,
            schedule="one_cycle",
            pct_start=0.1,
            div_factor=2.0,
            final_div_factor=5.0,
            weight_decay=0.1,
        ),
        train=TrainConfig(epochs=5, checkpoint_every=500, log_every=10, seed=SEED),
        mesh=MeshConfig(data=1, fsdp=-1),
        eval=EvalConfig(max_new_tokens=150),
        generate=GenerateConfig(temperature=0.0, stop="first_line"),
    )

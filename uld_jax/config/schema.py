"""The dataclasses of a run's configuration, each field with its default and its rule."""

import dataclasses
from typing import Any

from uld_jax.config import rules
from uld_jax.config.loss import LossConfig
from uld_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class BaseModelConfig:
    """A model, its precision, and how prompts are written for it.

    Attributes:
        source: Hugging Face id, directory of safetensors, or .gguf file.
        dtype: of the computation: float32 | bfloat16.
        param_dtype: of the stored parameters: float32 | bfloat16.
        remat: what the backward pass computes again besides norms, activations and attention's
            scores: none | dots (all but matrix products) | full | offload (as dots, the products
            kept in the host's memory).
        shots: worked examples in its prompt.
        chat: use of the tokenizer's chat template: auto (where there is one) | always | never.
        max_length: tokens; a longer prompt + answer is dropped and counted.
        shard_parameters: each device of mesh.fsdp holds a part of its parameters (ZeRO-3); false =
            all of them, faster where they fit, and a part of the optimizer's moments (ZeRO-1).
    """

    source: str = rules.field(
        "", "a Hugging Face id, a safetensors directory or a .gguf file", bool
    )
    dtype: str = rules.choice("float32", "bfloat16")
    param_dtype: str = rules.choice("float32", "bfloat16")
    remat: str = rules.choice("none", "dots", "full", "offload")
    shots: int = rules.at_least(0, 0)
    chat: str = rules.choice("auto", "always", "never")
    max_length: int = rules.at_least(1, 1024)
    shard_parameters: bool = True


@dataclasses.dataclass(frozen=True)
class ModelConfig(BaseModelConfig):
    """The student: a model, and which of its weights are trained.

    Attributes:
        lora_rank: rank of low-rank adapters, which alone are trained; 0 = train all weights.
        lora_alpha: the adapters' product counts lora_alpha / lora_rank times.
        lora_targets: matrices to adapt, with commas between them; empty = all of every layer.
    """

    lora_rank: int = rules.at_least(0, 0)
    lora_alpha: float = rules.positive(16.0)
    lora_targets: str = rules.names(
        *(f"attention.{name}" for name in ("query", "key", "value", "out")),
        *(f"cross.{name}" for name in ("query", "key", "value", "out")),
        *(f"mlp.{name}" for name in ("gate", "up", "down")),
    )


@dataclasses.dataclass(frozen=True)
class TeacherConfig(BaseModelConfig):
    """The teacher: a model, and how its signal and its answers are obtained.

    Attributes:
        share: its part of loss.uld_weight where there are several teachers, over the sum of all.
        mode: online (it runs on the student's devices) | stream (on devices of its own, some
            batches ahead of the student) | cache (its signals are read from a directory that
            `uld-jax cache` has written).
        quantize: hold its matrices in fewer bits: empty (as loaded) | int8 | int4.
        append_eos: end its answer with its end-of-sequence token.
        max_new_tokens: tokens; the longest answer that it generates (the paper's runs: 150).
        batch_size: prompts that it answers, or texts that it reads for a cache, at a time.
        cache: that directory, or gs:// or s3://BUCKET/PATH.
        cache_epsilon: of each distribution a cache leaves out probabilities of this sum at most;
            its error in ULD is at most 1.5 times as much.
        cache_cap: probabilities of a position; one that needs more has a larger error.
        cache_ids: likeliest tokens of a position kept by id, which loss.distance needs where it
            is a divergence; all others then count as one.
        cache_shard_size: examples a file; a kill loses the work on one.
        server: address of a server that runs it, such as http://host:8000/v1, for `uld-jax cache`;
            empty = it runs here.
        server_model: the name that the server knows it by.
        server_top_k: likeliest tokens asked for at each position; servers have a limit.
        server_key_env: environment variable that holds the server's key; empty = none.
        server_concurrency: requests under way at a time.
        server_retries: further attempts after one that failed, each after a longer wait.
        server_max_failed: share of the examples that may be left without an answer.
        devices: of each process, the last so many are its own where it streams; else 0.
        fsdp: shards of its parameters and of a batch on its own devices.
        tensor: shards of its matrix products on its own devices.
        stream_depth: batches that it is ahead of the student where it streams.
        stream_batch_size: rows, over all processes, that it then reads at a time; 0 = as many as
            the student does, data.batch_size / train.accumulation.
        stream_top_k: probabilities of each position that it then sends, the others being one mass,
            which bounds the loss's error (uld_error in the metrics); 0 = all, which is exact.
    """

    share: float = rules.positive(1.0)
    mode: str = rules.choice("online", "stream", "cache")
    quantize: str = rules.field("", "empty, int8 or int4", ("", "int8", "int4").__contains__)
    append_eos: bool = False
    max_new_tokens: int = rules.at_least(1, 32)
    batch_size: int = rules.at_least(1, 16)
    cache: str = ""
    cache_epsilon: float = rules.field(
        0.01, "a number from 0.0001 to 0.5", lambda value: 1e-4 <= value <= 0.5
    )
    cache_cap: int = rules.at_least(1, 16384)
    cache_ids: int = rules.at_least(0, 0)
    cache_shard_size: int = rules.at_least(1, 128)
    server: str = ""
    server_model: str = ""
    server_top_k: int = rules.at_least(1, 32)
    server_key_env: str = ""
    server_concurrency: int = rules.at_least(1, 4)
    server_retries: int = rules.at_least(0, 5)
    server_max_failed: float = rules.share(0.01)
    devices: int = rules.at_least(0, 0)
    fsdp: int = rules.at_least(1, 1)
    tensor: int = rules.at_least(1, 1)
    stream_depth: int = rules.at_least(1, 1)
    stream_batch_size: int = rules.at_least(0, 0)
    stream_top_k: int = rules.at_least(0, 0)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained and evaluated on.

    Attributes:
        source: training data: builtin, or a data set or file that `uld_jax.data` can read.
        eval_source: evaluation data; empty = the evaluation split of `source`.
        data_dir: where prepared data sets lie; empty = their default folder.
        manual_dir: folder with the files of a published data set; empty = download them.
        task: how items are put: auto (as the data set is) | qa | qa_generative | qa_medical |
            summary_dialogue.
        titles: which prompts tell the title of an item's article: none | teacher | both.
        train_examples: use the first so many; 0 = all.
        eval_examples: use the first so many; 0 = all.
        answers: the answers to train on: teacher (generated) | gold (the data set's).
        batch_size: examples in one optimizer step, over all devices and micro-batches.
        buckets: padded lengths a batch may have; each compiles its own step.
        seed: of the shuffling.
    """

    source: str = rules.field("builtin", "the name of a data set or a file", bool)
    eval_source: str = ""
    data_dir: str = ""
    manual_dir: str = ""
    task: str = rules.choice("auto", "qa", "qa_generative", "qa_medical", "summary_dialogue")
    titles: str = rules.choice("none", "teacher", "both")
    train_examples: int = rules.at_least(0, 0)
    eval_examples: int = rules.at_least(0, 0)
    answers: str = rules.choice("teacher", "gold")
    batch_size: int = rules.at_least(1, 8)
    buckets: int = rules.at_least(1, 1)
    seed: int = rules.at_least(0, 0)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    pct_start, div_factor, final_div_factor and weight_decay are the paper's, which are neither
    optax's nor PyTorch's defaults. The paper's learning rate is 1e-6 or 2e-6; 1e-4 suits small
    students. The one-cycle schedule starts at learning_rate / div_factor and ends at
    learning_rate / (div_factor * final_div_factor).

    Attributes:
        learning_rate: the highest that the schedule reaches.
        schedule: one_cycle | constant | cosine.
        pct_start: fraction of the steps in which a one-cycle rate rises.
        div_factor: of the one-cycle schedule, see above.
        final_div_factor: of the one-cycle schedule, see above.
        weight_decay: decoupled from the gradient, times the learning rate.
        b1: decay of the first moment, per step.
        b2: decay of the second moment, per step.
        eps: added to the root of the second moment.
        clip_norm: largest global gradient norm; 0 = no clipping.
    """

    learning_rate: float = rules.positive(1e-4)
    schedule: str = rules.choice("one_cycle", "constant", "cosine")
    pct_start: float = rules.fraction(0.1)
    div_factor: float = rules.at_least(1, 2.0)
    final_div_factor: float = rules.at_least(1, 5.0)
    weight_decay: float = rules.at_least(0, 0.1)
    b1: float = rules.share(0.9)
    b2: float = rules.share(0.999)
    eps: float = rules.positive(1e-8)
    clip_norm: float = rules.at_least(0, 1.0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The length of the run, and what it leaves behind.

    Attributes:
        epochs: passes over the training data.
        max_steps: optimizer steps after which to stop; 0 = all epochs.
        accumulation: micro-batches that one optimizer step adds up.
        checkpoint_every: optimizer steps between two checkpoints.
        keep_checkpoints: the newest so many are kept.
        log_every: optimizer steps between two lines of metrics.
        wandb_project: of Weights & Biases, which is sent the metrics; empty = none.
        profile_from: the first optimizer step that jax.profiler records; 0 = none.
        profile_steps: how many it records.
        max_nonfinite_steps: skipped steps in a row, their loss or gradient not finite, that end it.
        seed: of everything random but the data.
        on_policy_fraction: share of each batch's rows whose answer the student samples anew,
            before the step, and the teacher reads; they have ULD and no cross-entropy.
        on_policy_temperature: of the sampling.
        on_policy_tokens: the most that are sampled for one answer.
    """

    epochs: int = rules.at_least(1, 1)
    max_steps: int = rules.at_least(0, 0)
    accumulation: int = rules.at_least(1, 1)
    checkpoint_every: int = rules.at_least(1, 50)
    keep_checkpoints: int = rules.at_least(1, 2)
    log_every: int = rules.at_least(1, 1)
    wandb_project: str = ""
    profile_from: int = rules.at_least(0, 0)
    profile_steps: int = rules.at_least(1, 3)
    max_nonfinite_steps: int = rules.at_least(1, 5)
    seed: int = rules.at_least(0, 0)
    on_policy_fraction: float = rules.part(0.0)
    on_policy_temperature: float = rules.positive(1.0)
    on_policy_tokens: int = rules.at_least(1, 32)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one axis may be -1, which takes those that remain.

    Attributes:
        data: replicas, each with its part of the batch.
        fsdp: shards of parameters and optimizer state (student.shard_parameters says which), each
            with its part of the batch.
        tensor: shards of every matrix product.
        sequence: shards of every row's tokens, for rows too long for one device. Attention gathers
            the keys and values of whole rows; generation has rows of the batch on them instead.
        slices: groups of devices with a fast network (TPU slices, or hosts), between which it is
            slower; data spans them, and the other axes stay within one.
    """

    data: int = rules.axis(-1)
    fsdp: int = rules.axis(1)
    tensor: int = rules.axis(1)
    sequence: int = rules.axis(1)
    slices: int = rules.at_least(1, 1)

    @property
    def axes(self) -> dict[str, int]:
        """The size of each axis of the mesh."""
        return {name: getattr(self, name) for name in ("data", "fsdp", "sequence", "tensor")}

    def __str__(self) -> str:
        return " x ".join(f"{axis} {size}" for axis, size in self.axes.items())


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How the student is evaluated.

    Attributes:
        batch_size: prompts answered at a time.
        max_new_tokens: tokens; the longest answer.
        samples: answers shown beside their references.
    """

    batch_size: int = rules.at_least(1, 16)
    max_new_tokens: int = rules.at_least(1, 24)
    samples: int = rules.at_least(0, 5)


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How the teacher writes answers, for `uld-jax generate` and in `uld-jax train`.

    Attributes:
        split: whose questions `uld-jax generate` puts to it: train | eval.
        samples: answers to each question; `uld-jax train` has one.
        temperature: of the sampling; 0 = always the most likely token.
        top_k: sample from the k most likely tokens; 0 = from all.
        top_p: sample from the most likely tokens up to this mass.
        seed: of the sampling.
        stop: what the answer is: first_line (that is not blank) | strings (up to one of
            stop_strings) | none (all of it).
        stop_strings: a JSON list of texts.
        cut_answers: what becomes of answers that teacher.max_new_tokens cuts: keep | drop.
        shard_size: questions that are answered and then written; a kill loses no more.
    """

    split: str = rules.choice("train", "eval")
    samples: int = rules.at_least(1, 1)
    temperature: float = rules.at_least(0, 0.0)
    top_k: int = rules.at_least(0, 0)
    top_p: float = rules.field(1.0, "a number > 0 and <= 1", lambda value: 0 < value <= 1)
    seed: int = rules.at_least(0, 0)
    stop: str = rules.choice("first_line", "strings", "none")
    stop_strings: str = rules.texts()
    cut_answers: str = rules.choice("keep", "drop")
    shard_size: int = rules.at_least(1, 256)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that a run needs; each attribute is described in its own class.

    `extra_teachers` are taught from besides `teacher`, which alone writes answers.

    Example:
        >>> RunConfig(student=ModelConfig(source="gpt2")).loss.uld_weight
        1.5
    """

    student: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)
    extra_teachers: tuple[TeacherConfig, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.extra_teachers, tuple):
            found = type(self.extra_teachers).__name__
            raise UserError(
                f"RunConfig.extra_teachers: expected a tuple, got {found}; "
                "write extra_teachers=(TeacherConfig(...),)"
            )
        for name, value in self.groups().items():
            group = GROUPS["teacher" if name.startswith(EXTRA) else name]
            if type(value) is not group:
                raise UserError(
                    f"RunConfig.{name}: expected {group.__name__}, got {type(value).__name__}; "
                    f"write {group.__name__}(...)"
                )

    @property
    def teachers(self) -> tuple[TeacherConfig, ...]:
        """All of them, the one that writes answers first."""
        return (self.teacher, *self.extra_teachers)

    def teacher_groups(self) -> dict[str, TeacherConfig]:
        """The same by their path."""
        return {name: group for name, group in self.groups().items() if "teacher" in name}

    @property
    def teacher_shares(self) -> tuple[float, ...]:
        """Each teacher's part of loss.uld_weight; they add up to 1."""
        total = sum(teacher.share for teacher in self.teachers)
        return tuple(teacher.share / total for teacher in self.teachers)

    def groups(self) -> dict[str, Any]:
        """The groups of fields by their path, such as "teacher" or "extra_teachers.0"."""
        extra = {f"{EXTRA}{i}": teacher for i, teacher in enumerate(self.extra_teachers)}
        return {name: getattr(self, name) for name in GROUPS} | extra


EXTRA = "extra_teachers."
GROUPS: dict[str, Any] = {
    group.name: group.type for group in dataclasses.fields(RunConfig) if group.name != EXTRA[:-1]
}

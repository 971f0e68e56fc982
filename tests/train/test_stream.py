"""Training on what streaming teachers send: the same losses as online, and they read ahead."""

import dataclasses
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uld_jax.config import DataConfig, LossConfig, OptimizerConfig, RunConfig, TrainConfig
from uld_jax.data import Example, Side, encode_pairs, make_loader
from uld_jax.sharding import batch_shards, make_mesh, split_devices
from uld_jax.teacher import StreamedTeacher, StreamOptions
from uld_jax.testing import tiny_gemma, tiny_model, tiny_t5
from uld_jax.train import MEASURED, fit, param_shardings

EXAMPLES = [
    Example(str(n), "qa", f"Mill {n} grinds {what}.", f"What does mill {n} grind?", (what,), "")
    for n, what in enumerate(["wheat", "rye and oats", "corn", "7 sacks of barley"] * 6)
]
STEPS = 6
CONFIG = RunConfig(
    data=DataConfig(batch_size=8),
    loss=LossConfig(chunk_size=8),
    optimizer=OptimizerConfig(learning_rate=3e-2),
    train=TrainConfig(epochs=2, checkpoint_every=2),
)


def on_mesh(model, mesh):
    state = nnx.state(model)
    nnx.update(model, jax.device_put(state, param_shardings(state, mesh)))
    return model


class Setting:
    """Two models, and what they read."""

    def __init__(self, student=None, teacher=None):
        self.configs = student, teacher or tiny_gemma(kv_heads=2)
        self.student, self.teacher = self.models()
        sides = [
            Side(m.tokenizer, 256, append_eos=not n, start_id=getattr(m.config, "start_id", None))
            for n, m in enumerate((self.student, self.teacher))
        ]
        answers = {e.id: e.answers[0] for e in EXAMPLES}
        self.pairs, _ = encode_pairs(EXAMPLES, answers, student=sides[0], teachers=[sides[1]])

    def models(self):
        student, teacher = self.configs
        return tiny_model(student, seed=1), tiny_model(teacher, kind="metaspace", seed=2)

    def loader(self, mesh, config):
        return make_loader(
            self.pairs,
            batch_size=config.data.batch_size,
            epochs=config.train.epochs,
            seed=0,
            micro_batches=config.train.accumulation,
            groups=batch_shards(mesh),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def fit(self, workdir, *, student, teacher=None, config=CONFIG, progress=None, **options):
        """The metrics of a run; the teacher streams from its own mesh where it has one."""
        left, own = split_devices([int(np.prod(teacher or 0)) // jax.process_count()])
        mesh = make_mesh(*student, devices=left[: int(np.prod(student))], keep_order=True)
        model, taught = self.models()
        if teacher is None:
            teachers = [on_mesh(taught.model, mesh)]
        else:
            place = make_mesh(*teacher, devices=own, keep_order=True)
            chosen = {"depth": 1, "batch_size": 8, "chunk_size": 8, **options}
            teachers = [
                StreamedTeacher(
                    on_mesh(taught.model, place),
                    StreamOptions(**chosen),
                    mesh=place,
                    student_mesh=mesh,
                )
            ]
        given = {"mesh": mesh, "workdir": workdir, "progress": progress}
        fit(on_mesh(model.model, mesh), teachers, self.loader(mesh, config), config, **given)
        return rows_of(workdir)


def rows_of(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def assert_close(found, expected):
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for got, want in zip(found, expected, strict=True):
        for name in ("total", "cross_entropy", "uld", "ce_positions", "uld_positions"):
            assert got[name] == pytest.approx(want[name], abs=1e-5, rel=0), (got["step"], name)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


@pytest.fixture(scope="module")
def decoders():
    return Setting()


@pytest.fixture(scope="module")
def online(decoders, tmp_path_factory):
    """The run with the teacher beside the student, on the student's four devices."""
    rows = decoders.fit(tmp_path_factory.mktemp("online"), student=(4, 1, 1))
    assert len(rows) == STEPS
    assert rows[-1]["total"] < rows[0]["total"] - 0.5
    return rows


@pytest.fixture(scope="module")
def streamed(decoders, tmp_path_factory):
    """The same with the teacher on the other four."""
    workdir = tmp_path_factory.mktemp("streamed")
    decoders.fit(workdir, student=(4, 1, 1), teacher=(4, 1, 1))
    return workdir


def test_losses_are_those_of_online_mode(streamed, online):
    assert_close(rows_of(streamed), online)


def test_the_wait_for_the_teacher_is_told(streamed):
    rows = [json.loads(line) for line in (streamed / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert (row["teacher_tokens"], row["teacher_share"]) == (0, 0)
        parts = [row[f"{part}_seconds"] for part in ("input", "host", "teacher", "device")]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(row["seconds"], abs=3e-4)


@pytest.mark.parametrize(
    ("student", "teacher", "micro_batches", "options"),
    [
        ((4, 1, 1), (1, 1, 4), 1, {"depth": 2}),
        ((2, 1, 2), (2, 2, 1), 2, {"depth": 3, "batch_size": 4}),
        ((1, 2, 1), (2, 1, 2), 1, {"depth": 9}),
    ],
    ids=str,
)
def test_meshes_depths_and_accumulation(
    decoders, online, tmp_path, student, teacher, micro_batches, options
):
    train = dataclasses.replace(CONFIG.train, accumulation=micro_batches)
    config = dataclasses.replace(CONFIG, train=train)
    found = decoders.fit(tmp_path, student=student, teacher=teacher, config=config, **options)
    assert_close(found, online)


@pytest.mark.parametrize("depth", [2, 3])
def test_the_depth_changes_nothing(decoders, streamed, tmp_path, depth):
    found = decoders.fit(tmp_path, student=(4, 1, 1), teacher=(4, 1, 1), depth=depth)
    assert found == rows_of(streamed)


class Stopped(Exception):
    pass


def test_a_run_that_is_stopped_goes_on_as_if_nothing_had_been(decoders, streamed, tmp_path):
    """Batches that had been read ahead are read again."""
    run = {"student": (4, 1, 1), "teacher": (4, 1, 1), "depth": 3}

    def stop(step, steps, row):
        if step == 3:
            raise Stopped

    with pytest.raises(Stopped):
        decoders.fit(tmp_path, **run, progress=stop)
    # Whole as of step 2, with step 3 and what was sent for the steps after it lost.
    saved = tmp_path / "checkpoints" / "2" / "data" / "metadata"
    assert json.loads(saved.read_text()) == {"next_index": 2}
    resumed = []
    found = decoders.fit(tmp_path, **run, progress=lambda step, steps, row: resumed.append(step))
    assert resumed == [3, 4, 5, 6]
    assert found == rows_of(streamed)


def test_a_cut_signal_is_within_its_certified_error(decoders, online, tmp_path):
    train = dataclasses.replace(CONFIG.train, max_steps=1)
    config = dataclasses.replace(CONFIG, train=train)
    run = {"student": (4, 1, 1), "teacher": (4, 1, 1), "config": config, "top_k": 100}
    (row,) = decoders.fit(tmp_path, **run)
    error = json.loads((tmp_path / "metrics.jsonl").read_text())["uld_error"]
    assert row["cross_entropy"] == pytest.approx(online[0]["cross_entropy"], abs=1e-5)
    assert 1e-4 < abs(row["uld"] - online[0]["uld"]) <= error < 1


@pytest.mark.slow
def test_an_encoder_decoder_streams(tmp_path):
    setting = Setting(tiny_t5(family="t5", tied=True, scaled_head=True), tiny_t5())
    train = dataclasses.replace(CONFIG.train, max_steps=2)
    config = dataclasses.replace(CONFIG, train=train)
    expected = setting.fit(tmp_path / "online", student=(4, 1, 1), config=config)
    found = setting.fit(
        tmp_path / "stream", student=(4, 1, 1), teacher=(2, 1, 2), config=config, batch_size=4
    )
    assert_close(found, expected)


class Watch:
    """Counts what each model has begun to read, and holds the student back."""

    def __init__(self, depth):
        self.depth = depth
        self.taught = self.trained = 0
        self.ahead = []
        self.changed = threading.Condition()

    def teacher_reads(self, zero):
        with self.changed:
            self.taught += 1
            self.changed.notify_all()
        return zero

    def student_reads(self, zero):
        """The step is in progress until the teacher reads as far ahead as it may."""
        with self.changed:
            self.trained += 1
            goal = min(self.trained + self.depth, STEPS)
            self.changed.wait_for(lambda: self.taught >= goal, timeout=20)
            self.ahead.append(self.taught - self.trained)
        return zero


def watched(loaded, see):
    """The model, calling a function of 0 when it begins to read, and adding its value to tokens."""

    class Watched(type(loaded.model)):
        def hidden(self, tokens_BT, **inputs):
            zero = jnp.zeros((), tokens_BT.dtype)
            seen = jax.pure_callback(see, jax.ShapeDtypeStruct((), zero.dtype), zero)
            return super().hidden(tokens_BT + seen, **inputs)

    return dataclasses.replace(loaded, model=Watched(loaded.config, rngs=nnx.Rngs(3)))


@pytest.mark.parametrize("depth", [1, 2])
def test_the_teacher_reads_the_next_batches_while_the_student_trains(
    decoders, tmp_path, monkeypatch, depth
):
    watch = Watch(depth)
    student, teacher = decoders.models()
    models = watched(student, watch.student_reads), watched(teacher, watch.teacher_reads)
    monkeypatch.setattr(decoders, "models", lambda: models)
    # With metrics at the end alone, nothing but the depth holds the teacher back.
    train = dataclasses.replace(CONFIG.train, log_every=STEPS, checkpoint_every=STEPS)
    config = dataclasses.replace(CONFIG, train=train)
    # On CPUs, jax waits for a program on one device that calls back, and of the programs on several
    # devices it runs one at a time, whatever the devices.
    shapes = {"student": (2, 1, 1), "teacher": (1, 1, 1)}
    decoders.fit(tmp_path, **shapes, config=config, depth=depth)
    assert watch.ahead == [min(depth, STEPS - step) for step in range(1, STEPS + 1)]


def test_on_policy_rows_are_refused(decoders, tmp_path):
    left, own = split_devices([4])
    mesh, place = make_mesh(4, 1, 1, devices=left), make_mesh(4, 1, 1, devices=own)
    options = StreamOptions(depth=1, batch_size=8)
    stream = StreamedTeacher(decoders.teacher.model, options, mesh=place, student_mesh=mesh)
    student, loader = decoders.student.model, decoders.loader(mesh, CONFIG)
    with pytest.raises(ValueError, match="on_policy: expected None where a teacher streams"):
        fit(student, [stream], loader, CONFIG, mesh=mesh, workdir=tmp_path, on_policy=object())

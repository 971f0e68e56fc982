"""`uld-jax report` on workdirs as `train` leaves them."""

import csv
import dataclasses
import json
import shutil

import matplotlib.image
import numpy as np
import pytest
import scipy.stats

from uld_jax import config as configs
from uld_jax.config import (
    DataConfig,
    EvalConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
)
from uld_jax.evaluation import per_example

QUESTIONS = 50
RUN = RunConfig(
    student=ModelConfig(source="EleutherAI/pythia-410m-deduped"),
    teacher=TeacherConfig(source="meta-llama/Llama-2-7b-chat-hf"),
    data=DataConfig(source="tfds:squad"),
)


def answers(right, *, first=0):
    """Answers of which so many are right, and some others half right."""
    rows = []
    for i in range(first, first + QUESTIONS):
        text = f"red {i}" if i - first < right else ("red" if i % 3 else "none")
        row = {"id": f"q{i}", "question": "?", "references": [f"red {i}"], "prediction": text}
        rows.append(row)
    return rows


def workdir(root, name, *, right, weight, seed=0, config=RUN, first=0, before=5, **loss):
    """A finished run with so many right answers after training, and so many before it."""
    config = dataclasses.replace(
        config,
        loss=LossConfig(uld_weight=weight, **loss),
        train=TrainConfig(seed=seed),
    )
    path = root / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps(configs.to_dict(config)))
    for stage, count in (("before", before), ("after", right)):
        found = {"scores": {}, "answers": answers(count, first=first), "too_long": 0}
        (path / f"{stage}.json").write_text(json.dumps(found))
    return path


def f1(right):
    return np.array([per_example(r["prediction"], r["references"])["f1"] for r in answers(right)])


def rows_of(output, kind="distilled"):
    with (output / "report.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["kind"] == kind]


def test_seeds_are_averaged_and_compared_example_by_example(uld, tmp_path):
    # Shots are drawn by the seed, so each seed has a cache of its own.
    cached = dataclasses.replace(RUN, teacher=dataclasses.replace(RUN.teacher, cache="signals-1"))
    runs = [
        workdir(tmp_path, "text0", right=20, weight=0.0),
        workdir(tmp_path, "uld0", right=30, weight=1.5),
        workdir(tmp_path, "text1", right=22, weight=0.0, seed=1, config=cached),
        workdir(tmp_path, "uld1", right=25, weight=1.5, seed=1, config=cached),
    ]
    output = tmp_path / "report"
    result = uld("report", *runs, f"--output={output}", "--resamples=4000")
    assert (result.status, result.err) == (0, "")
    rows = {row["metric"]: row for row in rows_of(output)}
    assert len(rows) == 8
    row = rows["f1"]
    text, ours = (f1(20) + f1(22)) / 2, (f1(30) + f1(25)) / 2
    assert float(row["text_distillation"]) == pytest.approx(text.mean())
    assert float(row["uld"]) == pytest.approx(ours.mean())
    assert float(row["difference"]) == pytest.approx((ours - text).mean())
    by_seed = [float(x) for x in row["differences_by_seed"].split()]
    assert by_seed == pytest.approx([(f1(30) - f1(20)).mean(), (f1(25) - f1(22)).mean()], rel=1e-5)
    interval = scipy.stats.bootstrap(
        (ours - text,), np.mean, method="percentile", n_resamples=4000, rng=0
    ).confidence_interval
    assert (float(row["low"]), float(row["high"])) == pytest.approx(tuple(interval), rel=0.06)
    assert (row["seeds"], row["examples"]) == ("2", "50")
    assert (row["teacher"], row["student"], row["data"]) == (
        "Llama-2-7b-chat-hf",
        "pythia-410m-deduped",
        "squad",
    )
    markdown = (output / "report.md").read_text()
    cell = f"{text.mean():.2f} → {ours.mean():.2f} ({(ours - text).mean():+.2f}, "
    assert cell in markdown
    assert "| pythia-410m-deduped | λ 1.5 |" in markdown
    assert f"{text.mean():.2f} → {ours.mean():.2f}" in result.out
    image = matplotlib.image.imread(output / "report.png")
    blue = np.abs(image[..., :3] - np.array([0, 0x72, 0xB2]) / 255).max(axis=-1) < 0.02
    assert blue.sum() > 50


def test_published_figures_stand_beside(uld, shared, tmp_path):
    other = dataclasses.replace(RUN, data=DataConfig(source="tfds:qed"))
    part = dataclasses.replace(RUN, data=DataConfig(source="tfds:squad", train_examples=500))
    runs = [
        workdir(tmp_path, f"{name}{weight}", right=20 + int(weight), weight=weight, config=config)
        for name, config in (("squad", RUN), ("qed", other), ("part", part))
        for weight in (0.0, 1.5)
    ]
    output = tmp_path / "report"
    published = shared / "published_scores.csv"
    result = uld("report", *runs, f"--output={output}", f"--published={published}")
    assert (result.status, result.err) == (0, "")
    found = {
        row["data"]: (row["published_text_distillation"], row["published_uld"])
        for row in rows_of(output)
        if row["metric"] == "f1"
    }
    # PUBLISHED.md, Llama to pythia-410m; a part of the questions is not what was published.
    assert found == {
        "squad": ("71.39", "74.14"),
        "qed": ("47.04", "49.15"),
        "squad, 500 questions": ("", ""),
    }
    lines = (output / "report.md").read_text().splitlines()
    assert any("squad | qed | squad, 500 questions |" in line for line in lines)
    assert "|  |  | published | 71.39 → 74.14 (+2.75) | 47.04 → 49.15 (+2.11) |  |" in lines


def test_each_loss_has_its_line_against_the_same_run_without_uld(uld, tmp_path):
    runs = [
        workdir(tmp_path, "text", right=20, weight=0.0),
        workdir(tmp_path, "a", right=25, weight=1.5),
        workdir(tmp_path, "b", right=30, weight=0.5, student_temperature=2.0),
    ]
    # Neither devices nor batches of the evaluation make a comparison unfair.
    config = json.loads((runs[2] / "config.json").read_text())
    config["mesh"] = dataclasses.asdict(MeshConfig(data=1, fsdp=2))
    config["eval"]["batch_size"] = EvalConfig().batch_size + 1
    (runs[2] / "config.json").write_text(json.dumps(config))
    output = tmp_path / "report"
    result = uld("report", *runs, f"--output={output}", "--metric=rougeL")
    assert (result.status, result.err) == (0, "")
    found = {
        (row["uld_weight"], row["other_settings"])
        for row in rows_of(output)
        if row["metric"] == "rougeL"
    }
    assert found == {("1.5", ""), ("0.5", "student_temperature=2.0")}
    assert "# Text distillation → ULD: rougeL" in (output / "report.md").read_text()


def test_what_cannot_be_compared_is_one_line(uld, tmp_path):
    text = workdir(tmp_path, "text", right=20, weight=0.0)
    ours = workdir(tmp_path, "uld", right=20, weight=1.5)
    seed = workdir(tmp_path, "seed", right=20, weight=1.5, seed=7)
    others = workdir(tmp_path, "others", right=20, weight=0.0, seed=7, first=1)
    bare = tmp_path / "bare"
    shutil.copytree(ours, bare)
    (bare / "after.json").unlink()
    columns = tmp_path / "columns.csv"
    columns.write_text("student,f1\ns,1\n")
    number = tmp_path / "number.csv"
    head = "kind,student,dataset,teacher,distil_factor,data_fraction,f1"
    number.write_text(f"{head}\ndistilled,s,d,t,1.5,1.0,high\n")
    for flags, expected in (
        ([tmp_path / "no"], "no/config.json: no such file, expected the workdir of a run"),
        ([bare], "bare/after.json: no such file, expected the answers after training"),
        ([text], "none of the runs has loss.uld_weight > 0"),
        ([ours], "expected a run with loss.uld_weight=0 that is otherwise the same, there is none"),
        ([text, seed], f"in the nearest, {text}, train.seed is 0 and 7"),
        ([seed, others], "expected the same examples as"),
        ([text, ours, ours], "the same config and seeds, expected each run once"),
        ([text, text, ours], "the same config and seeds, expected one run with λ = 0"),
        ([text, ours, "--published=no.csv"], "--published=no.csv: no such file"),
        ([text, ours, f"--published={columns}"], "columns kind, dataset, teacher, distil_factor,"),
        ([text, ours, f"--published={number}"], "number.csv:2: expected numbers"),
        ([text, ours, "--confidence=2"], "--confidence=2.0: expected between 0 and 1"),
    ):
        result = uld("report", *flags, f"--output={tmp_path / 'report'}")
        assert (result.status, result.err.count("\n")) == (2, 1), flags
        assert expected in result.err
    assert not (tmp_path / "report").exists()


@pytest.mark.slow
def test_runs_that_were_trained(uld, tiny, trained, tmp_path):
    text, output = tmp_path / "text", tmp_path / "report"
    flags = [f"--workdir={text}", "--config.loss.uld_weight=0"]
    assert uld("train", tiny.config, *flags).status == 0
    assert uld("report", text, trained, f"--output={output}").status == 0
    for row in rows_of(output):
        for name, run in (("text_distillation", text), ("uld", trained)):
            scores = json.loads((run / "after.json").read_text())["scores"]
            assert float(row[name]) == pytest.approx(scores[row["metric"]], abs=1e-9)

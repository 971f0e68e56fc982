"""Every config in configs/ trains, with tiny models and little data in place of its own."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers

from uld_jax import config as configs
from uld_jax import models
from uld_jax.data import load_examples
from uld_jax.errors import UserError
from uld_jax.testing import tiny_model, tiny_t5, toy_tokenizer
from uld_jax.train import read_metrics

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PAPER = runpy.run_path(str(CONFIGS / "paper" / "runs.py"))
# FILE.py or FILE.py:ARGUMENT; of the paper's runs each data set, student family and teacher.
SHIPPED = [
    "quickstart.py",
    "paper/runs.py:mistral,opt-350m,squad",
    "pods/runs.py:llama",
    "experiments/runs.py:distance,hybrid",
]
SLOW = [
    "paper/runs.py:llama,mt0-base,pubmedqa",
    "paper/runs.py:mistral,pythia-410m,qed",
    "paper/runs.py:mistral,bloomz-560m,fairytaleqa",
    "paper/runs.py:llama,pythia-160m,dialogsum",
    "pods/runs.py:qwen_to_gemma",
    "experiments/runs.py:distance,kl",
    "experiments/runs.py:calibration,2",
    "experiments/runs.py:features,attention",
]
# Published shots of SQuAD, QED, FairytaleQA, PubMedQA and DIALOGSum.
SHOTS = {"llama": (1, 5, 2, 3, 3), "mistral": (3, 5, 4, 3, 2)}
SMALL = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 4}
FAMILIES = {
    "opt": lambda: transformers.OPTConfig(
        **SMALL,
        ffn_dim=48,
        word_embed_proj_dim=16,
        num_hidden_layers=2,
        do_layer_norm_before=False,
        max_position_embeddings=2048,
    ),
    "pythia": lambda: transformers.GPTNeoXConfig(
        **SMALL, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=2048
    ),
    "bloomz": lambda: transformers.BloomConfig(vocab_size=300, hidden_size=32, n_head=4, n_layer=2),
}


@pytest.fixture(scope="module")
def student_of(tiny, tmp_path_factory):
    """The directory of a tiny model of the family that a student's name begins with; "" for any."""
    root = tmp_path_factory.mktemp("students")

    def make(name):
        if not name:
            return tiny.student
        family = name.partition("-")[0]
        directory = root / family
        if family == "mt0":
            models.save_pretrained(tiny_model(tiny_t5(), seed=3), directory)
        elif not directory.exists():
            torch.manual_seed(0)
            config = FAMILIES[family]()
            config.eos_token_id, config.pad_token_id, config.bos_token_id = 2, 0, 1
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
            toy_tokenizer().save_pretrained(directory)
        return directory

    return make


def test_all_are_here():
    assert {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.py")} == {
        name.partition(":")[0] for name in SHIPPED
    }


@pytest.mark.parametrize("name", SHIPPED + SLOW)
@pytest.mark.parametrize("devices", [1, 8])
def test_a_shipped_config_resolves(name, devices):
    config = configs.load(f"{CONFIGS / name}")
    if config.mesh.tensor > devices:
        pytest.skip(f"its tensor axis is {config.mesh.tensor} devices")
    assert configs.resolve(config, device_count=devices) is config


@pytest.mark.parametrize(
    "name", [*SHIPPED, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_shipped_config_takes_two_steps(tiny, published, student_of, uld, tmp_path, name):
    given = configs.load(f"{CONFIGS / name}")
    argument = name.partition(":")[2]
    small = {
        "student.source": student_of(argument.split(",")[1] if name.startswith("paper/") else ""),
        "teacher.source": tiny.root / "teacher",
        "data.source": f"jsonl:{tiny.root / 'qa.jsonl'}",
        "data.data_dir": tiny.root / "tfds",
        "data.batch_size": 8,
        "data.buckets": 1,
        "data.train_examples": 0,
        "teacher.max_new_tokens": 4,
        "teacher.batch_size": 8,
        "eval.batch_size": 8,
        "eval.max_new_tokens": 4,
        "train.epochs": 2,
        "train.max_steps": 2,
        # Those of the tiny models; the rest of the mesh is the config's.
        "mesh.tensor": 2 if given.mesh.tensor > 1 else 1,
    }
    if name.startswith("paper/"):
        small |= {"data.source": given.data.source, "data.manual_dir": published}
        # Prepared beforehand, so that no command prints the notice of a first use.
        options = {"data_dir": small["data.data_dir"], "manual_dir": published}
        load_examples(given.data.source, "train", **options)
    workdir = tmp_path / "run"
    flags = [f"--config.{path}={value}" for path, value in small.items()]
    result = uld("train", f"--config={CONFIGS / name}", f"--workdir={workdir}", *flags)
    assert (result.status, result.err) == (0, "")
    rows = read_metrics(workdir)
    assert rows[-1]["step"] == 2
    assert rows[-1]["skipped_steps"] == 0
    assert (workdir / "student" / "model.safetensors").is_file()
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["teacher"]["shots"] == given.teacher.shots


@pytest.mark.slow
def test_transport_takes_two_steps_on_one_device(tiny, pod, tmp_path):
    pytest.importorskip("ott", reason="transport needs the extra 'ot'")
    config = f"--config={CONFIGS}/experiments/runs.py:distance,transport"
    small = {
        "student.source": tiny.student,
        "teacher.source": tiny.root / "teacher",
        "data.source": f"jsonl:{tiny.root / 'qa.jsonl'}",
        "data.data_dir": tiny.root / "tfds",
        "teacher.max_new_tokens": 4,
        "train.max_steps": 2,
    }
    flags = [f"--config.{path}={value}" for path, value in small.items()]
    command = [sys.executable, "-m", "uld_jax.cli.main", "train", config, *flags]
    run = pod.popen(
        [*command, f"--workdir={tmp_path / 'run'}"],
        log=tmp_path / "log",
        env=pod.environment(XLA_FLAGS=""),
    )
    assert run.wait(timeout=300) == 0, (tmp_path / "log").read_text()[-3000:]
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["step"] == 2
    assert 0 < rows[-1]["transport"] < 1


def test_every_experiment_resolves_and_changes_what_it_says():
    experiments = runpy.run_path(str(CONFIGS / "experiments" / "runs.py"))["EXPERIMENTS"]
    plain = configs.flatten(configs.load(f"{CONFIGS}/experiments/runs.py:weight,1.5"))
    for name, values in experiments.items():
        for value, changes in values.items():
            config = configs.load(f"{CONFIGS}/experiments/runs.py:{name},{value}")
            assert configs.resolve(config, device_count=1) is config
            found = configs.flatten(config)
            changed = {path for path in found if found[path] != plain[path]}
            assert changed <= {f"{group}.{field}" for group in changes for field in changes[group]}
    with pytest.raises(UserError, match=r"NAME,VALUE, of share,25\|50\|75\|100; .*got 'share,10'"):
        configs.load(f"{CONFIGS}/experiments/runs.py:share,10")


def test_the_papers_runs_resolve_with_the_papers_settings():
    assert len(PAPER["RUNS"]) == len(set(PAPER["RUNS"])) == 2 * 6 * 5
    for run in PAPER["RUNS"]:
        config = configs.resolve(configs.load(f"{CONFIGS}/paper/runs.py:{run}"), device_count=8)
        teacher, student, data_set = run.split(",")
        assert config.student.source.split("/")[1].startswith(student)
        shots = dict(zip(PAPER["SHOTS"], SHOTS[teacher], strict=True))
        assert (config.teacher.shots, config.student.shots) == (shots[data_set], 0)
        assert config.data.source == data_set
        assert config.data.titles != "both"
        rate = config.optimizer
        assert (rate.learning_rate, rate.weight_decay, rate.schedule) == (1e-6, 0.1, "one_cycle")
        assert (rate.pct_start, rate.div_factor, rate.final_div_factor) == (0.1, 2, 5)
        assert (config.loss.uld_weight, config.loss.skip_student_eos) == (1.5, True)
        assert (config.train.epochs, config.train.seed, config.data.batch_size) == (5, 42, 16)
        assert (config.teacher.max_new_tokens, config.generate.temperature) == (150, 0)


def test_the_papers_students_are_those_of_its_score_files(shared):
    lines = (shared / "published_scores.csv").read_text().splitlines()
    published = {line.split(",")[1] for line in lines if line.startswith("distilled,")}
    assert {source.split("/")[1] for source in PAPER["STUDENTS"].values()} == published


@pytest.mark.parametrize("argument", ["", ":llama,opt-350m", ":llama,gpt2,squad"])
def test_a_run_that_is_none_of_the_papers(argument):
    with pytest.raises(UserError) as caught:
        configs.load(f"{CONFIGS}/paper/runs.py{argument}")
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(f"got '{argument[1:]}'")
    for names in (PAPER["TEACHERS"], PAPER["STUDENTS"], PAPER["SHOTS"]):
        assert ", ".join(names) in message

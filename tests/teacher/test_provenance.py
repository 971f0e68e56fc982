"""What a cache is made from: every change is one clear line, and what does not matter is none."""

import dataclasses
import json

import numpy as np
import pytest

from uld_jax import config as configs
from uld_jax.config import ModelConfig, RunConfig, TeacherConfig
from uld_jax.data import Example, Side, SignalWriter, truncate_signal
from uld_jax.errors import UserError
from uld_jax.teacher import open_cache, provenance, read_answers, teacher_texts
from uld_jax.teacher.provenance import save_answers
from uld_jax.testing import tiny_model

CONFIG = RunConfig(student=ModelConfig("s"), teacher=TeacherConfig("owner/teacher", shots=1))
EXAMPLES = [
    Example(f"q{i}", "qa", f"The mill number {i}.", "Which mill?", (f"mill {i}",), "Mills")
    for i in range(5)
]
ANSWERS = {example.id: example.answers[0] for example in EXAMPLES}


@pytest.fixture(scope="module")
def teacher():
    return tiny_model()


def side(m, config=CONFIG, **changes):
    t = config.teacher
    fields = {"append_eos": t.append_eos, "shots": t.shots} | changes
    return Side(m.tokenizer, t.max_length, **fields)


def about(m, config=CONFIG, examples=EXAMPLES, answers=ANSWERS, **changes):
    own = side(m, config, **changes)
    texts = teacher_texts(examples, answers, own, pool=examples, seed=config.data.seed)
    return provenance(config, m, own, examples, answers, texts)


@pytest.fixture
def cache(teacher, tmp_path):
    recorded = {"recorded.weights": "12ab"}
    settings = {"epsilon": 0.01, "cap": 8, "shard_size": 10}
    writer = SignalWriter(tmp_path / "cache", about(teacher) | recorded, total=5, **settings)
    rows, zero = np.array([[0.75, 0.2, 0.05]]), np.zeros(1)
    signal = truncate_signal(rows, zero, zero, epsilon=0.01, cap=8)
    writer.write_shard(0, [(example.id, signal) for example in EXAMPLES])
    writer.finish()
    return tmp_path / "cache"


def changed(**overrides):
    config, errors = configs.apply_overrides(CONFIG, overrides)
    assert not errors
    return config


def test_the_same_run_opens_it(teacher, cache):
    assert len(open_cache(cache, about(teacher))) == 5
    # JSON has kept every value.
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["provenance"] == about(teacher) | {"recorded.weights": "12ab"}


def test_what_does_not_matter_is_not_compared(teacher, cache):
    config = changed(
        **{
            "optimizer.learning_rate": "0.5",
            "student.source": "another",
            "teacher.cache_epsilon": "0.1",
            "train.seed": "7",
            "data.batch_size": "64",
            "loss.student_temperature": "2.0",
        }
    )
    teacher.tokenizer(["a", "the river"], padding=True)  # leaves its state in the tokenizer
    try:
        assert len(open_cache(cache, about(teacher, config))) == 5
    finally:
        teacher.tokenizer(["a"])


def test_a_seed_matters_where_it_draws_shots(teacher):
    none = changed(**{"teacher.shots": "0"})
    other = changed(**{"teacher.shots": "0", "data.seed": "1"})
    assert about(teacher, none) == about(teacher, other)
    assert about(teacher)["data.seed"] == 0


def replaced(**changes):
    return [dataclasses.replace(EXAMPLES[0], **changes), *EXAMPLES[1:]]


OTHER_TOKENIZER = tiny_model(kind="metaspace")

CASES = {
    "model": (
        {"config": changed(**{"teacher.source": "owner/another"})},
        "teacher is 'owner/teacher', expected 'owner/another': set --config.teacher.source to",
    ),
    "tokenizer": (
        {"m": dataclasses.replace(OTHER_TOKENIZER, config=tiny_model().config)},
        "tokenizer is '",
    ),
    "temperature": (
        {"config": changed(**{"loss.teacher_temperature": "2"})},
        "loss.teacher_temperature is 1.0, expected 2.0: set --config.loss.teacher_temperature=1.0",
    ),
    "shots": (
        {"config": changed(**{"teacher.shots": "2"})},
        "teacher.shots is 1, expected 2: set --config.teacher.shots=1",
    ),
    "seed": (
        {"config": changed(**{"data.seed": "3"})},
        "data.seed is 0, expected 3: set --config.data.seed=0",
    ),
    "eos": (
        {"config": changed(**{"teacher.append_eos": "true"})},
        "teacher.append_eos is False, expected True: set --config.teacher.append_eos=False",
    ),
    "length": (
        {"config": changed(**{"teacher.max_length": "999"})},
        "teacher.max_length is 1024, expected 999",
    ),
    "quantize": (
        {"config": changed(**{"teacher.quantize": "int8"})},
        "teacher.quantize is '', expected 'int8'",
    ),
    "dtype": (
        {"config": changed(**{"teacher.dtype": "bfloat16"})},
        "teacher.dtype is 'float32', expected 'bfloat16'",
    ),
    "context": ({"examples": replaced(context="A windmill.")}, "data is '"),
    "fewer": ({"examples": EXAMPLES[:4]}, "data is '"),
    "order": ({"examples": EXAMPLES[::-1]}, "data is '"),
    "answers": (
        {"answers": ANSWERS | {"q2": "a bakery"}},
        "set --config.data.answers as it was when the cache was made",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_change_is_one_line(teacher, cache, case):
    changes, message = CASES[case]
    with pytest.raises(UserError) as error:
        open_cache(cache, about(**{"m": teacher} | changes))
    text = str(error.value)
    assert text.startswith(f"{cache}: this teacher cache was made from something else: ")
    assert message in text
    assert "\n" not in text
    assert "prompts is" not in text
    assert text.endswith("or run `uld-jax cache` into another directory")


def test_other_wording_of_the_prompts(teacher, cache, monkeypatch):
    from uld_jax.data import tokenize

    def reworded(example, **options):
        prompt = render(example, **options)
        return dataclasses.replace(prompt, text=prompt.text.replace("Question", "Query"))

    render = tokenize.render
    monkeypatch.setattr(tokenize, "render", reworded)
    with pytest.raises(UserError, match=r"prompts is '.*', expected '.*': prompts are worded"):
        open_cache(cache, about(teacher))


def test_damage_and_absence(teacher, cache):
    shard = cache / "signals-00000.array_record"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 4
    shard.write_bytes(data)
    with pytest.raises(UserError, match="has sha256"):
        open_cache(cache, about(teacher))
    shard.write_bytes(data[:-9])
    with pytest.raises(UserError, match="has 131063 bytes, expected 131072"):
        open_cache(cache, about(teacher))
    with pytest.raises(UserError, match="no such directory, expected a teacher cache"):
        open_cache(cache / "nowhere", about(teacher))


def test_answers_come_back_for_the_same_questions_only(teacher, tmp_path):
    directory = tmp_path / "new"
    own = side(teacher)
    with pytest.raises(UserError, match=r"answers\.json: no such file, expected the teacher's"):
        read_answers(directory, CONFIG, teacher, own, EXAMPLES)
    save_answers(directory, ANSWERS, CONFIG, teacher, own, EXAMPLES)
    hot = changed(**{"loss.teacher_temperature": "3"})
    assert read_answers(directory, hot, teacher, own, EXAMPLES) == ANSWERS
    longer = changed(**{"teacher.max_new_tokens": "99"})
    with pytest.raises(UserError, match=r"teacher\.max_new_tokens is 32, expected 99"):
        read_answers(directory, longer, teacher, own, EXAMPLES)
    with pytest.raises(UserError, match="data is '"):
        read_answers(directory, CONFIG, teacher, own, EXAMPLES[1:])
    (directory / "answers.json").write_text('{"q0": "mill"}')
    with pytest.raises(UserError, match=r"expected made_from and answers, got \['q0'\]"):
        read_answers(directory, CONFIG, teacher, own, EXAMPLES)

"""The real five data sets of the paper, where they lie beside the checkout."""

import functools
import gzip
import hashlib
import itertools
import json

import pytest

from uld_jax.data import builders, draw_shots, load_examples, render, shot_pool, task_of
from uld_jax.data.catalogue import CATALOGUE, find_files
from uld_jax.data.prompts import TASKS

NAMES = tuple(CATALOGUE)
# Of the files that lie beside a developer's checkout: QED lacks 471 of its 7,638 train records.
REAL_SIZES = {
    "squad": {"train": 87_599, "validation": 10_570},
    "qed": {"train": 7_167, "validation": 1_355},
    "fairytaleqa": {"train": 8_548, "validation": 1_025, "test": 1_007},
    "pubmedqa": {"train": 500, "test": 500},
    "dialogsum": {"train": 12_460, "validation": 500, "test": 500},
}


@pytest.fixture(scope="module")
def real(shared):
    """The real data sets, as their readers give them, by name."""
    folder = shared / "data"
    return functools.cache(lambda name: CATALOGUE[name].read(find_files(CATALOGUE[name], folder)))


@pytest.mark.parametrize("name", NAMES)
def test_real_sizes(real, name):
    splits = real(name)
    assert {split: len(examples) for split, examples in splits.items()} == REAL_SIZES[name]
    everything = list(itertools.chain.from_iterable(splits.values()))
    assert len({example.id for example in everything}) == len(everything)
    assert all(example.context for example in everything)
    unanswered = [example for example in everything if not all(map(str.strip, example.answers))]
    assert len(unanswered) == (20 if name == "qed" else 0)


@pytest.mark.parametrize(
    "name",
    [name if name == "pubmedqa" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def test_the_prepared_copy_of_a_real_data_set_is_whole(real, shared, tmp_path, name):
    for split, examples in real(name).items():
        found = load_examples(name, split, data_dir=tmp_path, manual_dir=shared / "data")
        assert found == examples


def test_real_squad_is_the_registered_file(shared):
    text = gzip.decompress((shared / "data/squad/dev-v1.1.json.gz").read_bytes())
    known = builders.SquadV1.url_infos[CATALOGUE["squad"].urls["validation"]]
    assert (known.size, known.checksum) == (len(text), hashlib.sha256(text).hexdigest())


def test_real_pubmedqa_is_in_the_order_of_the_papers_score_files(real, shared):
    order = json.loads((shared / "data/pubmedqa/official_test500_pmids_in_order.json").read_text())
    assert [example.id for example in real("pubmedqa")["test"]] == order


def test_real_qed_has_paragraphs_in_both_splits(real):
    train, evaluated = (real("qed")[split] for split in ("train", "validation"))
    # Why shot_pool is there; without it some of these would be shown.
    assert len(train) - len(shot_pool(train, evaluated)) == 126


@pytest.mark.parametrize("name", NAMES)
def test_no_evaluated_text_is_among_the_shots_of_real_data(real, name):
    train, evaluated = real(name)["train"], real(name)[CATALOGUE[name].evaluated]
    pool = shot_pool(train, evaluated)
    texts = {example.context for example in evaluated}
    ids = {example.id for example in evaluated}
    asked = [*evaluated[:: max(len(evaluated) // 40, 1)], *train[:: len(train) // 40]]
    for seed in range(25):
        for example in asked:
            shots = draw_shots(pool, example, 5, seed)
            assert len({shot.id for shot in shots}) == 5
            assert all(shot.answers[0].strip() for shot in shots)
            assert not texts & {shot.context for shot in shots}
            assert not ids & {shot.id for shot in shots}
            assert example.context not in {shot.context for shot in shots}


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_real_data_hold_no_answer_of_the_item_itself(real, name):
    train, evaluated = real(name)["train"], real(name)[CATALOGUE[name].evaluated]
    task = task_of(name)
    (shot,) = draw_shots(train, evaluated[0], 1, seed=42)
    prompt = render(evaluated[0], shots=[shot], task=task, titles=True).text
    words = TASKS[task]
    assert prompt.startswith(words.system)
    assert prompt.endswith(f"\n{words.answer}:")
    assert f"\n{words.answer}: {shot.answers[0]}\n\n" in prompt
    for text in (shot.context, shot.question, evaluated[0].context, evaluated[0].question):
        assert text in prompt
    if name in ("pubmedqa", "dialogsum"):
        assert not any(answer in prompt for answer in evaluated[0].answers)

"""Hugging Face data sets: real ones in local folders; the package `datasets` is optional."""

import json
import sys

import pytest

from uld_jax.data import load_examples
from uld_jax.data.records import Example
from uld_jax.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set of JSON lines that Hugging Face's library loads by its path."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(**splits):
        directory = tmp_path / "set"
        directory.mkdir()
        for split, records in splits.items():
            text = "".join(json.dumps(record) + "\n" for record in records)
            (directory / f"{split}.jsonl").write_text(text)
        return directory

    return make


def squad(number):
    return {
        "id": f"s{number}",
        "title": "Mills",
        "context": f"Mill {number} grinds wheat.",
        "question": f"What does mill {number} grind?",
        "answers": {"text": ["wheat", "corn"], "answer_start": [0, 1]},
    }


def test_columns_as_squads_need_no_more_than_the_id(folder):
    source = f"hf:{folder(train=map(squad, range(3)), validation=map(squad, range(3, 5)))}"
    assert len(load_examples(source, "train")) == 3
    assert load_examples(source, "eval")[0] == Example(
        "s3", "qa", "Mill 3 grinds wheat.", "What does mill 3 grind?", ("wheat", "corn"), "Mills"
    )


def test_columns_and_splits_may_be_named(folder):
    records = [{"ask": f"q{n}", "reply": {"short": f"a{n}"}} for n in range(2)]
    directory = folder(train=records, test=[{"ask": "q", "reply": {"short": "a"}}])
    source = f"hf:{directory}?question=ask&answers=reply.short&eval=train"
    assert load_examples(source, "eval") == [
        Example(f"train-{n}", "qa", "", f"q{n}", (f"a{n}",), "") for n in range(2)
    ]
    assert len(load_examples(source.removesuffix("&eval=train"), "eval")) == 1


def test_an_absent_split(folder):
    source = f"hf:{folder(train=[squad(0)])}"
    with pytest.raises(UserError, match=r"split 'eval' is empty.*it has \{'train': 1\}"):
        load_examples(source, "eval")
    assert load_examples(source, "eval", may_be_absent=True) == []


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, "?question=ask", r"train\[0\]: no column for \['question'\], found \['answers', "),
        ({"answers": []}, "", r"train\[0\]: column 'answers' must be a text or a list of texts"),
        ({"context": 7}, "", r"train\[0\]: column 'context' must be a string, got int"),
        ({}, "?column=x", r"expected hf:ID\?OPTION=VALUE&… with options of .*, got column=x"),
        ({}, "?question", r"expected hf:ID\?OPTION=VALUE&… with options of .*, got question"),
    ],
)
def test_bad_columns_and_options(folder, change, options, message):
    source = f"hf:{folder(train=[squad(0) | change])}{options}"
    with pytest.raises(UserError, match=message) as caught:
        load_examples(source, "train")
    assert "\n" not in str(caught.value)


def test_a_data_set_that_is_not_there(folder, tmp_path):
    with pytest.raises(UserError, match="expected a data set that Hugging Face's") as caught:
        load_examples(f"hf:{tmp_path / 'nowhere'}", "train")
    assert "\n" not in str(caught.value)


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError) as caught:
        load_examples("hf:rajpurkar/squad", "train")
    assert str(caught.value) == (
        "hf:rajpurkar/squad: expected the package `datasets`, which is not installed: "
        "pip install 'uld-jax[datasets]'"
    )

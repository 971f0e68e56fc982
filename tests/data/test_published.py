"""The paper's five data sets in their official files, small ones of our own text."""

import contextlib
import functools
import gzip
import http.server
import itertools
import json
import shutil
import threading
import zipfile

import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader

from uld_jax.data import builders, load_examples
from uld_jax.data.catalogue import CATALOGUE
from uld_jax.data.records import Example
from uld_jax.errors import UserError

NAMES = tuple(CATALOGUE)
SIZES = {
    "squad": {"train": 10, "validation": 2},
    "qed": {"train": 10, "validation": 2},
    "fairytaleqa": {"train": 10, "validation": 2, "test": 4},
    "pubmedqa": {"train": 12, "test": 12},
    "dialogsum": {"train": 10, "validation": 2, "test": 2},
}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture
def read(published, prepared):
    return functools.partial(load_examples, data_dir=prepared, manual_dir=published)


@pytest.mark.parametrize("name", NAMES)
def test_every_split_is_read_and_eval_is_what_the_paper_evaluates_on(read, name):
    splits = {split: read(name, split) for split in SIZES[name]}
    assert {split: len(examples) for split, examples in splits.items()} == SIZES[name]
    assert read(name, "eval") == splits[CATALOGUE[name].evaluated]
    everything = list(itertools.chain.from_iterable(splits.values()))
    assert len({example.id for example in everything}) == len(everything)


@pytest.mark.parametrize(
    ("name", "split", "number", "expected"),
    [
        (
            "squad",
            "eval",
            1,
            Example(
                "mill-7-1",
                "qa",
                "Mill 7 stands by the river and grinds wheat.",
                "What does mill 7 stand by?",
                ("the river", "the river"),
                "The_mill_7",
            ),
        ),
        (
            "qed",
            "eval",
            0,
            Example(
                "-21",
                "qa",
                "Keeper 1 lights the lamp .",
                "what does keeper 21 light",
                ("lamp 21",),
                "Lighthouses",
            ),
        ),
        (
            "fairytaleqa",
            "eval",
            3,
            Example(
                "the-miller-7-2",
                "qa",
                "Miller 7 slept\nin the mill.\nA ghost sang.",
                "Why did miller 7 wake?",
                ('a "ghost" sang',),
                "the-miller-7",
            ),
        ),
        (
            "dialogsum",
            "eval",
            1,
            Example(
                "test_1",
                "qa",
                "#Person1#: Is test mill 1 open?\n#Person2#: Yes.",
                "",
                tuple(f"Mill 1 is open (summary{n})." for n in (1, 2, 3)),
                "",
            ),
        ),
    ],
)
def test_fields(read, name, split, number, expected):
    assert read(name, split)[number] == expected


def test_a_study_has_its_whole_abstract_and_its_conclusion(read):
    found = next(x for x in read("pubmedqa", "train") + read("pubmedqa", "test") if x.id == "903")
    assert found.context == "We gave drug 3 to many. They slept better."
    assert (found.question, found.answers) == ("Does drug 3 help?", ("Drug 3 may help.",))


def qed_of_the_first_release(folder):
    """In two shards, gzipped, and with its older fields."""
    lines = (folder / "qed-train.jsonlines").read_text().splitlines()
    (folder / "qed-train.jsonlines").unlink()
    for shard in range(2):
        older = []
        for record in map(json.loads, lines[shard::2]):
            answers = record.pop("original_nq_answers")
            older.append(record | {"answer_text": [span["string"] for span in answers[0]]})
        text = "".join(json.dumps(record) + "\n" for record in older)
        path = folder / f"nq-train-0{shard}-qed.jsonlines.gz"
        path.write_bytes(gzip.compress(text.encode()))


def squad_by_article(folder):
    """Its train file with an article a line, and without ids."""
    document = json.loads((folder / "train-v1.1.json").read_text())
    (folder / "train-v1.1.json").unlink()
    for article in document["data"]:
        for qa in article["paragraphs"][0]["qas"]:
            del qa["id"]
    text = "".join(json.dumps(article) + "\n" for article in document["data"])
    (folder / "train-v1.1.noids.jsonl.gz").write_bytes(gzip.compress(text.encode()))


def fairytales_as_lines(folder):
    """A question a line, two of them with one number."""
    tree = folder / "data-by-train-split"
    shutil.rmtree(tree / "questions" / "val")
    for name in ("questions", "section-stories", "sentence-stories"):
        shutil.rmtree(tree / name / "val", ignore_errors=True)
    line = {
        "story_name": "tom",
        "question_id": "3",
        "context": "Tom slept.",
        "question": "Who slept?",
        "answers": ["Tom", "tom"],
    }
    text = json.dumps(line) + "\n" + json.dumps(line | {"question": "Who woke?"}) + "\n"
    (folder / "val.normalised.jsonl").write_text(text)


@pytest.mark.parametrize(
    ("name", "change", "split"),
    [
        ("qed", qed_of_the_first_release, "train"),
        ("squad", squad_by_article, "train"),
        ("fairytaleqa", fairytales_as_lines, "validation"),
    ],
)
def test_other_layouts_hold_the_same(read, published, tmp_path, name, change, split):
    folder = shutil.copytree(published / name, tmp_path / "any name")
    change(folder)
    found = load_examples(name, split, data_dir=tmp_path / "tfds", manual_dir=folder)
    assert len(found) == SIZES[name][split]
    assert len({example.id for example in found}) == len(found)
    if name == "fairytaleqa":
        assert [(x.id, x.question, x.answers) for x in found] == [
            ("tom-3", "Who slept?", ("Tom",)),
            ("tom-3#2", "Who woke?", ("Tom",)),
        ]
        return
    expected = {(x.context, x.question, x.answers, x.title) for x in read(name, split)}
    assert {(x.context, x.question, x.answers, x.title) for x in found} == expected


def test_of_a_changed_file_there_is_a_new_copy(published, tmp_path):
    folder = shutil.copytree(published / "dialogsum", tmp_path / "dialogsum")
    before = load_examples("dialogsum", "train", data_dir=tmp_path, manual_dir=folder)
    path = folder / "dialogsum.train.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    after = load_examples("dialogsum", "train", data_dir=tmp_path, manual_dir=folder)
    assert (len(after), after) == (4, before[:4])


@pytest.mark.parametrize("name", NAMES)
def test_the_builder_says_whose_data_it_is(published, tmp_path, name):
    builder = builders.PUBLISHED[name](data_dir=tmp_path, manual_dir=published)
    assert str(builder.version) == CATALOGUE[name].version
    info = builder.info
    assert info.citation.startswith("@")
    assert "title=" in info.citation
    assert info.homepage.startswith("https://")
    assert info.as_proto.redistribution_info.license.startswith(("CC BY", "Apache-2.0", "MIT"))
    # TFDS's own data set of this name is still to be had as tfds:NAME.
    assert builder.name != "squad"


def test_checksums_are_registered_for_squad():
    known = builders.SquadV1.url_infos
    assert set(CATALOGUE["squad"].urls.values()) <= set(known)


@pytest.mark.parametrize(
    ("name", "path", "text", "message"),
    [
        ("squad", "dev-v1.1.json", "[]", r"expected a JSON object with field 'data'"),
        ("qed", "qed-dev.jsonlines", "{}", r"qed-dev.jsonlines:1: field 'answer_text' is missing"),
        (
            "qed",
            "qed-dev.jsonlines",
            '{"original_nq_answers": [[]]}',
            r"qed-dev.jsonlines:1: field 'original_nq_answers' must be a list of lists of spans",
        ),
        ("pubmedqa", "ori_pqal.json", '{"7": []}', r"ori_pqal.json: 7: expected a JSON object"),
        (
            "fairytaleqa",
            "data-by-train-split/section-stories/val/the-miller-5-story.csv",
            "section,text\n1,Only one.\n",
            r"the-miller-5-questions.csv:3: sections \['2'\] of the-miller-5 are asked about",
        ),
        (
            "dialogsum",
            "dialogsum.dev.jsonl",
            '{"fname": "a", "summary": "b"}',
            r"dialogsum.dev.jsonl:1: field 'dialogue' is missing",
        ),
    ],
)
def test_a_malformed_file_is_one_line_and_leaves_no_copy(
    published, tmp_path, name, path, text, message
):
    folder = shutil.copytree(published / name, tmp_path / name)
    (folder / path).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_examples(name, "train", data_dir=tmp_path / "tfds", manual_dir=folder)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "tfds").rglob("dataset_info.json"))


def test_missing_files_are_named(published, tmp_path):
    folder = shutil.copytree(published / "qed", tmp_path / "qed")
    (folder / "qed-dev.jsonlines").unlink()
    with pytest.raises(UserError) as caught:
        load_examples("qed", "train", data_dir=tmp_path, manual_dir=folder)
    assert str(caught.value) == (
        f"data.manual_dir={folder}: expected the files of qed in it, found none for validation; "
        "they are called qed-train.jsonlines or nq-train-*-qed.jsonlines (train), "
        "qed-dev.jsonlines (validation), plain or .gz, see "
        "https://github.com/google-research-datasets/QED"
    )


def test_a_split_that_was_never_published(read):
    with pytest.raises(UserError, match="qed: split 'test' is not there, expected eval or one of"):
        read("qed", "test")


@contextlib.contextmanager
def served(folder):
    """The address of a web server with the files of a folder."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def from_address(monkeypatch, name, **urls):
    """Lets a builder download from elsewhere."""
    data_set = CATALOGUE[name]
    changed = {field: getattr(data_set, field) for field in vars(data_set)} | {"urls": urls}
    monkeypatch.setattr(builders.PUBLISHED[name], "DATA_SET", type(data_set)(**changed))


def test_files_are_downloaded(read, published, tmp_path, monkeypatch):
    with served(published / "dialogsum") as address:
        names = {"train": "train", "validation": "dev", "test": "test"}
        urls = {split: f"{address}/dialogsum.{name}.jsonl" for split, name in names.items()}
        from_address(monkeypatch, "dialogsum", **urls)
        found = load_examples("dialogsum", "eval", data_dir=tmp_path)
    assert found == read("dialogsum", "eval")
    assert load_examples("dialogsum", "train", data_dir=tmp_path) == read("dialogsum", "train")


def test_an_archive_is_downloaded_and_unpacked(read, published, tmp_path, monkeypatch):
    archive = tmp_path / "web" / "main.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        for path in (published / "fairytaleqa").rglob("*.csv"):
            file.write(path, f"FairytaleQAData-main/{path.relative_to(published / 'fairytaleqa')}")
    with served(archive.parent) as address:
        from_address(monkeypatch, "fairytaleqa", all=f"{address}/main.zip")
        found = load_examples("fairytaleqa", "train", data_dir=tmp_path / "tfds")
    assert found == read("fairytaleqa", "train")


@pytest.mark.parametrize("fault", ["absent", "unreachable", "checksum"])
def test_a_download_that_fails_says_what_to_do(published, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(downloader, "MAX_RETRIES", 0)
    with served(published / "pubmedqa") as address:
        url = f"{address}/ori_pqal.json"
        if fault == "absent":
            url = f"{address}/other.json"
        elif fault == "unreachable":
            url = "http://127.0.0.1:9/ori_pqal.json"
        else:
            info = tfds.download.checksums.UrlInfo(7, "0" * 64, "ori_pqal.json")
            monkeypatch.setattr(builders.PubmedQa, "url_infos", {url: info})
        from_address(monkeypatch, "pubmedqa", all=url)
        with pytest.raises(UserError) as caught:
            load_examples("pubmedqa", "train", data_dir=tmp_path)
    message = str(caught.value)
    assert message.startswith(f"data.source=pubmedqa: expected to download {url}, which failed (")
    assert message.endswith(
        "get the files otherwise, put them into a folder as ori_pqal.json or data/ori_pqal.json "
        "(all), plain or .gz, and set --config.data.manual_dir=FOLDER"
    )
    assert "\n" not in message

"""The paper's five data sets: where they are published, under which licence, as which files."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from uld_jax.data import official
from uld_jax.data.official import Files, Splits
from uld_jax.errors import UserError

_GITHUB = "https://raw.githubusercontent.com"


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A published data set.

    Attributes:
        name: As a source is named.
        version: Of the data; raise it whenever a reader changes what is written.
        task: How it is asked (see `prompts.TASKS`).
        evaluated: The split that the paper evaluates on.
        description: What it is, for people.
        citation: BibTeX.
        homepage: Where it is described.
        licence: Its name.
        urls: Where its files are, by part: a split, or "all" where one has every split.
        layouts: What its files are called in a folder, by part: glob patterns, of which the first
            that finds something counts; each may have .gz behind it.
        read: Reads the files of each part.
    """

    name: str
    version: str
    task: str
    evaluated: str
    description: str
    citation: str
    homepage: str
    licence: str
    urls: Mapping[str, str]
    layouts: Mapping[str, tuple[str, ...]]
    read: Callable[[Files], Splits]


def find_files(data_set: DataSet, folder: Path) -> dict[str, list[Path]]:
    """The files of a data set in a folder, or in a folder of its name within.

    Args:
        data_set: The data set.
        folder: Where to look.

    Returns:
        Paths by part, sorted by name.

    Raises:
        UserError: There is no such folder, or files are missing; it names those that are expected.
    """
    root = folder / data_set.name if (folder / data_set.name).is_dir() else folder
    found = {part: _first_match(root, layouts) for part, layouts in data_set.layouts.items()}
    missing = [part for part, paths in found.items() if not paths]
    if missing:
        raise UserError(
            f"data.manual_dir={folder}: expected the files of {data_set.name} in it, found none "
            f"for {', '.join(missing)}; they are called {expected_names(data_set)}, see "
            f"{data_set.homepage}"
        )
    return found


def expected_names(data_set: DataSet) -> str:
    """What the files of a data set are called, for an error.

    Args:
        data_set: The data set.

    Returns:
        The patterns of each part.

    Example:
        >>> expected_names(PUBMEDQA)
        'ori_pqal.json or data/ori_pqal.json (all), plain or .gz'
    """
    names = (f"{' or '.join(names)} ({part})" for part, names in data_set.layouts.items())
    return f"{', '.join(names)}, plain or .gz"


def _first_match(root: Path, layouts: tuple[str, ...]) -> list[Path]:
    for pattern in (pattern + end for pattern in layouts for end in ("", ".gz")):
        if paths := sorted(root.glob(pattern)):
            return paths
    return []


SQUAD = DataSet(
    name="squad",
    version="1.1.0",
    task="qa",
    evaluated="validation",
    description="SQuAD v1.1: questions on Wikipedia articles, answered by a span of a paragraph.",
    citation="""@inproceedings{rajpurkar2016squad,
  title={{SQuAD}: 100,000+ Questions for Machine Comprehension of Text},
  author={Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
  booktitle={Proceedings of EMNLP},
  year={2016},
  note={arXiv:1606.05250}
}""",
    homepage="https://rajpurkar.github.io/SQuAD-explorer/",
    licence="CC BY-SA 4.0",
    urls={
        "train": "https://rajpurkar.github.io/SQuAD-explorer/dataset/train-v1.1.json",
        "validation": "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v1.1.json",
    },
    layouts={
        "train": ("train-v1.1.json", "train-v1.1*.jsonl"),
        "validation": ("dev-v1.1.json", "dev-v1.1*.jsonl"),
    },
    read=official.read_squad,
)

QED = DataSet(
    name="qed",
    version="1.0.0",
    task="qa_generative",
    evaluated="validation",
    description="QED: questions of Natural Questions with a Wikipedia paragraph that answers them.",
    citation="""@article{lamm2021qed,
  title={{QED}: A Framework and Dataset for Explanations in Question Answering},
  author={Lamm, Matthew and Palomaki, Jennimaria and Alberti, Chris and Andor, Daniel and
          Choi, Eunsol and Soares, Livio Baldini and Collins, Michael},
  journal={Transactions of the Association for Computational Linguistics},
  volume={9},
  year={2021},
  note={arXiv:2009.06354}
}""",
    homepage="https://github.com/google-research-datasets/QED",
    licence="CC BY-SA 3.0 (text of Wikipedia)",
    urls={
        "train": f"{_GITHUB}/google-research-datasets/QED/master/qed-train.jsonlines",
        "validation": f"{_GITHUB}/google-research-datasets/QED/master/qed-dev.jsonlines",
    },
    layouts={
        "train": ("qed-train.jsonlines", "nq-train-*-qed.jsonlines"),
        "validation": ("qed-dev.jsonlines",),
    },
    read=official.read_qed,
)

FAIRYTALEQA = DataSet(
    name="fairytaleqa",
    version="1.0.0",
    task="qa_generative",
    evaluated="test",
    description="FairytaleQA: educators' questions on 278 children's stories.",
    citation="""@inproceedings{xu2022fairytaleqa,
  title={Fantastic Questions and Where to Find Them: {FairytaleQA} -- An Authentic Dataset for
         Narrative Comprehension},
  author={Xu, Ying and Wang, Dakuo and Yu, Mo and Ritchie, Daniel and Yao, Bingsheng and
          Wu, Tongshuang and Zhang, Zheng and Li, Toby Jia-Jun and Bradford, Nora and Sun, Branda
          and Hoang, Tran Bao and Sang, Yisi and Hou, Yufang and Ma, Xiaojuan and Yang, Diyi and
          Peng, Nanyun and Yu, Zhou and Warschauer, Mark},
  booktitle={Proceedings of ACL},
  year={2022},
  note={arXiv:2203.13947}
}""",
    homepage="https://github.com/uci-soe/FairytaleQAData",
    licence="Apache-2.0",
    urls={"all": "https://github.com/uci-soe/FairytaleQAData/archive/refs/heads/main.zip"},
    layouts={
        split: (
            f"data-by-train-split/*/{folder}/*.csv",
            f"*/data-by-train-split/*/{folder}/*.csv",
            f"{folder}*.jsonl",
        )
        for split, folder in (("train", "train"), ("validation", "val"), ("test", "test"))
    },
    read=official.read_fairytaleqa,
)

PUBMEDQA = DataSet(
    name="pubmedqa",
    version="1.0.0",
    task="qa_medical",
    evaluated="test",
    description="PubMedQA's PQA-L: 1,000 titles of medical papers that are questions, with their "
    "abstracts and conclusions.",
    citation="""@inproceedings{jin2019pubmedqa,
  title={{PubMedQA}: A Dataset for Biomedical Research Question Answering},
  author={Jin, Qiao and Dhingra, Bhuwan and Liu, Zhengping and Cohen, William and Lu, Xinghua},
  booktitle={Proceedings of EMNLP-IJCNLP},
  year={2019},
  note={arXiv:1909.06146}
}""",
    homepage="https://github.com/pubmedqa/pubmedqa",
    licence="MIT",
    urls={"all": f"{_GITHUB}/pubmedqa/pubmedqa/master/data/ori_pqal.json"},
    layouts={"all": ("ori_pqal.json", "data/ori_pqal.json")},
    read=official.read_pubmedqa,
)

_DIALOGSUM_FILES = {"train": "train", "validation": "dev", "test": "test"}
DIALOGSUM = DataSet(
    name="dialogsum",
    version="1.0.0",
    task="summary_dialogue",
    evaluated="test",
    description="DIALOGSum: everyday dialogues and their summaries, of the test set three each.",
    citation="""@inproceedings{chen2021dialogsum,
  title={{DialogSum}: A Real-Life Scenario Dialogue Summarization Dataset},
  author={Chen, Yulong and Liu, Yang and Chen, Liang and Zhang, Yue},
  booktitle={Findings of ACL-IJCNLP},
  year={2021},
  note={arXiv:2105.06762}
}""",
    homepage="https://github.com/cylnlp/dialogsum",
    licence="CC BY-NC-SA 4.0",
    urls={
        split: f"{_GITHUB}/cylnlp/dialogsum/main/DialogSum_Data/dialogsum.{name}.jsonl"
        for split, name in _DIALOGSUM_FILES.items()
    },
    layouts={
        split: (
            f"dialogsum.{name}.jsonl",
            f"dialogsum.{name}.*.jsonl",
            f"DialogSum_Data/dialogsum.{name}.jsonl",
        )
        for split, name in _DIALOGSUM_FILES.items()
    },
    read=official.read_dialogsum,
)

CATALOGUE = {found.name: found for found in (SQUAD, QED, FAIRYTALEQA, PUBMEDQA, DIALOGSUM)}

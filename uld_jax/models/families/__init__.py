"""The model families, each one file: two config translations and one weight table."""

from collections.abc import Mapping

from uld_jax.errors import UserError
from uld_jax.models.families.base import Family, Weight, hf_names
from uld_jax.models.families.gemma3 import GEMMA3
from uld_jax.models.families.llama import LLAMA

FAMILIES = (LLAMA, GEMMA3)


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
    known = {family.gguf_architecture: family for family in FAMILIES}
    return _find(known, architecture, f"{where}: GGUF architecture")


def _find(known: Mapping[str, Family], name: str, what: str) -> Family:
    if name not in known:
        raise UserError(f"{what} '{name}' is not supported; supported: {sorted(known)}")
    return known[name]


__all__ = ["FAMILIES", "Family", "Weight", "by_gguf_architecture", "by_model_type", "hf_names"]

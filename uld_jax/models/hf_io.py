"""Models in and out of the Hugging Face format: safetensors directories, hub ids, GGUF files."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import transformers
from flax import nnx
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from jax.sharding import Mesh

from uld_jax import buckets
from uld_jax.errors import UserError
from uld_jax.files import AnyPath, is_free, locate, make_directory, staged_directory
from uld_jax.models.config import DecoderConfig, Policy
from uld_jax.models.decoder import REMAT_POLICIES, Decoder
from uld_jax.models.encoder_decoder import EncoderDecoder
from uld_jax.models.encoder_decoder_config import EncoderDecoderConfig
from uld_jax.models.families import Part, by_model_type, hf_names
from uld_jax.models.gguf import GgufSource
from uld_jax.models.gguf_tokenizer import tokenizer_from_gguf
from uld_jax.models.lora import merged
from uld_jax.models.reading import TensorSource, check_weights, parameters_of, read_parameter
from uld_jax.models.safetensors_source import (
    SafetensorsSource,
    read_model_config,
    refuse_pickles,
)
from uld_jax.models.vocabulary import check_tokenizer
from uld_jax.processes import fetch, is_first, wait_for_all
from uld_jax.sharding import RULES, Rules, make_mesh

WEIGHTS = "*.safetensors"
FILES = ["*.json", WEIGHTS, "tokenizer*", "*.model", "*.jinja", "*.txt"]


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Args:
        model: The Flax NNX module.
        tokenizer: Its Hugging Face tokenizer.
        config: What it is made of.
    """

    model: Decoder
    tokenizer: transformers.PreTrainedTokenizerFast
    config: DecoderConfig


@dataclasses.dataclass(frozen=True)
class LoadedTokenizer:
    """What is known of a model without its weights.

    Args:
        tokenizer: Its Hugging Face tokenizer.
        config: What it is made of.
    """

    tokenizer: transformers.PreTrainedTokenizerFast
    config: DecoderConfig


def _read_tokenizer(path: Path) -> transformers.PreTrainedTokenizerFast:
    try:
        # With False, code that comes with the model is neither run nor asked about.
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: no tokenizer that opens ({reason}); save the model's tokenizer.json there"
        ) from error


def load(
    source: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike = "float32",
    param_dtype: jax.typing.DTypeLike = "float32",
    remat: str = "none",
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> LoadedModel:
    """Loads a model and its tokenizer, tensor by tensor straight into the devices' shards.

    Args:
        source: A Hugging Face hub id, a directory of safetensors, or a .gguf file.
        dtype: Type of activations and products, "float32" or "bfloat16".
        param_dtype: Type of the parameters, likewise.
        remat: What the backward pass recomputes, see `Policy`.
        mesh: Where the parameters go; the first device by default.
        rules: How they lie there, see `uld_jax.sharding.parameter_rules`.

    Returns:
        The model, its tokenizer and its config.

    Raises:
        UserError: Nothing there, an unsupported architecture or setting, or weights that are
            missing, unexpected or of the wrong shape (all of them in one message), or a
            tokenizer with more tokens than the embedding.

    Example:
        >>> load("nowhere/at-all.gguf")
        Traceback (most recent call last):
        ...
        uld_jax.errors.UserError: nowhere/at-all.gguf: no such file; ...
    """
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1]) if mesh is None else mesh
    policy = Policy(dtype=_float_name("dtype", dtype), remat=remat)
    param_type = _float_name("param_dtype", param_dtype)
    if remat not in (kinds := ["none", *REMAT_POLICIES]):
        raise UserError(f"remat must be one of {kinds}: got {remat!r}")
    tensors, tokenizer = _open_source(str(source))
    graph, state = nnx.split(abstract_decoder(tensors.config, policy, jnp.dtype(param_type)))
    check_weights(tensors, state, str(source))
    check_tokenizer(tokenizer, tensors.config.vocab_size, str(source))
    for weight, param in parameters_of(tensors, state):
        param.set_value(read_parameter(tensors, weight, param, mesh, rules))
    return LoadedModel(nnx.merge(graph, state), tokenizer, tensors.config)


def _float_name(setting: str, dtype: jax.typing.DTypeLike) -> str:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in ("float32", "bfloat16"):
        raise UserError(f"{setting} must be 'float32' or 'bfloat16': got {name!r}")
    return name


def load_tokenizer(source: str | os.PathLike[str], *, check: bool = True) -> LoadedTokenizer:
    """Loads a model's tokenizer and config, and no weights; from the hub none are fetched.

    Args:
        source: As for `load`; a directory needs no safetensors.
        check: Whether to refuse a tokenizer with ids that the model has no row for.

    Returns:
        Both.

    Raises:
        UserError: As `load`, of the tokenizer and the config.

    Example:
        >>> load_tokenizer("nowhere/at-all.gguf")
        Traceback (most recent call last):
        ...
        uld_jax.errors.UserError: nowhere/at-all.gguf: no such file; ...
    """
    path = _locate(str(source), [name for name in FILES if name != WEIGHTS])
    tokenizer = tokenizer_from_gguf(path) if path.suffix == ".gguf" else _read_tokenizer(path)
    config = load_config(path)
    if check:
        check_tokenizer(tokenizer, config.vocab_size, str(source))
    return LoadedTokenizer(tokenizer, config)


def load_config(source: str | os.PathLike[str]) -> DecoderConfig:
    """What a model is made of, from its config.json or its GGUF metadata alone.

    Args:
        source: As for `load`; a directory needs config.json only, and no more is fetched.

    Returns:
        The config.

    Raises:
        UserError: As `load`, of the config.

    Example:
        >>> load_config("nowhere/at-all.gguf")
        Traceback (most recent call last):
        ...
        uld_jax.errors.UserError: nowhere/at-all.gguf: no such file; ...
    """
    path = _locate(str(source), ["config.json"])
    return GgufSource(path).config if path.suffix == ".gguf" else read_model_config(path)


def weights_fingerprint(source: str | os.PathLike[str]) -> str:
    """Tells a model's weights from others without reading all of them.

    Args:
        source: As for `load`.

    Returns:
        SHA-256 over the size, the first and the last MiB of each file of weights, hexadecimal.

    Raises:
        UserError: Nothing there.
    """
    path = _locate(str(source), FILES)
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.glob(WEIGHTS)):
        size = file.stat().st_size
        with file.open("rb") as opened:
            head = opened.read(1 << 20)
            opened.seek(max(0, size - (1 << 20)))
            digest.update(f"{size}:".encode() + head + opened.read())
    return digest.hexdigest()


def _open_source(source: str) -> tuple[TensorSource, transformers.PreTrainedTokenizerFast]:
    path = _locate(source, FILES)
    if path.suffix == ".gguf":
        return GgufSource(path), tokenizer_from_gguf(path)
    return SafetensorsSource(path), _read_tokenizer(path)


def _locate(source: str, patterns: list[str]) -> Path:
    """The GGUF file or the directory, fetched from the hub if need be."""
    path = Path(source).expanduser()
    if source.endswith(".gguf"):
        if not path.is_file():
            raise UserError(
                f"{source}: no such file; launch/fetch_models.sh gets the quickstart's two models"
            )
        return path
    if path.is_dir():
        return path
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"{source}: no such directory, and not a hub id like 'owner/name'")
    try:
        path = Path(snapshot_download(source, allow_patterns=patterns))
        if WEIGHTS in patterns and not any(path.glob(WEIGHTS)):
            # Pickled files are not fetched; whether there are any, the hub says.
            names = [file.rfilename for file in HfApi().model_info(source).siblings or ()]
            if pickled := sorted(name for name in names if name.endswith(".bin")):
                target = f"{source.split('/')[1]}-safetensors"
                refuse_pickles(f"{source}/model.safetensors", pickled, source, target)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{source}: no such directory here, and the hub did not give it: {reason}"
        ) from error
    return path


def revision_of(source: str | os.PathLike[str]) -> str | None:
    """The commit of a hub id that `load` took its files from.

    Args:
        source: As for `load`.

    Returns:
        The commit's hash; None for a directory or a file.

    Example:
        >>> revision_of("somewhere/model.gguf")
    """
    text = str(source)
    if Path(text).expanduser().exists() or text.endswith(".gguf"):
        return None
    found = try_to_load_from_cache(text, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None


def abstract_decoder(config: DecoderConfig, policy: Policy, param_dtype: Any) -> Decoder:
    """A decoder whose parameters are shapes only: for loading, planning and checkpoints.

    Args:
        config: What it is made of.
        policy: How it computes.
        param_dtype: Type of the parameters.

    Returns:
        The module; its parameters are jax.ShapeDtypeStruct.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> abstract_decoder(tiny_config(), Policy(), "float32").embed.shape
        (64, 32)
    """
    return nnx.eval_shape(
        lambda: model_class(config)(config, policy, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    )


def model_class(config: Any) -> Any:
    """The module that a config describes: Decoder or EncoderDecoder.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> model_class(tiny_config()).__name__
        'Decoder'
    """
    return EncoderDecoder if isinstance(config, EncoderDecoderConfig) else Decoder


def save_pretrained(m: LoadedModel, directory: str | os.PathLike[str]) -> None:
    """Writes a directory that transformers opens: model.safetensors, config.json, tokenizer.

    Of several processes the first one writes; all take part, and go on when it is there.

    Args:
        m: The model, its tokenizer and its config.
        directory: Made, with its parents; it appears only when it is complete. In a bucket, see
            `files.staged_directory`.

    Raises:
        UserError: The directory exists and is not empty, or the disk does not take the files.
    """
    target = locate(directory)
    if not is_free(target):
        raise UserError(f"{target}: exists and is not an empty directory; choose another")
    wait_for_all(f"place of {target.name}")  # so that nobody finds what the first one writes
    state = nnx.state(merged(m.model), nnx.Param)
    tensors = to_hf_tensors(m.config, state)
    if is_first():
        dtype = str(jax.tree.leaves(state)[0].dtype)
        _write_pretrained(m, tensors, dtype, target)
    wait_for_all(f"export of {target.name}")


def _write_pretrained(
    m: LoadedModel, tensors: dict[str, np.ndarray], dtype: str, target: AnyPath
) -> None:
    make_directory(target.parent)
    try:
        with staged_directory(target) as scratch:
            family = by_model_type(m.config.family, "export")
            hf_config = family.config_to_hf(m.config)
            hf_config.architectures = [family.architecture]
            hf_config.dtype = dtype
            hf_config.save_pretrained(scratch)
            m.tokenizer.save_pretrained(scratch)
            safetensors.numpy.save_file(tensors, scratch / "model.safetensors", {"format": "pt"})
    except (safetensors.SafetensorError, *buckets.errors()) as error:
        raise UserError(f"{target}: the model could not be written: {error}") from error


def to_hf_tensors(config: DecoderConfig, state: nnx.State) -> dict[str, np.ndarray]:
    """The parameters as Hugging Face tensors on the host.

    Args:
        config: The decoder.
        state: Its parameters.

    Returns:
        Name to array.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> state = nnx.state(Decoder(tiny_config(), rngs=nnx.Rngs(0)), nnx.Param)
        >>> to_hf_tensors(tiny_config(), state)["model.layers.1.mlp.down_proj.weight"].shape
        (32, 48)
    """
    flat = {".".join(map(str, path)): param for path, param in nnx.to_flat_state(state)}
    tensors: dict[str, np.ndarray] = {}
    fused: dict[str, list[tuple[Part, np.ndarray]]] = {}
    for weight in by_model_type(config.family, "export").weights(config):
        values = np.asarray(fetch(flat[weight.path][...]))
        layers = values if weight.stacked else values[None]
        for name, value in zip(hf_names(weight, len(layers)), layers, strict=True):
            tensor = value.T if weight.transpose else value
            if weight.part is None:
                tensors[name] = np.ascontiguousarray(tensor)
            else:
                fused.setdefault(name, []).append((weight.part, tensor))
    for name, parts in fused.items():
        tensors[name] = np.ascontiguousarray(Part.join(*zip(*parts, strict=True)))
    return tensors

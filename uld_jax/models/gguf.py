"""GGUF files as a source of Hugging Face tensors: read through `gguf`, dequantised by numpy."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from uld_jax.errors import UserError
from uld_jax.models.config import DecoderConfig
from uld_jax.models.families import Family, Weight, by_gguf_architecture, config_of_gguf
from uld_jax.models.reading import Box

LONG_ARRAY = 1024


class _HeaderReader(gguf.GGUFReader):
    """Reads all but the long arrays (the vocabulary), which cost GGUFReader ten seconds."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item_type, length = struct.unpack_from("<IQ", self.data.data, orig_offs)
        if length <= LONG_ARRAY or self.byte_order == "S":
            return super()._get_field_parts(orig_offs, raw_type)
        end, view = orig_offs + 12, self.data.data
        if item_type == gguf.GGUFValueType.STRING:
            for _ in range(length):
                end += 8 + struct.unpack_from("<Q", view, end)[0]
        else:
            item = self.gguf_scalar_to_np[gguf.GGUFValueType(item_type)]
            end += length * np.dtype(item).itemsize
        return end - orig_offs, [], [], [gguf.GGUFValueType.ARRAY]


class _Stored(NamedTuple):
    """Where and how a file holds a tensor."""

    kind: gguf.GGMLQuantizationType
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    values: tuple[int, ...]


class GgufSource:
    """A GGUF file seen as Hugging Face tensors.

    Args:
        path: The file.

    Raises:
        UserError: Not a GGUF file, cut short, or of an unsupported architecture.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = _HeaderReader(path)
            tensors = {t.name: t for t in reader.tensors}
            fields = {k: f.contents() for k, f in reader.fields.items() if f.data}
        except (ValueError, LookupError, ArithmeticError, struct.error) as error:
            raise UserError(
                f"{path}: not a complete GGUF file ({error}); its {path.stat().st_size} bytes may "
                "be a download cut short: fetch it again"
            ) from error
        if reader.byte_order == "S":
            raise UserError(f"{path}: big-endian GGUF files are not supported; convert it again")
        shapes = {name: tuple(t.shape.tolist()[::-1]) for name, t in tensors.items()}
        # Nothing here may keep the reader's map of the file: what has been read through it would
        # stay in memory.
        self._stored = {
            name: _Stored(t.tensor_type, t.data.dtype, t.data.shape, t.data_offset, shapes[name])
            for name, t in tensors.items()
        }
        try:
            self.family: Family = by_gguf_architecture(fields["general.architecture"], str(path))
            meta = fields | {"tensors": shapes}
            self.config: DecoderConfig = config_of_gguf(self.family, meta, str(path))
        except KeyError as error:
            raise UserError(f"{path}: GGUF metadata or tensor {error} is missing") from error
        self._names: dict[str, tuple[Weight, str]] = {}
        for weight in self.family.weights(self.config):
            for layer in range(self.config.layers if weight.stacked else 1):
                name = weight.hf.format(layer=layer)
                self._names[name] = (weight, weight.gguf.format(layer=layer))
        known = {theirs: ours for ours, (_, theirs) in self._names.items()}
        self.shapes = {known.get(name, name): shape for name, shape in shapes.items()}

    def read(self, name: str, boxes: Sequence[Box]) -> list[np.ndarray]:
        """Parts of one tensor in the Hugging Face layout, float32; all of it is dequantised."""
        weight, theirs = self._names[name]
        stored = self._stored[theirs]
        data = np.memmap(self.path, stored.dtype, "r", stored.offset, stored.shape)
        try:
            values = gguf.quants.dequantize(data, stored.kind)
        except NotImplementedError as error:
            raise UserError(
                f"{self.path}: tensor {theirs} is of type {stored.kind.name}, which "
                "cannot be dequantised; convert the model to another GGUF type"
            ) from error
        values = np.asarray(values.reshape(stored.values), np.float32)
        whole = self.family.gguf_to_hf(self.config, weight, values)
        return [whole[tuple(slice(*bounds) for bounds in box)] for box in boxes]

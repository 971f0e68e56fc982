"""GGUF files as a source of Hugging Face tensors: read through `gguf`, dequantised by numpy."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from uld_jax.errors import UserError
from uld_jax.models.config import DecoderConfig
from uld_jax.models.families import Family, Weight, by_gguf_architecture

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
            self._reader = _HeaderReader(path)
            self._tensors = {t.name: t for t in self._reader.tensors}
            fields = {k: f.contents() for k, f in self._reader.fields.items() if f.data}
        except (ValueError, LookupError, ArithmeticError, struct.error) as error:
            raise UserError(
                f"{path}: not a complete GGUF file ({error}); its {path.stat().st_size} bytes may "
                "be a download cut short: fetch it again"
            ) from error
        if self._reader.byte_order == "S":
            raise UserError(f"{path}: big-endian GGUF files are not supported; convert it again")
        shapes = {name: tuple(t.shape.tolist()[::-1]) for name, t in self._tensors.items()}
        try:
            self.family: Family = by_gguf_architecture(fields["general.architecture"], str(path))
            self.config: DecoderConfig = self.family.config_from_gguf(fields | {"tensors": shapes})
        except KeyError as error:
            raise UserError(f"{path}: GGUF metadata or tensor {error} is missing") from error
        self._names: dict[str, tuple[Weight, str]] = {}
        for weight in self.family.weights(self.config):
            for layer in range(self.config.layers if weight.stacked else 1):
                name = weight.hf.format(layer=layer)
                self._names[name] = (weight, weight.gguf.format(layer=layer))
        known = {theirs: ours for ours, (_, theirs) in self._names.items()}
        self.shapes = {known.get(name, name): shape for name, shape in shapes.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor in the Hugging Face layout, float32."""
        weight, stored = self._names[name]
        tensor = self._tensors[stored]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(
                f"{self.path}: tensor {stored} is of type {tensor.tensor_type.name}, which "
                "cannot be dequantised; convert the model to another GGUF type"
            ) from error
        values = values.reshape(tuple(tensor.shape.tolist()[::-1])).astype(np.float32)
        return self.family.gguf_to_hf(self.config, weight, values)

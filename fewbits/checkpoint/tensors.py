"""Tensors to and from safetensors bytes: one tensor at a time out, one verified buffer in.

The layout is that of safetensors: 8 bytes little-endian header length, a JSON header {name: {dtype, shape,
data_offsets}}, the data. Its own writer would hold a second copy of the model and hash nothing; these few lines stream
from any device and read exactly the bytes that were hashed. Nothing here can run code.
Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 64  # of the first data byte, so that wide loads of a tensor in the read buffer stay aligned


def tensor_pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The file as pieces. Tensors of any device and layout; only one is on the host at a time.

    Errors: TypeError for a dtype that safetensors cannot hold."""
    # Wide elements first: then every tensor starts at a multiple of its own element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise TypeError(f"safetensors cannot hold {name} of {tensor.dtype}")
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        if tensors[name].numel():
            flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data


def parse_tensors(buffer: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a whole file in `buffer` (uint8 [bytes]). The tensors are views of it.

    Errors: ValueError when the bytes are not a safetensors file."""
    if len(buffer) < 8:
        raise ValueError("it is shorter than a safetensors header")
    (length,) = struct.unpack("<Q", buffer[:8].numpy().tobytes())
    if length > len(buffer) - 8:
        raise ValueError("its header is longer than the file")
    try:
        header = json.loads(buffer[8 : 8 + length].numpy().tobytes().decode())
        metadata = header.pop("__metadata__", {})
        data = buffer[8 + length :]
        tensors = {name: _tensor(data, **entry) for name, entry in header.items()}
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"its header is not one of safetensors ({error})") from None
    return tensors, metadata


def _tensor(data: Tensor, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    kind, (start, end) = DTYPES[dtype], data_offsets
    if not 0 <= start <= end <= len(data) or end - start != prod(shape) * kind.itemsize:
        raise ValueError("its header and its data do not fit each other")
    part = data[start:end]
    if part.storage_offset() % kind.itemsize:  # another writer need not align; ours does
        part = part.clone()
    return part.view(kind).reshape(shape)

"""Tensors to and from safetensors bytes, one tensor at a time, so that whoever moves the bytes can hash them.

The layout is that of safetensors: 8 bytes little-endian header length, a JSON header {name: {dtype, shape,
data_offsets}}, the data. Its own writer would hold a second copy of the model and hash nothing; these few lines stream
from any device, and what is read is exactly the bytes that were hashed. Nothing here can run code.
Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
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
_ALIGNMENT = 64  # of the first data byte, so that whoever maps the file into memory gets aligned tensors


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


def read_tensors(fill: Callable[[memoryview], None], size: int) -> dict[str, Tensor]:
    """The tensors of a file of `size` bytes, each in a storage of its own, from a reader that fills what it is given.

    Nothing in the file is trusted: a changed header raises before more than the file's size is allocated.
    Errors: ValueError when the bytes are not a safetensors file without holes."""
    first = bytearray(min(8, size))
    fill(memoryview(first))
    length = struct.unpack("<Q", first)[0] if size >= 8 else size
    if length > size - 8:
        raise ValueError("its header is longer than the file")
    text = bytearray(length)
    fill(memoryview(text))
    try:
        header = json.loads(text.decode())
        header.pop("__metadata__", None)
        entries = [
            (*map(int, entry["data_offsets"]), DTYPES[entry["dtype"]], [int(length) for length in entry["shape"]], name)
            for name, entry in header.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is not one of safetensors ({error})") from None
    tensors, position = {}, 0
    for start, end, dtype, shape, name in sorted(entries, key=lambda entry: entry[:2]):
        if start != position or min(shape, default=1) < 0 or end - start != prod(shape) * dtype.itemsize:
            raise ValueError(f"the entry of {name} does not fit its data")
        if end > size - 8 - len(text):
            raise ValueError("its data is shorter than its header says")
        tensor, position = torch.empty(shape, dtype=dtype), end
        if end > start:
            fill(tensor.reshape(-1).view(torch.uint8).numpy().data)
        tensors[name] = tensor
    if position != size - 8 - len(text):
        raise ValueError("its data is longer than its header says")
    return tensors

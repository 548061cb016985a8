"""How quantized weights stand in safetensors and config.json, so that other libraries read them.

| weights                      | quant_method, format                | tensors of a layer, rows O, columns K            |
|------------------------------|-------------------------------------|--------------------------------------------------|
| int4, int8                   | compressed-tensors, pack-quantized  | weight_packed int32, weight_scale, weight_shape  |
| int8 with int8 activations   | compressed-tensors, int-quantized   | weight int8 [O, K], weight_scale                 |
| fp8_e4m3, any activations    | compressed-tensors, float-quantized | weight float8 [O, K], weight_scale               |
| other formats (fp4, binary)  | fewbits, packed                     | weight_packed uint8, weight_scale                |

weight_packed int32 holds `integer + 2**(bits - 1)`, the first in the lowest bits, rows filled up to whole words: as bytes
that is our own packing with the sign bit of every code flipped. weight_scale is [O, K / group], one column for rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.nn.packed import Activations, Scheme
from fewbits.numerics.affine import packed_width

METHOD, OWN = "compressed-tensors", "fewbits"
_SIGNS = {4: 0x88, 8: 0x80}  # flips the sign bit of every code in a byte
_WORD = 4  # bytes of an int32


def quantization_config(scheme: Scheme, ignored: Sequence[str]) -> dict[str, Any]:
    """What config.json says under "quantization_config". ignored: full names of linear layers that are kept."""
    layout, fmt = _layout(scheme), scheme.format
    if layout == "packed":
        return {
            "quant_method": OWN,
            "format": layout,
            "weights": fmt.name,
            "granularity": scheme.granularity,
            "ignore": list(ignored),
        }
    kind = {"num_bits": fmt.bits, "type": "int" if fmt.kind == "int" else "float", "symmetric": True}
    group = scheme.granularity.partition(":")[2]
    weights = {
        **kind,
        "strategy": "group" if group else "channel",
        "group_size": int(group) if group else None,
        "dynamic": False,
    }
    activations = {**kind, "strategy": "token", "dynamic": True} if scheme.activations != "none" else None
    return {
        "quant_method": METHOD,
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations,
                "output_activations": None,
                "format": layout,
            }
        },
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def read_scheme(config: Mapping[str, Any]) -> Scheme:
    """The inverse of `quantization_config`, also for folders that other tools wrote.

    Raises FewbitsError for a method, layout or arithmetic that this version does not read."""
    method = config.get("quant_method")
    if method == OWN:
        return Scheme(Format.parse(str(config.get("weights"))), str(config.get("granularity")))
    if method != METHOD:
        raise FewbitsError(f"config.json says quant_method {method!r}; fewbits reads {METHOD} and its own.")
    groups = list((config.get("config_groups") or {}).values())
    if len(groups) != 1 or not isinstance(groups[0], Mapping):
        raise FewbitsError(f"The checkpoint has {len(groups)} groups of quantized layers; fewbits reads one.")
    weights, inputs = groups[0].get("weights") or {}, groups[0].get("input_activations")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    name = {("int", 4): "int4", ("int", 8): "int8", ("float", 8): "fp8_e4m3"}.get((str(kind), int(bits or 0)))
    if name is None or strategy not in ("channel", "group") or not weights.get("symmetric", True):
        raise FewbitsError(
            f"The weights are {kind}{bits}, {strategy}, {'' if weights.get('symmetric', True) else 'a'}symmetric; fewbits "
            "reads symmetric int4, int8 and fp8 with one scale a row or a group of a row."
        )
    dynamic = isinstance(inputs, Mapping) and inputs.get("dynamic") is True and inputs.get("strategy") == "token"
    activations: Activations = "none"
    if isinstance(inputs, Mapping) and dynamic and inputs.get("num_bits") == 8:
        activations = "fp8" if inputs.get("type") == "float" else "int8"
    elif inputs is not None:
        raise FewbitsError("The activations are quantized; fewbits reads int8 and fp8 ones with a scale a token only.")
    granularity = f"group:{weights['group_size']}" if strategy == "group" else "row"
    scheme = Scheme(Format.parse(name), granularity, activations).check()
    if (layout := config.get("format")) not in ("pack-quantized", "int-quantized", "float-quantized"):
        raise FewbitsError(f"config.json says format {layout!r}, which fewbits does not read.")
    return scheme


def store_layer(codes: Tensor, scale_OG: Tensor, scheme: Scheme, columns: int) -> dict[str, Tensor]:
    """The stored tensors of one layer by the last part of their name; codes as `PackedLinear` holds them."""
    layout, fmt = _layout(scheme), scheme.format
    if layout in ("int-quantized", "float-quantized"):
        assert fmt.dtype is not None
        return {"weight": codes.view(fmt.dtype), "weight_scale": scale_OG}
    if layout == "packed":
        return {"weight_packed": codes, "weight_scale": scale_OG}
    missing = -codes.shape[1] % _WORD
    whole = torch.nn.functional.pad(codes ^ _SIGNS[fmt.bits], (0, missing)).contiguous()
    shape = torch.tensor([codes.shape[0], columns])
    return {"weight_packed": whole.view(torch.int32), "weight_scale": scale_OG, "weight_shape": shape}


def read_layer(name: str, stored: Mapping[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(codes uint8, scale [O, G]) from the stored tensors of the layer `name`, whose keys are as `store_layer` gives.

    Raises FewbitsError for tensors that do not belong to the scheme."""
    codes, scale = stored.get("weight_packed", stored.get("weight")), stored["weight_scale"]
    zero = stored.get("weight_zero_point")
    if zero is not None and bool(zero.any()):
        raise FewbitsError(f"'{name}' has zero points; fewbits reads symmetric weights only.")
    if codes is None or codes.ndim != 2 or codes.element_size() not in (1, 4):
        raise FewbitsError(f"'{name}' has a weight_scale but no codes of {scheme}. The file is incomplete.")
    scale = scale.reshape(codes.shape[0], -1)
    if codes.dtype != torch.int32:
        return codes.contiguous().view(torch.uint8), scale
    columns = int(stored["weight_shape"][1]) if "weight_shape" in stored else codes.shape[1] * 32 // scheme.format.bits
    raw = codes.contiguous().view(torch.uint8) ^ _SIGNS[scheme.format.bits]
    raw = raw[:, : packed_width(columns, scheme.format.bits)].clone()
    if scheme.format.bits == 4 and columns % 2:
        raw[:, -1] &= 0x0F  # what fills the last byte is 0 here
    return raw, scale


SUFFIXES = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def _layout(scheme: Scheme) -> str:
    fmt = scheme.format
    if fmt.name == "int8" and scheme.activations == "int8":
        return "int-quantized"
    if fmt.name in ("int4", "int8"):
        return "pack-quantized"
    return "float-quantized" if fmt.name == "fp8_e4m3" else "packed"

"""The linear layer of a model that was made small: codes and scales instead of a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.kernels.dispatch import int8_execution
from fewbits.kernels.int8_matmul import int8_matmul
from fewbits.kernels.matmul import ROW, scaled_matmul
from fewbits.nn.linear import linear
from fewbits.numerics.affine import group_width, grouped, pack, packed_width, unpack
from fewbits.numerics.quantize import Quantized, quantize
from fewbits.numerics.scaling import quotient

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Activations = Literal["none", "int8", "fp8"]


@dataclass(frozen=True)
class Scheme:
    """How the weights of a model are stored: `value = code * scale`, the same for every packed layer."""

    format: Format
    granularity: str
    """"row" or "group:N", what shares one scale."""
    activations: Activations = "none"
    """What enters a packed layer is rounded with one scale a token: "int8", multiplied in integers, or "fp8" (e4m3)."""

    def __str__(self) -> str:
        activations = "" if self.activations == "none" else f", activations {self.activations}"
        return f"{self.format} {self.granularity}{activations}"

    def check(self) -> Scheme:
        """Itself. Raises FewbitsError for integers that cannot be multiplied: other formats, scales inside a row."""
        partner = {"int8": "int8", "fp8": "fp8_e4m3"}.get(self.activations, self.format.name)
        if self.activations != "none" and (self.format.name != partner or self.granularity != "row"):
            raise FewbitsError(
                f"Activations in {self.activations} multiply {self.activations} weights with one scale a row, not "
                f"{self.format} {self.granularity}. Use format {self.activations} with granularity row, or activations none."
            )
        return self


class PackedLinear(nn.Module):
    """A linear layer [..., K] -> [..., O] whose weight is codes and scales. For use, not for training.

    codes: uint8 [O, ceil(K * bits / 8)], what `Format.encode` gives, packed. scale: [O, G] in the dtype that the layer
    computes in (fp32, bf16 or fp16), one for K / G neighbours of a row. bias: [O] or None, kept as it was.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, scheme: Scheme, in_features: int):
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, codes.shape[0], scheme
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._powers: bool | None = None
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @staticmethod
    def from_values(values_OK: Tensor, scale_OG: Tensor, bias: Tensor | None, scheme: Scheme) -> PackedLinear:
        """The layer of a weight `values * scale`; values are on the grid of the format, any float dtype."""
        fmt = scheme.format
        codes = pack(fmt.encode(values_OK), fmt.bits)
        return PackedLinear(codes, scale_OG, bias, scheme, values_OK.shape[1])

    @property
    def weight(self) -> Tensor:
        """The weight [O, K] in the dtype of the scale: code times scale, rounded once (the codes are exact in it)."""
        values = grouped(self._values(), self.scheme.granularity)
        return (values * self.scale.unsqueeze(-1)).flatten(1)

    @property
    def bytes(self) -> int:
        """What codes, scales and bias take."""
        held = [self.codes, self.scale, *([] if self.bias is None else [self.bias])]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., O] in the dtype of the scale."""
        if self.scheme.activations == "int8":
            return self._multiply_integers(x)
        if self.scheme.activations == "fp8":
            return self._multiply_fp8(x)
        return linear(x, self.weight, self.bias)

    def _multiply_integers(self, x: Tensor) -> Tensor:
        """x rounded to int8 with one scale a token, products and sums in integers where that pays.

        The scale is the largest |x| / 127.5, as compressed-tensors takes it, so that its answers are ours. Elsewhere the
        same integers are multiplied in the dtype of the scale: equal up to the rounding of the sums. A token that is not
        finite gives NaN, because its scale is not."""
        x_NK = x.reshape(-1, x.shape[-1]).float()
        largest_N1 = torch.linalg.vector_norm(x_NK, torch.inf, -1, keepdim=True) if x_NK.numel() else x_NK[:, :1]
        scale_N1 = torch.where(largest_N1 == 0, 1.0, quotient(largest_N1, 127.5))
        integers_NK = (x_NK / scale_N1).round_().clamp_(-128, 127).to(torch.int8)
        weight_OK = self.codes.view(torch.int8)
        dtype = self.scale.dtype
        if int8_execution(x.device, dtype).value == "integers":
            sums_NO = int8_matmul(integers_NK, weight_OK).float()
        else:
            sums_NO = linear(integers_NK.to(dtype), weight_OK.to(dtype)).float()
        y_NO = sums_NO.mul_(scale_N1).mul_(self.scale.float().t())
        if self.bias is not None:
            y_NO.add_(self.bias.float())
        return y_NO.to(dtype).view(*x.shape[:-1], self.out_features)

    def _multiply_fp8(self, x: Tensor) -> Tensor:
        """x rounded to e4m3 with one scale a token, a power of two; products and sums as in training."""
        fmt, dtype = self.scheme.format, self.scale.dtype
        if self._powers is None:  # then code * scale is exact in bf16; asked once, because it waits for the device
            self._powers = bool((torch.frexp(self.scale.float()).mantissa == 0.5).all())
        codes = self.codes.view(torch.float8_e4m3fn)
        right = Quantized(codes, self.scale.float(), fmt, ROW, "power-of-two" if self._powers else "exact")
        left = quantize(x.reshape(-1, x.shape[-1]).to(dtype), fmt, ROW)
        return scaled_matmul(left, right, "fp32", dtype, self.bias).view(*x.shape[:-1], self.out_features)

    def _values(self) -> Tensor:
        """The decoded codes [O, K] in the dtype of the scale: one look-up a byte, whatever number of codes it holds.

        The values of a byte are fetched as one word where there is an integer that wide: 0.33 ms for a million int4
        codes to bf16 on two cores, against 0.85 ms as rows of two."""
        fmt, dtype = self.scheme.format, self.scale.dtype
        if fmt.name == "int8":
            return self.codes.view(torch.int8).to(dtype)
        key = (self.codes.device, dtype)
        if key not in self._tables:
            every = torch.arange(256, dtype=torch.uint8, device=self.codes.device).unsqueeze(1)
            self._tables[key] = fmt.decode(unpack(every, fmt.bits, 8 // fmt.bits)).to(dtype)
        table = self._tables[key]
        word = _WORDS.get(table.shape[1] * dtype.itemsize)
        table = table if word is None else table.view(word)
        rows = table.index_select(0, self.codes.reshape(-1).int()).view(dtype)
        return rows.view(self.out_features, -1)[:, : self.in_features]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Moves between devices like any module; a dtype is not taken over, because scales belong to their codes."""
        dtype = self.scale.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale = self.scale.to(dtype)
        return self

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.in_features}, {self.out_features}, {self.scheme}"


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers of a model by name; empty for a model that is not quantized."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def refuse_packed(model: nn.Module, what: str) -> None:
    """Raises FewbitsError when `model` is quantized: `what` (such as "be trained in bf16-mixed") cannot be done to it."""
    packed = packed_layers(model)
    if packed:
        scheme = next(iter(packed.values())).scheme
        raise FewbitsError(
            f"The model is quantized ({scheme}, {len(packed)} layers), so it cannot {what}. Use the checkpoint that it "
            "was made from."
        )


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where `name` is in `model`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def make_packed(model: nn.Module, tensors: Mapping[str, Tensor], scheme: Scheme) -> None:
    """Replaces the linear layers for which `tensors` holds `NAME.codes` by empty packed ones of the right shapes.

    Raises FewbitsError for a granularity that does not divide a layer, and for codes of what is no linear layer.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    for name in (key.removesuffix(".codes") for key in list(tensors) if key.endswith(".codes")):
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise FewbitsError(f"The checkpoint holds codes for '{name}', which is no linear layer of its model.")
        rows, columns = module.weight.shape
        groups = columns // group_width(scheme.granularity, columns, name)
        codes = torch.empty(rows, packed_width(columns, scheme.format.bits), dtype=torch.uint8)
        packed = PackedLinear(codes, torch.empty(rows, groups), module.bias, scheme, columns)
        replace_module(model, name, packed)

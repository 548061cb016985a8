"""Emulation for models that are not ours: 16-bit matmuls of any module run as fp32 on their exact values.

torch's CPU kernels multiply fp16, and bf16 without avx512_bf16 or AMX, 20 to 150 times slower than fp32. Within
`emulation`, every matmul, convolution and attention kernel on 16-bit CPU tensors gets widened inputs, and what comes out
is rounded back. Our own modules say this explicitly (fewbits.nn.linear, fewbits.nn.attention), which also compiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fewbits.kernels.dispatch import emulated
from fewbits.nn.linear import FORMAT_OF

_aten = torch.ops.aten
# Operation -> which of its results are rounded back (the log-sum-exp of attention stays fp32, as the kernel gives it).
_WIDENED: dict[Any, tuple[int, ...]] = {
    _aten.mm.default: (0,),
    _aten.addmm.default: (0,),
    _aten.bmm.default: (0,),
    _aten.baddbmm.default: (0,),
    _aten.mv.default: (0,),
    _aten.addmv.default: (0,),
    _aten.convolution.default: (0,),
    _aten.convolution_backward.default: (0, 1, 2),
    _aten._scaled_dot_product_flash_attention_for_cpu.default: (0,),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (0, 1, 2),
}
_HALF = tuple(FORMAT_OF)


class _Emulation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rounded = _WIDENED.get(func)
        dtype = next(
            (a.dtype for a in args if isinstance(a, Tensor) and a.dtype in _HALF and a.device.type == "cpu"), None
        )
        if rounded is None or dtype is None:
            return func(*args, **kwargs)

        def widen(x: Any) -> Any:
            return x.float() if isinstance(x, Tensor) and x.dtype in _HALF else x

        out = func(*tree_map(widen, args), **tree_map(widen, kwargs))
        if isinstance(out, Tensor):
            return out.to(dtype)
        return tuple(x.to(dtype) if i in rounded and isinstance(x, Tensor) else x for i, x in enumerate(out))


@contextmanager
def emulation(active: bool) -> Iterator[None]:
    """Widens 16-bit CPU matmuls of any module within, forward and backward, when `active`."""
    if not active:
        yield
        return
    with _Emulation():  # type: ignore[no-untyped-call]
        yield


def needed(model: nn.Module) -> bool:
    """Whether a prepared model holds modules that are not ours and 16-bit weights that its device cannot multiply."""
    report = getattr(model, "fewbits_report", None)
    if report is None or not report.foreign:
        return False
    pairs = {(p.dtype, p.device.type) for p in model.parameters() if p.dtype in FORMAT_OF}
    return any(device == "cpu" and emulated(FORMAT_OF[dtype], device) for dtype, device in pairs)

"""Attention, forward and backward, by every kernel that torch has: causal, and with documents that do not see each other.

    python bench/attention.py                     # on a GPU, a minute or two: bench/results/attention.json
    python bench/attention.py --smoke             # tiny shapes, any machine, writes nothing

bf16, heads and keys as the works of bench/train_step.py have them, q, k and v slices of one product. "documents N": windows are
cut from documents of N tokens on average (exponential lengths, as packing meets them); causal kernels get the mask
[B, 1, T, T] that nn/attention.py makes, the kernel for packed sequences their borders, and flex attention its block mask,
whose making is not timed, as one mask serves all layers. A row: milliseconds, the median of rounds in which all take turns.
"""

from __future__ import annotations

import argparse
import inspect
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from blocks import ROOT, save
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(ROOT))

from levers import documents, wait

from fewbits.nn.documents import block_mask, document_mask
from fewbits.nn.timing import clock, race

WORKS = {  # B, query heads, key heads, T, d
    "gpt2-124m": (32, 12, 12, 1024, 64),
    "minimind-64m": (32, 8, 4, 1024, 96),
    "minimind-64m, windows of 512": (64, 8, 4, 512, 96),
    "gpt2-124m, windows of 512": (64, 12, 12, 512, 64),
    "llama-1b": (8, 32, 4, 2048, 64),
    "llama-1b-8k": (2, 32, 4, 8192, 64),
    "heads of 128": (8, 16, 8, 2048, 128),
}
LENGTHS = (0, 4096, 512)  # tokens of a document on average; 0: no documents
BACKENDS = {
    "torch's choice": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
DTYPE = torch.bfloat16


def by_torch(backend: SDPBackend | None, mask: Tensor | None, heads: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def attend() -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=k.shape[1] != heads
            )

        if backend is None:
            return attend()
        with sdpa_kernel(backend):
            return attend()

    return run


def packed(
    documents_BT: Tensor | None, B: int, T: int, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The kernel for packed sequences: it sees where documents begin."""
    from torch.nn.attention.varlen import varlen_attn

    begins = torch.ones(B, T, dtype=torch.bool, device=device)
    if documents_BT is None:
        begins[:, 1:] = False
    else:
        begins[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts = begins.flatten().nonzero().flatten().to(torch.int32)
    borders = torch.cat((starts, torch.tensor([B * T], dtype=torch.int32, device=device)))

    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = [x.transpose(1, 2).reshape(B * T, x.shape[1], x.shape[3]) for x in (q, k, v)]
        grouped = {"enable_gqa": k.shape[1] != q.shape[1]} if "enable_gqa" in known else {}
        out: Any = varlen_attn(*flat, borders, borders, T, T, **causal, **grouped)  # type: ignore[arg-type]
        return out.view(B, T, q.shape[1], -1).transpose(1, 2)  # type: ignore[no-any-return]

    return run


def flex(
    documents_BT: Tensor | None, B: int, T: int, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Flex attention with our blocks."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(torch.zeros(B, T, dtype=torch.int32, device=device) if documents_BT is None else documents_BT)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=mask, enable_gqa=k.shape[1] != q.shape[1])  # type: ignore[return-value]

    return run


def measure(work: tuple[int, ...], length: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Kernel -> milliseconds and the largest difference from torch's choice, or why it does not run."""
    B, H, G, T, d = work
    torch.manual_seed(0)
    product = torch.randn(B, T, H + 2 * G, d, device=device, dtype=DTYPE).requires_grad_()
    grad = torch.randn(B, T, H, d, device=device, dtype=DTYPE).transpose(1, 2)
    ids = documents((B, T), length, device)["documents"] if length else None
    mask = None if ids is None else document_mask(ids)
    makers: dict[str, Callable[[], Callable[..., Tensor]]] = {
        **{name: partial(by_torch, backend, mask, H) for name, backend in BACKENDS.items()},
        "packed": partial(packed, ids, B, T, device),
        "flex": partial(flex, ids, B, T, device),
    }
    found: dict[str, Any] = {}
    steps: dict[str, Callable[[], None]] = {}
    base: Tensor | None = None
    for name, make in makers.items():
        try:
            kernel = make()

            def step(kernel: Callable[..., Tensor] = kernel) -> None:
                product.grad = None
                q, k, v = (x.transpose(1, 2) for x in product.split([H, G, G], 2))
                kernel(q, k, v).backward(grad)

            for _ in range(3):
                step()
            wait(device)
        except Exception as error:
            found[name] = {"error": (str(error).splitlines() or [""])[0][:200]}
            continue
        result = product.grad.float()  # type: ignore[union-attr]
        base = result if base is None else base
        found[name] = {"off": float((result - base).norm() / base.norm())}
        steps[name] = step
    calls = 1 if device.type == "cpu" else 5
    clocks = {name: clock(step, calls, device) for name, step in steps.items()}
    times = race(clocks, next(iter(BACKENDS)), rounds, budget_s=math.inf)
    for name, values in times.items():
        found[name] |= {"ms": round(statistics.median(values), 4), "spread": round(max(values) / min(values) - 1, 3)}
    return found


def main() -> None:
    """All works with all lengths; prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="attention")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not a.smoke else "cpu")
    results: dict[str, Any] = {}
    for name, work in WORKS.items():
        shape = (1, work[1] // work[2], 1, 64, 16) if a.smoke else work
        for length in LENGTHS:
            torch._dynamo.reset()
            row = measure(shape, length // 128 if a.smoke else length, device, 1 if a.smoke else a.rounds)
            key = f"{name}, documents {length}" if length else f"{name}, causal"
            results[key] = row
            shown = ", ".join(f"{kernel} {f.get('ms', f.get('error', ''))}" for kernel, f in row.items())
            print(f"{key:32s} {shown}", flush=True)
            if not a.smoke:
                save(a.name, {"results": results})


if __name__ == "__main__":
    main()

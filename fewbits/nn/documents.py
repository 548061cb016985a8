"""Which keys a query sees where documents share a window: pair by pair, or in blocks, so that a kernel skips what nobody sees.

Flex attention (Dong et al. 2024) computes those blocks of scores alone that a document reaches; it is compiled with what
surrounds it, on CUDA. torch's other kernels take a mask of pairs and compute every score: twice what causal ones cost, and more
(bench/attention.py).
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

SIDE = 128
"""Queries and keys of a block."""
HEADS = (64, 128)  # the least and the greatest width of a head that blocks were timed with, on an H200
CONTEXT = 1024  # the shortest
CAPABILITY = (9, 0)  # the least: the kernel's backward pass wants more shared memory than small cards have

Mask: TypeAlias = Tensor | BlockMask | None
"""What attention is told: bool of a shape that broadcasts to [B, H, T, T], true where a key counts; blocks; None for causal."""


def document_mask(documents_BT: Tensor) -> Tensor:
    """Boolean [B, 1, T, T]: true where the key is not later than the query and in the same document."""
    T = documents_BT.shape[1]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=documents_BT.device).tril()
    same_BTT = documents_BT.unsqueeze(2) == documents_BT.unsqueeze(1)
    return (same_BTT & causal_TT).unsqueeze(1)


def block_mask(documents_BT: Tensor) -> BlockMask:
    """`document_mask` for flex attention, in blocks of SIDE x SIDE.

    A block is left out where the ranges of document numbers of its queries and keys do not meet, or its keys are later, and
    taken whole where all of both are of one document, and earlier; in the others every pair is looked at. That holds for any
    numbers, and leaves out all that can be left out where numbers grow along a window. No shape depends on the documents,
    and nothing waits for the device.
    """
    B, T = documents_BT.shape
    count = -(-T // SIDE)
    last = documents_BT[:, -1:].expand(B, count * SIDE - T)
    cut = torch.cat((documents_BT, last), 1).view(B, count, SIDE)
    low, high = cut.amin(-1), cut.amax(-1)
    place = torch.arange(count, device=documents_BT.device)
    not_later, earlier = place[:, None] >= place, place[:, None] > place
    meet = not_later & (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
    alone = low == high
    whole = meet & earlier & alone[:, :, None] & alone[:, None]

    def sees(b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents_BT[b, query] == documents_BT[b, key])

    return BlockMask.from_kv_blocks(
        *_listed(meet & ~whole), *_listed(whole), BLOCK_SIZE=SIDE, mask_mod=sees, seq_lengths=(T, T)
    )


def fits_blocks(head_dim: int, context: int, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether compiled attention on CUDA was seen to be faster with blocks, in 16 bits (bench/attention.py). capability: of
    the device."""
    measured = HEADS[0] <= head_dim <= HEADS[1] and context >= CONTEXT and capability >= CAPABILITY
    return measured and dtype in (torch.bfloat16, torch.float16)


def _listed(blocks_BQK: Tensor) -> tuple[Tensor, Tensor]:
    """For every row of blocks how many are set, int32 [B, 1, Q], and which, int32 [B, 1, Q, K], those first and in order."""
    set_B1QK = blocks_BQK.unsqueeze(1).to(torch.int32)
    order = torch.argsort(set_B1QK, dim=-1, descending=True, stable=True)
    return set_B1QK.sum(-1, dtype=torch.int32), order.to(torch.int32)

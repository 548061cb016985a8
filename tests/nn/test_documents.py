"""Documents that share a window do not see each other, whether attention is told so by pairs or by blocks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask

from fewbits import ModelConfig, Transformer
from fewbits.nn.attention import attend
from fewbits.nn.documents import SIDE, block_mask, document_mask, fits_blocks
from fewbits.numerics import attention as definition


def growing(B: int, T: int, length: float, seed: int = 0) -> Tensor:
    """int32 [B, T], as packing numbers documents: growing along a window; the first row is one document."""
    begins = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 1 / length
    begins[0] = False
    return begins.cumsum(1).to(torch.int32)


def pairs(mask: BlockMask, T: int) -> Tensor:
    """Boolean [B, 1, T, T]: what a kernel that looks at the listed blocks alone lets through."""
    B = mask.kv_indices.shape[0]
    place = torch.arange(T)
    looked = mask.mask_mod(torch.arange(B).view(-1, 1, 1, 1), torch.zeros(()), place.view(-1, 1), place)
    found = torch.zeros(B, 1, T, T, dtype=torch.bool)
    lists = (mask.kv_num_blocks, mask.kv_indices, looked), (mask.full_kv_num_blocks, mask.full_kv_indices, None)
    for counts, indices, allowed in lists:
        for b, _, row in counts.nonzero().tolist():
            for column in indices[b, 0, row, : counts[b, 0, row]].tolist():
                block = (b, 0, slice(SIDE * row, SIDE * (row + 1)), slice(SIDE * column, SIDE * (column + 1)))
                assert not found[block].any()  # no block is listed twice
                found[block] = True if allowed is None else allowed[block]
    return found


@pytest.mark.parametrize("T", [SIDE, 2 * SIDE, 5 * SIDE, 3 * SIDE + 1, 4 * SIDE - 1, 7])
@pytest.mark.parametrize("length", [3, 100, 400])
def test_blocks_let_through_what_pairs_do(T, length):
    documents = growing(4, T, length)
    assert torch.equal(pairs(block_mask(documents), T), document_mask(documents))


def test_numbers_may_come_back_and_be_negative():
    generator = torch.Generator().manual_seed(0)
    runs = torch.randint(-2, 2, (3, 12), generator=generator, dtype=torch.int32)
    documents = runs.repeat_interleave(50, 1)
    documents[0] = 0
    documents[0, 256:384] = 5  # a whole block of another document between two of one
    assert torch.equal(pairs(block_mask(documents), 600), document_mask(documents))


def test_no_block_is_looked_at_that_nobody_sees_and_none_pair_by_pair_that_is_seen_whole():
    documents = growing(4, 6 * SIDE, 150)
    mask = block_mask(documents)
    cut = document_mask(documents).view(4, 6, SIDE, 6, SIDE).transpose(2, 3)
    seen, whole = cut.any(-1).any(-1), cut.all(-1).all(-1)
    listed, full = mask.kv_num_blocks.sum(), mask.full_kv_num_blocks.sum()
    assert int(listed + full) == int(seen.sum()) and int(full) == int(whole.sum()) > 0
    assert int(seen.sum()) < 4 * 6 * 7 / 2  # of causal attention


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("T", [2 * SIDE, 300])
def test_attention_with_blocks_is_attention_and_is_compiled_once_for_all_documents(groups, T):
    torch._dynamo.reset()
    compiled = CompileCounter()
    run = torch.compile(attend, backend=compiled, dynamic=False)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(2, T, H, 16, generator=generator).transpose(1, 2) for H in (4, groups, groups))
        documents = growing(2, T, 60, seed)
        y = run(q, k, v, block_mask(documents), 0.0)
        times = 4 // groups
        wanted = definition.attention(q, *(x.repeat_interleave(times, 1) for x in (k, v)), document_mask(documents))
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    assert compiled.frame_count == 1


def test_blocks_are_for_what_was_timed():
    bf16, hopper = torch.bfloat16, (9, 0)
    assert fits_blocks(64, 1024, bf16, hopper) and fits_blocks(96, 1025, torch.float16, (10, 0))
    assert not fits_blocks(32, 1024, bf16, hopper) and not fits_blocks(256, 1024, bf16, hopper)
    assert not fits_blocks(64, 1023, bf16, hopper) and not fits_blocks(64, 1024, torch.float32, hopper)
    assert not fits_blocks(64, 1024, bf16, (8, 9))


class OnGPU(Tensor):
    is_cuda = True


def test_only_compiled_training_on_a_gpu_by_attention_of_ours_is_told_of_blocks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    documents = growing(1, 1024, 60)
    on_gpu = documents.as_subclass(OnGPU)
    config = ModelConfig(vocab_size=61, context=1024, n_layer=2, n_head=1, n_embd=64)

    def takes(model: Transformer, documents: Tensor = on_gpu) -> bool:
        return model._takes_blocks(documents, torch.bfloat16)

    model = Transformer(config)
    assert not takes(model)  # eager
    model.compile_blocks()
    assert takes(model) and not takes(model, documents)
    assert isinstance(model._mask(documents, torch.bfloat16), Tensor)
    assert not takes(model.eval()) and takes(model.train())
    attention, block = model.blocks[1].attention, model.blocks[1]
    model.blocks[1].attention = type("Theirs", (type(attention),), {})(64, 1, 1, True, False, 1e-5, 0.0)
    assert not takes(model)
    block.attention = attention
    assert takes(model)
    model.blocks[1] = type("Theirs", (type(block),), {})(config)
    assert not takes(model)
    dropping = Transformer(dataclasses.replace(config, dropout=0.1))
    dropping.compile_blocks()
    assert not takes(dropping)

"""Random bits are one function of key and index, and they look random: balanced, unrelated between keys and indices."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from fewbits.errors import FewbitsError
from fewbits.numerics.random import keyed_random, mix_key, random_bits, spread_key

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KEYS = [0, 1, -5, 2**63 + 12345, mix_key(3, 4)]
SIGMAS = 5.0  # a test of about a thousand statistics then fails by chance once in 2,000 choices of the seed


def by_hand(key: int, index: int) -> int:
    """The recipe of the docstring, in Python's integers."""

    def triple(h: int, a: int, b: int) -> int:
        h ^= a
        h = (h ^ (h >> 17)) * 0xED5AD4BB % 2**32
        h = (h + b) % 2**32
        h = (h ^ (h >> 11)) * 0xAC4C1B51 % 2**32
        h = (h ^ (h >> 15)) * 0x31848BAB % 2**32
        return h ^ (h >> 14)

    def middle(x: int) -> int:
        inner = (x * 0x7FEB352D) >> 16 & 0xFFFFFFFF
        return (inner * 0x31848BAB) >> 16 & 0xFFFFFFFF

    a, b = key % 2**32, (key >> 32) % 2**32
    b ^= middle(a ^ 0x9E3779B9)
    a ^= middle(b ^ 2 * 0x9E3779B9 % 2**32)
    b ^= middle(a ^ 3 * 0x9E3779B9 % 2**32)
    word = triple(index % 2**32, a, b + (index >> 32) * 0x9E3779B9)
    return word - 2**32 if word >= 2**31 else word


def as_bits(words: torch.Tensor) -> torch.Tensor:
    """int32 [...] to 0/1 in fp32 [..., 32]."""
    return ((words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1).float()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key", KEYS)
def test_the_bits_are_those_of_the_recipe_beyond_32_bits_of_index_too(key, device):
    for start in (0, 2**16 - 3, 2**31 - 3, 2**32 - 3, 2**33 + 1):
        expected = [by_hand(key, start + i) for i in range(7)]
        assert random_bits(key, (7,), device, start=start).tolist() == expected
        as_tensor = torch.tensor((key + 2**63) % 2**64 - 2**63, device=device)
        assert random_bits(as_tensor, (7,), start=start).tolist() == expected


def test_a_piece_of_a_larger_tensor_has_its_bits():
    whole = random_bits(7, (3, 100_001))
    assert whole.dtype == torch.int32 and whole.shape == (3, 100_001)
    for start, stop in ((0, 1), (65_535, 65_537), (65_536, 200_000), (299_000, 300_003)):
        assert torch.equal(random_bits(7, (stop - start,), start=start), whole.flatten()[start:stop])
    assert random_bits(7, (0, 4)).shape == (0, 4)
    assert random_bits(7, ()).item() == whole[0, 0].item()


@pytest.mark.skipif(shutil.which("g++") is None and not torch.cuda.is_available(), reason="needs a C++ compiler")
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_code_gives_the_same_bits_for_every_key_without_compiling_again(device):
    compiled = torch.compile(lambda key: random_bits(key, (70, 11), key.device, start=2**32 - 333), fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for key in (0, 1, -5, mix_key(9)):
            assert torch.equal(
                compiled(torch.tensor(key, device=device)), random_bits(key, (70, 11), device, start=2**32 - 333)
            )
    from_int = torch.compile(lambda x, key: random_bits(key, x.shape, x.device), fullgraph=True)
    for key in (5, -7, mix_key(9)):
        assert torch.equal(from_int(torch.zeros(33, device=device), key), random_bits(key, (33,), device))


def test_every_bit_is_balanced_for_every_key():
    words = torch.stack([random_bits(key, (1 << 15,)) for key in range(64)])
    share = as_bits(words).mean(1)
    assert (share - 0.5).abs().max() < SIGMAS * 0.5 / math.sqrt(words.shape[1])


@pytest.mark.parametrize("shift", [0, 12, 24])
def test_bytes_are_uniform_by_chi_square(shift):
    words = random_bits(mix_key(1, 2), (1 << 21,))
    counts = torch.bincount((words >> shift) & 255, minlength=256).double()
    expected = words.numel() / 256
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    # mean 255 and standard deviation sqrt(2 * 255) under independence
    assert abs(chi_square - 255) < SIGMAS * math.sqrt(510)


@pytest.mark.parametrize("lag", [1, 2, 32, 1000])
def test_neighbouring_indices_share_no_bits(lag):
    for key in range(4):
        words = random_bits(key, (1 << 17,))
        agreement = as_bits(~(words[:-lag] ^ words[lag:])).mean(0)
        assert (agreement - 0.5).abs().max() < SIGMAS * 0.5 / math.sqrt(len(words) - lag)


def test_neighbouring_keys_share_no_bits_at_the_same_or_the_next_index():
    count = 1 << 15
    words = torch.stack([random_bits(key, (count,)) for key in range(33)])
    for ours, theirs in ((words[:-1], words[1:]), (words[:-1, 1:], words[1:, :-1]), (words[:1], words[1:])):
        agreement = as_bits(~(ours ^ theirs)).mean(1)
        assert (agreement - 0.5).abs().max() < SIGMAS * 0.5 / math.sqrt(count - 1)


@pytest.mark.parametrize("stride", [1, 1 << 16, 1 << 40])
def test_one_element_is_uniform_over_keys(stride):
    words = torch.stack([random_bits(key * stride, (8,)) for key in range(1 << 14)])
    for element in (0, 7):
        counts = torch.bincount(words[:, element] & 63, minlength=64).double()
        expected = len(words) / 64
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi_square - 63) < SIGMAS * math.sqrt(126)


def test_each_bit_of_a_key_changes_half_of_the_bits_and_not_only_their_order():
    count = 1 << 14
    base = random_bits(99, (count,))
    for bit in range(64):
        other = random_bits(99 ^ (1 << bit), (count,))
        assert (as_bits(base ^ other).mean(0) - 0.5).abs().max() < SIGMAS * 0.5 / math.sqrt(count), bit
        # of 2**32 words, two sets of 2**14 share 2**28 / 2**32 = 1/16 on average: 4 would be a family likeness
        assert len(set(base.tolist()) & set(other.tolist())) < 4, bit


def test_a_sum_of_uniform_numbers_has_the_variance_of_independent_ones():
    uniform = (random_bits(5, (1 << 12, 1 << 9)).double() + 2.0**31) / 2.0**32
    total = uniform.sum(1)
    count, variance = uniform.shape[1], uniform.shape[1] / 12
    assert abs(total.mean().item() - count / 2) < SIGMAS * math.sqrt(variance / len(total))
    # the variance of a sample variance of normals is 2 / (n - 1) of its square
    assert abs(total.var().item() / variance - 1) < SIGMAS * math.sqrt(2 / (len(total) - 1))


def test_keys_are_spread_by_a_permutation():
    halves = {spread_key(key) for key in range(-2000, 2000)} | {spread_key(key << 32) for key in range(1, 2000)}
    assert len(halves) == 4000 + 1999
    assert spread_key(torch.tensor(-3)) == spread_key(-3)


def test_mixed_keys_depend_on_every_part_and_their_order():
    keys = {mix_key(seed, attempt, site) for seed in range(10) for attempt in range(10) for site in range(10)}
    assert len(keys) == 1000 and all(0 <= key < 2**63 for key in keys)
    assert mix_key(1) != mix_key(1, 0)
    assert mix_key(-1) == mix_key(2**64 - 1)


def test_a_generator_keyed_in_a_block_leaves_the_outer_one_as_it_was():
    before = torch.get_rng_state()
    with keyed_random(torch.device("cpu"), 1, 2):
        drawn = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with keyed_random(torch.device("cpu"), 1, 2):
        assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("key", [torch.tensor([1]), torch.tensor(1.0), torch.tensor(1, dtype=torch.int32)])
def test_a_key_of_another_kind_is_one_sentence(key):
    with pytest.raises(FewbitsError, match="0-d int64"):
        random_bits(key, (3,))

"""Random numbers keyed by (seed, attempt, micro-batch, site, element): nothing hangs on a generator's past."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fewbits.errors import FewbitsError

_MASK64 = (1 << 64) - 1
_MASK32 = (1 << 32) - 1
_WEYL = 0x9E3779B9  # 2**32 / golden ratio, odd: high halves of indices give key halves far from each other
_CHUNK = 1 << 16  # 256 kB of words stay in the second-level cache of a CPU through all passes; divides 2**32
_DEVICE_CHUNK = 1 << 24  # bounds what the passes keep at once to some hundred MB

Word = TypeVar("Word", int, Tensor)
Words = np.ndarray[Any, np.dtype[np.uint32]]


def mix_key(*parts: int) -> int:
    """One 64-bit key (0 <= key < 2**63) out of integers such as (seed, attempt, micro-batch, site).

    Order and number of the parts matter; a part counts modulo 2**64. One round of splitmix64 (Steele et al. 2014) each,
    so that neighbouring parts give unrelated keys.

    >>> mix_key(0, 1) == mix_key(1, 0), 0 <= mix_key(7) < 2**63
    (False, True)
    """
    mixed = 0
    for part in parts:
        mixed = _splitmix(mixed ^ (part & _MASK64))
    return mixed >> 1


def random_bits(
    key: int | Tensor, shape: Sequence[int], device: str | torch.device | None = None, *, start: int = 0
) -> Tensor:
    """Uniformly random 32-bit patterns, int32 of that shape on that device: a pure function of key and linear index.

    key: 64 bits, as an int (modulo 2**64; in compiled code -2**63..2**63 - 1), or as a 0-d int64 tensor on the device,
        which may change from call to call of a compiled function without compiling it again. `mix_key` makes one; keys
        need not be far from each other.
    device: default the key's, or the CPU.
    start: linear index (row-major) of the first element, for a piece of a larger tensor.
    The same bits come out on every device, eager and compiled. In 32-bit unsigned arithmetic, with (a, b) = the key's
    halves after `spread_key` and i = start + row-major index:

        h = low(i) ^ a;                  h ^= h >> 17;  h *= 0xED5AD4BB
        h += b + high(i) * 0x9E3779B9;   h ^= h >> 11;  h *= 0xAC4C1B51
        h ^= h >> 15;  h *= 0x31848BAB;  h ^= h >> 14

    This is triple32 of C. Wellons ("Hash function prospector", 2018), found by search for the least bias, with the key
    put in twice. For one key and indices with the same high half no pattern comes twice: right for rounding, where
    frequencies count, not for drawing words with replacement.

    Raises FewbitsError for a key that is a tensor of another shape or dtype.

    >>> random_bits(1, (3,)).dtype, torch.equal(random_bits(1, (2, 3)).flatten()[4:], random_bits(1, (2,), start=4))
    (torch.int32, True)
    """
    if device is None:
        device = key.device if isinstance(key, Tensor) else "cpu"
    if isinstance(key, Tensor) and (key.dtype != torch.int64 or key.ndim > 0):
        raise FewbitsError(f"A key is an int or a 0-d int64 tensor, not {key.dtype} of shape {tuple(key.shape)}.")
    count = math.prod(shape)
    if torch.compiler.is_compiling():
        if not isinstance(key, Tensor):  # as a number it would be spread symbolically, which takes minutes
            key = torch.full((), key, dtype=torch.int64, device=device)
        return _words(key, start, start + count, torch.device(device)).view(tuple(shape))
    if isinstance(key, Tensor) and key.device.type == "cpu" and type(key) is Tensor:
        key = int(key)
    bits = torch.empty(count, dtype=torch.int32, device=device)
    if bits.device.type == "cpu" and isinstance(key, int) and type(bits) is Tensor:
        _fill(bits.numpy().view(np.uint32), key, start)
    else:
        for at in range(0, count, _DEVICE_CHUNK):
            piece = bits[at : at + _DEVICE_CHUNK]
            piece.copy_(_words(key, start + at, start + at + len(piece), bits.device))
    return bits.view(tuple(shape))


def spread_key(key: int | Tensor) -> tuple[int, int] | tuple[Tensor, Tensor]:
    """The two 32-bit halves that a 64-bit key puts into every element: ints, or 0-d int64 tensors for a tensor.

    A permutation of 64 bits, three Feistel rounds, in which every bit of the key reaches both halves. With (a, b) = (low,
    high) half of the key, C = 0x9E3779B9 and f(x) = bits 16..47 of 0x31848BAB * (bits 16..47 of 0x7FEB352D * x):

        b ^= f(a ^ C);  a ^= f(b ^ 2 * C mod 2**32);  b ^= f(a ^ 3 * C mod 2**32)
    """
    if isinstance(key, Tensor):
        return _feistel(key & _MASK32, (key >> 32) & _MASK32)
    return _feistel(key & _MASK32, (key >> 32) & _MASK32)


@contextmanager
def keyed_random(device: torch.device, *key: int) -> Iterator[None]:
    """Within, torch's default generators (the CPU's and that of `device`) start from `key` alone; their state of before
    comes back afterwards.

    Nothing hangs on a generator's past: a resumed run draws what the uninterrupted one drew. On CUDA the state of a
    generator is held by the host, so nothing waits.
    """
    mixed = mix_key(*key)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # not torch.manual_seed, which would reseed every other GPU too and never put those back
        torch.default_generator.manual_seed(mixed)
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.default_generators[index].manual_seed(mixed)
        yield


def _feistel(low: Word, high: Word) -> tuple[Word, Word]:
    high = high ^ _middle(low, _WEYL)
    low = low ^ _middle(high, 2 * _WEYL)
    return low, high ^ _middle(low, 3 * _WEYL)


def _middle(half: Word, constant: int) -> Word:
    """Twice the middle 32 bits of a 64-bit product. Every step reads one value: where steps read two, as h ^ (h >> 17)
    does, the compiler expands a 0-d key exponentially (3 s for each key, 40 s for one that is a symbolic int)."""
    half = (half ^ constant) & _MASK32
    half = ((half * 0x7FEB352D) >> 16) & _MASK32  # factors below 2**31, so that products stay below 2**63
    return ((half * 0x31848BAB) >> 16) & _MASK32


def _scramble(h: Word, a: int | Word, b: int | Word) -> Word:
    """The definition in signed 64-bit arithmetic, for ints and for tensors that hold 32-bit words in 0..2**32 - 1."""
    h = h ^ a
    h = ((h ^ (h >> 17)) * _signed(0xED5AD4BB)) & _MASK32  # below 2**32 times at most 2**31
    h = (h + b) & _MASK32
    h = ((h ^ (h >> 11)) * _signed(0xAC4C1B51)) & _MASK32
    h = ((h ^ (h >> 15)) * _signed(0x31848BAB)) & _MASK32
    return h ^ (h >> 14)


def _words(key: int | Tensor, start: int, stop: int, device: torch.device) -> Tensor:
    """The words of indices start..stop - 1 on any device: int32. Nothing in it overflows 64 bits, which would be undefined
    in the C++ that a compiler makes of it."""
    a, b = spread_key(key)
    index = torch.arange(start, stop, dtype=torch.int64, device=device)
    if stop > 1 << 32:
        b = b + (index >> 32) * _WEYL
    return _signed(_scramble(index & _MASK32, a, b)).to(torch.int32)


def _fill(out: Words, key: int, start: int) -> None:
    """The words of indices from start on into `out` (1-D), in place on pieces that stay in the cache: 1.1 ns each on one
    core, where torch's operations took 4."""
    a, b = spread_key(key)
    first = start // _CHUNK * _CHUNK  # pieces are aligned, so that within one only the lowest bits of the index differ
    lowest = np.arange(min(_CHUNK, start + len(out) - first), dtype=np.uint32)
    scratch = np.empty_like(lowest)
    for at in range(first, start + len(out), _CHUNK):
        low = lowest[max(start - at, 0) : start + len(out) - at]
        h, shifted = out[max(at - start, 0) :][: len(low)], scratch[: len(low)]
        np.bitwise_xor(low, np.uint32(a ^ (at & _MASK32)), out=h)
        _fold(h, shifted, 17)
        h *= np.uint32(0xED5AD4BB)
        h += np.uint32((b + (at >> 32) * _WEYL) & _MASK32)
        _fold(h, shifted, 11)
        h *= np.uint32(0xAC4C1B51)
        _fold(h, shifted, 15)
        h *= np.uint32(0x31848BAB)
        _fold(h, shifted, 14)


def _fold(h: Words, scratch: Words, shift: int) -> None:
    np.right_shift(h, np.uint32(shift), out=scratch)
    h ^= scratch


def _signed(word: Word) -> Word:
    """The signed number with the same 32 bits as word in 0..2**32 - 1."""
    return (word ^ 0x80000000) - 0x80000000


def _splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)

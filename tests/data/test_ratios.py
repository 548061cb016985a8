"""The yardstick beside a model's bits per byte."""

from __future__ import annotations

import gzip
import lzma

from fewbits.data.ratios import compression_baseline


def test_the_ratios_are_what_the_compressors_reach() -> None:
    texts = [f"line {i * i} größe\n" for i in range(3000)]
    data = "".join(texts).encode()
    found = compression_baseline(texts)
    assert found["bytes"] == len(data) and found["complete"]
    assert found["gzip_bytes"] == len(gzip.compress(data, 9, mtime=0))
    assert found["xz_bytes"] == len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    assert found["gzip"] == 8 * found["gzip_bytes"] / len(data) and found["xz"] < found["gzip"]


def test_a_long_text_is_sampled_and_that_is_said() -> None:
    found = compression_baseline(("abc" * 100 for _ in range(100)), limit=1000)
    assert found["bytes"] == 1000 and not found["complete"]
    assert compression_baseline(["x" * 1001], limit=1000)["complete"] is False


def test_no_text_has_no_ratio() -> None:
    found = compression_baseline([])
    assert found["gzip"] is None and found["xz"] is None and found["bytes"] == 0

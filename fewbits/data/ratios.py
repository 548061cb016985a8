"""What general-purpose compressors reach on a text: the yardstick beside a model's bits per byte."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterable
from typing import Any

SAMPLE_BYTES = 2 << 20  # xz takes about a second for this much


def compression_baseline(texts: Iterable[str], limit: int = SAMPLE_BYTES) -> dict[str, Any]:
    """Bits per byte of the texts, joined, under gzip and xz at their strongest settings.

    limit: UTF-8 bytes looked at, from the beginning. Returns gzip and xz (bits per byte, None for no text), `bytes`
    (what was compressed), `gzip_bytes` and `xz_bytes` (what it became), and `complete` (whether that was all).

    >>> compression_baseline(["ab" * 1000])["bytes"]
    2000
    """
    parts: list[bytes] = []
    size, complete = 0, True
    for text in texts:
        if size >= limit:
            complete = False
            break
        parts.append(text.encode("utf-8"))
        size += len(parts[-1])
    joined = b"".join(parts)
    complete = complete and len(joined) <= limit
    joined = joined[:limit]
    packer = zlib.compressobj(9, wbits=31)  # 31: with gzip's header and checksum
    gzip_bytes = len(packer.compress(joined)) + len(packer.flush())
    xz_bytes = len(lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME))
    size = len(joined)
    return {
        "gzip": 8 * gzip_bytes / size if size else None,
        "xz": 8 * xz_bytes / size if size else None,
        "bytes": size,
        "gzip_bytes": gzip_bytes,
        "xz_bytes": xz_bytes,
        "complete": complete,
    }

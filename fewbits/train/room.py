"""A training that cannot fit into this machine's memory is refused before it starts, not killed by the system later."""

from __future__ import annotations

import os
from pathlib import Path

from fewbits.errors import FewbitsError
from fewbits.train.config import Config

_CGROUP = Path("/sys/fs/cgroup/memory.max")


def least_bytes(config: Config) -> int:
    """A lower bound of the bytes that a training holds at once, whatever its precision (the forecast is larger).

    A parameter takes at least 2 bytes for its weight and 2 for its gradient, and 4 for each fp32 moment; a token keeps
    at least 6 values of 2 bytes for each block and unit of width (inputs of the matmuls, and queries, keys and values).
    """
    moments = {"adamw": 2, "adam": 2, "sgd": 1 if config.optim.momentum else 0}[config.optim.optimizer]
    tokens = config.train.batch_size // config.train.micro_batches * config.model.context
    weights = config.model.parameter_count() * (4 + 4 * moments)
    return weights + tokens * config.model.n_embd * config.model.n_layer * 6 * 2


def host_bytes() -> int | None:
    """Bytes of memory this process may have: the machine's, or less where a container says so; None when unknown."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    limit = _CGROUP.read_text().strip() if _CGROUP.is_file() else ""
    return min(found, int(limit)) if limit.isdecimal() else found


def refuse_oversize(config: Config, available: int | None) -> None:
    """Raises FewbitsError when even the lower bound is beyond `available` bytes; None refuses nothing."""
    needed = least_bytes(config)
    if available is not None and needed > available:
        raise FewbitsError(
            f"This training needs at least {needed / 2**30:,.1f} GiB and there are {available / 2**30:,.1f} GiB: "
            f"{config.model.parameter_count():,} parameters, {config.train.batch_size // config.train.micro_batches} x "
            f"{config.model.context} tokens at once. Raise --micro_batches, or lower --batch_size, --n_embd or "
            "--n_layer."
        )

"""What compiling costs, apart from the steps: how long it took, where its results are kept, and what went wrong."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import torch

from fewbits.data.cache import cache_folder
from fewbits.optim.engine import is_compiler_failure
from fewbits.precision.hardware import cpu_name

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def keep_compiled_code(cache: str | None = None) -> Path:
    """Where compiled code is kept between runs, Triton's too: TORCHINDUCTOR_CACHE_DIR where it is set, else a folder
    in the cache of fewbits. To be called before torch's compiler is first used.

    By version of torch and by processor: code that was made for one CPU must not be loaded on another that shares the
    folder. torch keeps it in the temporary folder otherwise, which a restart empties.
    """
    if _VARIABLE not in os.environ:
        words = f"{torch.__version__}-{cpu_name()}-{torch.backends.cpu.get_cpu_capability()}"
        folder = cache_folder(cache) / "compiled" / re.sub(r"[^A-Za-z0-9.+-]+", "_", words)
        os.environ[_VARIABLE] = str(folder)
    folder = Path(os.environ[_VARIABLE])
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    return folder


class CompileClock:
    """Seconds that torch's compiler worked while the clock was running: `with CompileClock() as clock: ...`.

    Counted by the compiler's own callbacks, around every graph and every backward that is compiled late.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._taken = 0.0
        self._since = 0.0
        self._handler: Any = None

    def __enter__(self) -> CompileClock:
        try:
            from torch._dynamo.callback import callback_handler
        except ImportError:  # another version of torch: the time stays in the first step
            return self
        self._handler = callback_handler
        callback_handler.register_start_callback(self._begin)
        callback_handler.register_end_callback(self._end)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            self._handler.remove_start_callback(self._begin)
            self._handler.remove_end_callback(self._end)
            self._handler = None

    def take(self) -> float:
        """Seconds since the last `take`."""
        new, self._taken = self.seconds - self._taken, self.seconds
        return new

    def _begin(self, *_: object) -> None:
        self._since = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._since


def compiler_failure(error: BaseException | None) -> str:
    """Why torch's compiler failed, in a line, where `error` is or comes from such a failure; else ""."""
    while error is not None:
        names = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        if (isinstance(error, Exception) and is_compiler_failure(error)) or "triton" in names:
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            return f"{type(error).__name__}: {first[:200]}".rstrip(": .")
        error = error.__cause__ or error.__context__
    return ""

"""What compiling costs, apart from the steps: how long it took, where its results are kept, and what went wrong."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from fewbits.data.cache import cache_folder
from fewbits.kernels.cpp import compiling_s
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
    """Seconds that compilers worked while the clock was running: `with CompileClock(by_torch) as clock: ...`.

    torch's by its own callbacks, around every graph and every backward that is compiled late; Triton's by its listener, for
    kernels of ours that no graph of torch's brings along; and that of our C++. by_torch: whether torch's is used: to listen to
    it imports it, which takes a second.
    """

    def __init__(self, by_torch: bool = True) -> None:
        self._by_torch = by_torch
        self._seconds, self._taken = 0.0, 0.0
        self._since: float | None = None
        self._cpp_s = math.inf  # of this process when it was last looked at; not running, the clock sees nothing new
        self._stack = ExitStack()

    @property
    def seconds(self) -> float:
        """All of them so far."""
        self._count_cpp()
        return self._seconds

    def __enter__(self) -> CompileClock:
        self._cpp_s = compiling_s()
        self._stack.callback(self._count_cpp)
        if self._by_torch:
            self._stack.enter_context(self._listening_to_torch())
        if torch.cuda.is_available():
            self._stack.enter_context(self._listening_to_triton())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._cpp_s = math.inf

    def take(self) -> float:
        """Seconds since the last `take`."""
        seconds = self.seconds
        new, self._taken = seconds - self._taken, seconds
        return new

    def _begin(self, *_: object) -> None:
        self._count_cpp()
        self._since = time.perf_counter()

    def _end(self, *_: object) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since, self._cpp_s = None, compiling_s()  # C++ that was built meanwhile is in that time

    def _count_cpp(self) -> None:
        if self._since is None and (new := compiling_s() - self._cpp_s) > 0:
            self._seconds += new
            self._cpp_s += new

    @contextmanager
    def _listening_to_torch(self) -> Iterator[None]:
        try:
            from torch._dynamo.callback import callback_handler
        except ImportError:  # another version of torch: the time stays in the first step
            yield
            return
        callback_handler.register_start_callback(self._begin)
        callback_handler.register_end_callback(self._end)
        try:
            yield
        finally:
            with suppress(ValueError):  # somebody reset the compiler, and with it who listens
                callback_handler.remove_start_callback(self._begin)
                callback_handler.remove_end_callback(self._end)

    @contextmanager
    def _listening_to_triton(self) -> Iterator[None]:
        try:
            from triton import knobs
        except ImportError:  # none is here, or an old one without them
            yield
            return
        before = knobs.compilation.listener

        def listen(*args: Any, times: Any, **kwargs: Any) -> None:
            if self._since is None:  # else torch's time has it already
                self._seconds += times.total / 1e6  # microseconds
            if before is not None:
                before(*args, times=times, **kwargs)

        knobs.compilation.listener = listen
        try:
            yield
        finally:
            if knobs.compilation.listener is listen:
                knobs.compilation.listener = before


def compiler_failure(error: BaseException | None) -> str:
    """Why torch's compiler failed, in a line, where `error` is or comes from such a failure; else ""."""
    while error is not None:
        names = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        if (isinstance(error, Exception) and is_compiler_failure(error)) or "triton" in names:
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            return f"{type(error).__name__}: {first[:200]}".rstrip(": .")
        error = error.__cause__ or error.__context__
    return ""

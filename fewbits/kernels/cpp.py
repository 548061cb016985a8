"""C++ sources of this package, compiled on first use by the system's compiler and called by pointers to data.

A library is kept in the cache folder under a name made of its source, the compiler, its flags and those of the
processor, so that nothing stale is ever loaded; it appears there by a rename, whole or not at all. Work is spread over
the threads of torch's own OpenMP runtime: a second one would spin against it. Where no compiler is, the definitions run.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.choice import Choice
from fewbits.places import cache_root
from fewbits.ranges import span

# No contraction into fused multiply-adds: results must be those of the definitions, on any processor. No trap and no
# errno is asked for, without which rint and the comparisons would not become vectors.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_SHARED = ("-fPIC", "-shared", "-fvisibility=hidden", "-w")
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of the element formats, as elements.hpp has them."""
_ARGUMENTS = {"i": ctypes.c_int, "l": ctypes.c_long, "f": ctypes.c_float, "p": ctypes.c_void_p}
_HEADERS = ("elements.hpp", "memory.hpp", "parallel.hpp", "reductions.hpp")
_HERE = Path(__file__).parent
_compiling_s = 0.0


def compiler() -> list[str]:
    """The command of a C++ compiler: `CXX`, else g++, clang++ or c++; empty where none is installed."""
    wanted = shlex.split(os.environ.get("CXX", "")) or next(
        ([name] for name in ("g++", "clang++", "c++") if shutil.which(name)), []
    )
    return wanted if wanted and shutil.which(wanted[0]) else []


def library(name: str, functions: Mapping[str, str], needs: str = "") -> Choice:
    """Choice(the loaded library of `name`.cpp, or None; why). Compiled once a cache; ask once a process.

    functions: the arguments of each function that is called, one letter each: i int, l long, f float, p pointer (an
    address, or None). They return an int. needs: the instructions that a library wants which is empty without them, and says
    so by its function `supported`.
    """
    command = compiler()
    if not command:
        given = os.environ.get("CXX", "")
        return Choice(None, f"CXX={given} is not there" if given else "no C++ compiler is installed")
    try:
        path = _built(name, command)
        loaded = ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        first = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr[:200])
        return Choice(None, f"{command[0]} did not compile {name}.cpp: {first}")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Choice(None, f"{name}.cpp could not be built: {error}")
    loaded.use_launcher(_launcher())
    for function, letters in functions.items():
        getattr(loaded, function).argtypes = [_ARGUMENTS[letter] for letter in letters]
    if needs and not loaded.supported():
        return Choice(None, f"this CPU has no {needs}")
    return Choice(loaded, f"{name}.cpp, compiled by {command[0]}")


def call(loaded: Any, function: str, format: torch.dtype, *arguments: Any) -> int:
    """What `function` of a loaded library returns, of as many threads as torch has, elements in `format` and `arguments`, of
    which tensors go as their addresses. A range of its own: it is no operator of torch, a profiler would not see it."""
    values = (x.data_ptr() if isinstance(x, Tensor) else x for x in arguments)
    with span(function):
        found: int = getattr(loaded, function)(torch.get_num_threads(), FORMATS[format], *values)
    return found


@cache
def spreads() -> bool:
    """Whether work is spread over threads: torch has an OpenMP runtime that can be found."""
    return _launcher() is not None


def compiling_s() -> float:
    """Seconds that this process has waited for a C++ compiler."""
    return _compiling_s


def _built(name: str, command: list[str]) -> Path:
    """The path of the compiled library, compiled now where the cache does not have it."""
    sources = [(_HERE / file).read_bytes() for file in (*_HEADERS, f"{name}.cpp")]
    version = subprocess.run([*command, "--version"], capture_output=True, check=True, timeout=60).stdout
    about = [version, " ".join([*command, *FLAGS, *_SHARED]).encode(), _processor().encode()]
    key = hashlib.sha256(b"\0".join([*sources, *about])).hexdigest()[:24]
    folder = cache_root() / "kernels"
    path = folder / f"{name}-{key}.so"
    if path.exists():
        return path
    global _compiling_s
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    handle, unfinished = tempfile.mkstemp(".tmp", path.stem, folder)
    os.close(handle)
    try:
        subprocess.run(
            [*command, *FLAGS, *_SHARED, str(_HERE / f"{name}.cpp"), "-o", unfinished],
            capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
        _compiling_s += time.perf_counter() - began
    return path


def _processor() -> str:
    """What `-march=native` depends on, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _launcher() -> ctypes.c_void_p | None:
    """GOMP_parallel of the OpenMP runtime that torch has loaded (LLVM's has it too), or None: work is then not spread."""
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*"))
    bundled += sorted((Path(torch.__file__).parent.parent / "torch.libs").glob("lib*omp*.so*"))
    for place in (*bundled, None):
        try:
            runtime = ctypes.CDLL(None if place is None else str(place), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
    return None

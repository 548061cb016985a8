"""Lint, format and types hold, so that one command checks everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = [name for name in ("fewbits", "tests", "bench") if (ROOT / name).is_dir()]


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing():
    run("ruff", "check", *FOLDERS)


def test_ruff_would_not_format_anything_differently():
    run("ruff", "format", "--check", *FOLDERS)


def test_mypy_strict_finds_nothing_in_the_package():
    run("mypy")


def test_no_file_of_the_package_is_longer_than_500_lines():
    lengths = {
        path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "fewbits").rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > 500} == {}

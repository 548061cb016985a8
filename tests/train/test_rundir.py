"""One run in a directory, and nothing written where it does not belong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fewbits.errors import FewbitsError
from fewbits.train.rundir import Lock, check_free, check_writable, locked, next_free


def test_a_second_process_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "run")
    code = (
        "import sys; from pathlib import Path; from fewbits.train.rundir import Lock\n"
        "from fewbits.errors import FewbitsError\n"
        "try: Lock(Path(sys.argv[1]))\nexcept FewbitsError as error: print(error)"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "run")]
    assert "Another run (process" in subprocess.run(run, capture_output=True, text=True, check=True).stdout
    lock.release()
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == ""


def test_a_lock_held_here_is_refused_too_and_free_again_after(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    assert locked(tmp_path)
    with pytest.raises(FewbitsError, match="Another run"):
        Lock(tmp_path)
    lock.release()
    assert not locked(tmp_path)
    Lock(tmp_path).release()


def test_checking_makes_nothing(tmp_path: Path) -> None:
    check_free(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_a_directory_with_a_run_or_with_foreign_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.toml").touch()
    with pytest.raises(FewbitsError, match=r"holds a run already\. Continue it with --resume"):
        check_free(tmp_path / "x")
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "thesis.tex").touch()
    with pytest.raises(FewbitsError, match=r"not empty .*thesis\.tex"):
        check_free(tmp_path / "y")


def test_a_file_where_a_directory_is_needed_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FewbitsError, match="is a file"):
        check_free(tmp_path / "file")
    with pytest.raises(FewbitsError, match="is a file"):
        check_writable(tmp_path / "file" / "below")


def test_a_directory_without_permission_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere, so the system is asked in its place
    with pytest.raises(FewbitsError, match=r"No permission to write in .* Choose another --out_dir"):
        check_free(tmp_path / "new")


def test_default_directories_are_numbered(tmp_path: Path) -> None:
    assert next_free(tmp_path, "nano").name == "nano-1"
    (tmp_path / "nano-1").mkdir()
    assert next_free(tmp_path, "nano").name == "nano-2"

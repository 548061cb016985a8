"""What a save promises: everything bit for bit, the last k, and the last good one whatever goes wrong."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoint import FILES, is_step, model, optimizer, same, save

from fewbits.checkpoint import disk
from fewbits.checkpoint.load import list_checkpoints, load_checkpoint
from fewbits.checkpoint.save import CheckpointWarning, save_checkpoint
from fewbits.errors import FewbitsError


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_every_dtype_scalars_and_nans_come_back_bit_for_bit(tmp_path: Path) -> None:
    save(tmp_path, 3)
    assert is_step(load_checkpoint(tmp_path), 3)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.uint8,
        torch.int8,
        torch.uint16,
        torch.int32,
        torch.uint32,
        torch.uint64,
    ],
    ids=str,
)
def test_codes_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).reshape(2, -1)
    save_checkpoint(tmp_path, 0, {"codes": codes}, {}, {}, {}, 1)
    assert same(load_checkpoint(tmp_path).model, {"codes": codes})


def test_views_and_transposes_are_stored_as_their_values(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = {"transposed": base.t(), "columns": base[:, ::2], "row": base[1], "expanded": torch.ones(1).expand(5)}
    save_checkpoint(tmp_path, 0, views, {}, {}, {}, 1)
    loaded = load_checkpoint(tmp_path).model
    assert same(loaded, {name: view.clone() for name, view in views.items()})
    storages = {tensor.untyped_storage().data_ptr() for tensor in loaded.values()}
    assert len(storages) == len(views)  # nothing loaded shares memory with anything else


def test_the_tensor_files_are_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    folder = save(tmp_path, 1)
    assert same(load_file(folder / "model.safetensors"), model(1))
    assert same(load_file(folder / "optimizer.safetensors"), optimizer(1))
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"  # transformers asks for it


def test_every_json_file_says_its_schema_version(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    assert json.loads((folder / "manifest.json").read_text())["schema"] == "fewbits.checkpoint/1"
    assert json.loads((folder / "state.json").read_text())["schema"] == "fewbits.state/1"
    assert (tmp_path / "latest").read_text().startswith("fewbits.latest/1 step-00000001 ")


def test_the_last_k_are_kept(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step, keep=3)
    assert names(tmp_path) == ["latest", "step-00000005", "step-00000006", "step-00000007"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000007", "step-00000006", "step-00000005"]
    save(tmp_path, 8, keep=1)
    assert names(tmp_path) == ["latest", "step-00000008"]


def test_steps_of_an_abandoned_future_go_before_the_past(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    save(tmp_path, 15)  # resumed from 10
    assert names(tmp_path) == ["latest", "step-00000010", "step-00000015"]
    assert is_step(load_checkpoint(tmp_path), 15)


def test_pruning_touches_only_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    for step in range(4):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["latest", "notes.txt", "step-00000003", "step-notes"]


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, {"w": torch.zeros(2)}, {}, {}, {}, 2)
    save(tmp_path, 5)
    assert is_step(load_checkpoint(tmp_path), 5)
    assert names(tmp_path) == ["latest", "step-00000005"]


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_save_dtype_rounds_the_model_alone_and_says_so(tmp_path: Path, name: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    weights = {"w": torch.randn(50), "ids": torch.arange(3), "wide": torch.randn(3, dtype=torch.float64)}
    save_checkpoint(tmp_path, 0, weights, {"m": torch.randn(3)}, {}, {}, 1, save_dtype=name)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.save_dtype == name
    assert same(checkpoint.model, {k: w.to(dtype) if w.is_floating_point() else w for k, w in weights.items()})
    assert checkpoint.optimizer["m"].dtype == torch.float32


def test_a_weight_beyond_fp16_is_stored_as_its_largest_value_and_named(tmp_path: Path) -> None:
    weights = {"w": torch.tensor([1e6, -1e6, float("inf"), float("nan"), 1.0])}
    with pytest.warns(CheckpointWarning, match=r"w has values beyond 65504"):
        save_checkpoint(tmp_path, 0, weights, {}, {}, {}, 1, save_dtype="fp16")
    stored = load_checkpoint(tmp_path).model["w"]
    assert stored[:3].tolist() == [65504.0, -65504.0, float("inf")] and stored[3].isnan() and stored[4] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0}, "keep=0 would keep no checkpoint"),
        ({"step": -1}, "Steps count from 0"),
        ({"save_dtype": "fp8"}, "save_dtype='fp8' is not one of"),
        ({"files": {"../escape": ""}}, "a file named '../escape'"),
        ({"files": {"manifest.json": ""}}, "a file named 'manifest.json'"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path, change, message: str) -> None:
    arguments = {"step": 1, "model": {}, "optimizer": {}, "state": {}, "files": {}, "keep": 1} | change
    with pytest.raises(FewbitsError, match=message):
        save_checkpoint(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_keeps_the_last_good_one_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    before, room = names(tmp_path), 1500  # bytes: in the middle of the second tensor file

    def write_file(path: Path, pieces):
        nonlocal room
        pieces = [bytes(piece) for piece in pieces]
        room -= sum(map(len, pieces))
        if room < 0:
            path.write_bytes(b"".join(pieces)[:room])  # a part of the file did reach the disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return disk.write_file(path, pieces)

    monkeypatch.setattr("fewbits.checkpoint.save.write_file", write_file)
    with pytest.raises(FewbitsError, match=r"step 2 could not be saved in .*: the disk is full .* untouched"):
        save(tmp_path, 2)
    assert names(tmp_path) == before
    assert is_step(load_checkpoint(tmp_path), 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_that_is_really_full_is_reported(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        disk.write_file(Path("/dev/full"), [b"x" * 100_000])


def test_a_file_in_the_way_and_a_missing_permission_are_one_sentence(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FewbitsError, match="a file stands where a folder is needed"):
        save(tmp_path / "file", 1)
    save(tmp_path / "run", 1)

    def refuse(path: Path, pieces):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("fewbits.checkpoint.save.write_file", refuse)
    with pytest.raises(FewbitsError, match="there is no permission to write there"):
        save(tmp_path / "run", 2)
    assert names(tmp_path / "run") == ["latest", "step-00000001"]


def test_an_interrupt_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fewbits.checkpoint.save.sync_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step-00000001"]


class Crash(BaseException):
    """The process is gone: nothing that it would do afterwards happens."""


def crash_at(monkeypatch: pytest.MonkeyPatch, instant: int) -> None:
    """From the `instant`-th call that changes the disk on, every such call fails: also those that would clean up."""
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > instant:
                raise Crash
            return function(*args, **kwargs)

        return call

    for name in ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir", "write"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    real = open

    def opened(file, mode="r", *args, **kwargs):
        if "w" not in mode:
            return real(file, mode, *args, **kwargs)
        handle = counted(real)(file, mode, *args, **kwargs)
        real_write = handle.write

        class Handle:  # a write can be cut in the middle
            def __enter__(self):
                return self

            def __exit__(self, *error):
                handle.close()

            def write(self, part):
                half = len(part) // 2
                counted(real_write)(part[:half])
                handle.flush()
                counted(real_write)(part[half:])
                handle.flush()

            flush, fileno = handle.flush, handle.fileno

        return Handle()

    monkeypatch.setattr("builtins.open", opened)


def test_bytes_and_names_are_on_the_disk_before_anything_points_to_them(tmp_path: Path, monkeypatch) -> None:
    events: list[tuple[str, Any]] = []
    real_rename, real_replace = os.rename, os.replace

    def renaming(real: Any) -> Any:
        def rename(source: Path, target: Path) -> None:
            events.append(("named", Path(target).name))
            real(source, target)

        return rename

    monkeypatch.setattr(os, "fsync", lambda handle: events.append(("synced", os.fstat(handle).st_ino)))
    monkeypatch.setattr(os, "rename", renaming(real_rename))
    monkeypatch.setattr(os, "replace", renaming(real_replace))
    path = save(tmp_path, 1)
    named, pointed = events.index(("named", path.name)), events.index(("named", "latest"))

    def synced(place: Path, start: int, end: int) -> bool:
        return ("synced", place.stat().st_ino) in events[start:end]

    assert all(synced(place, 0, named) for place in (path, *path.iterdir()))
    assert synced(tmp_path, named, pointed) and synced(tmp_path / "latest", 0, pointed)
    assert synced(tmp_path, pointed, len(events))


@pytest.mark.parametrize(
    ("step", "keep"),
    [(3, 2), (2, 2), (3, 1)],
    ids=["a new step", "the same step again", "a new step that is kept alone"],
)
def test_a_crash_at_any_instant_of_a_save_leaves_a_loadable_checkpoint(
    tmp_path: Path, step: int, keep: int, monkeypatch
) -> None:
    """All instants between two system calls, one after the other, until a save runs through."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # an instant as any other, but not a slow one
    for instant in range(400):
        folder = tmp_path / str(instant)
        save(folder, 1)
        save(folder, 2)
        with pytest.MonkeyPatch.context() as crashing:
            crash_at(crashing, instant)
            try:
                save(folder, step, keep)
                finished = True
            except Crash:
                finished = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a crash is not damage: nothing to warn of
            checkpoint = load_checkpoint(folder)
        assert is_step(checkpoint, 2) or is_step(checkpoint, step)
        for path in list_checkpoints(folder):  # also what was being pruned is whole or gone
            load_checkpoint(path)
        if finished:
            break
        save(folder, 4)  # clears what the crash left
        assert is_step(load_checkpoint(folder), 4)
        assert all(name == "latest" or name.startswith("step-") for name in names(folder))
    assert finished and instant > 30  # every call was an instant, and there are that many


KILLED = """
import os, random, signal, sys, time, warnings
from pathlib import Path
sys.path[:0] = [{here!r}]
from small_checkpoint import is_step, save
from fewbits.checkpoint.load import load_checkpoint

folder, randomness = Path({folder!r}), random.Random(0)
warnings.simplefilter("error")
save(folder, 0)
last = inside = kills = 0
while kills < 40 or last < 10 or inside < 5:  # on a busy machine until enough saves went through and enough did not
    kills += 1
    child = os.fork()
    if not child:
        for step in range(last + 1, 10**6):
            save(folder, step)
    time.sleep(randomness.uniform(0.005, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    inside += any(entry.name.startswith(".") for entry in folder.iterdir())
    checkpoint = load_checkpoint(folder)
    assert is_step(checkpoint, checkpoint.step) and checkpoint.step >= last, (kills, checkpoint.step, last)
    last = checkpoint.step
print(kills)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_forty_kills_of_a_process_that_saves_all_the_time_lose_nothing(tmp_path: Path) -> None:
    script = KILLED.format(here=str(Path(__file__).parent), folder=str(tmp_path / "checkpoints"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 40


def test_nothing_on_the_path_imports_pickle() -> None:
    """torch imports it, so this reads our own lines."""
    for path in Path(disk.__file__).parent.glob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text and "torch.load" not in text and "torch.save" not in text, path.name


def test_files_given_as_text_are_utf8(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 0, {}, {}, {}, {"config.json": "é"}, 1)
    assert (folder / "config.json").read_bytes() == "é".encode()
    assert load_checkpoint(folder).files.keys() != FILES.keys()

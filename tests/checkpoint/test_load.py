"""What a load promises: any changed byte is noticed and named, and nothing foreign, newer or damaged gets in."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from small_checkpoint import is_step, save

from fewbits.checkpoint import manifest
from fewbits.checkpoint.load import check_shapes, load_checkpoint
from fewbits.checkpoint.save import CheckpointWarning, save_checkpoint
from fewbits.errors import FewbitsError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 1 and 2."""
    save(tmp_path / "run" / "checkpoints", 1)
    save(tmp_path / "run" / "checkpoints", 2)
    return tmp_path / "run"


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/step-00000002", "checkpoints/latest"])
def test_a_run_its_checkpoints_and_one_checkpoint_can_be_named(run: Path, part: str) -> None:
    assert is_step(load_checkpoint(run / part), 2)
    assert is_step(load_checkpoint(run / "checkpoints" / "step-00000001"), 1)


def test_a_copy_under_another_name_loads(run: Path) -> None:
    shutil.copytree(run / "checkpoints" / "step-00000001", run / "mine")
    assert is_step(load_checkpoint(run / "mine"), 1)


def flips(folder: Path, count: int, seed: int):
    """(file, position, bit) at random, every file often and every byte of the small ones likely."""
    randomness = random.Random(seed)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for i in range(count):
        path = files[i % len(files)]
        yield path, randomness.randrange(path.stat().st_size), randomness.randrange(8)


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_every_flipped_bit_is_noticed_named_and_answered_with_the_previous_checkpoint(run: Path) -> None:
    folder = run / "checkpoints" / "step-00000002"
    for path, position, bit in flips(folder, 1000, seed=1):
        flip(path, position, bit)
        with pytest.warns(CheckpointWarning, match=rf"step-00000002: {path.name} was changed .*Using step-00000001"):
            assert load_checkpoint(run).step == 1
        flip(path, position, bit)
    assert is_step(load_checkpoint(run), 2)


def test_every_flipped_bit_of_latest_is_noticed_and_named(run: Path) -> None:
    latest = run / "checkpoints" / "latest"
    for position in range(latest.stat().st_size):
        for bit in range(8):
            flip(latest, position, bit)
            with pytest.warns(CheckpointWarning, match=r"latest was changed .*Using step-00000002"):
                assert load_checkpoint(run).step == 2
            flip(latest, position, bit)


def test_every_byte_of_the_manifest_counts_white_space_too(run: Path) -> None:
    path = run / "checkpoints" / "step-00000002" / "manifest.json"
    content = path.read_bytes()
    changed = [content.replace(b"\n", b"\r\n"), content + b"\n", b" " + content, content.replace(b" ", b"\t", 1)]
    for variant in [*changed, json.dumps(json.loads(content)).encode(), b"", b"[]", b"null", b"\xff"]:
        path.write_bytes(variant)
        with pytest.raises(FewbitsError, match=r"step-00000002 is damaged: manifest.json was changed"):
            load_checkpoint(path.parent)


NAMES = ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.json", "manifest.json"]


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_a_longer_and_a_missing_file_are_named(run: Path, name: str) -> None:
    path = run / "checkpoints" / "step-00000002" / name
    content = path.read_bytes()
    for changed in (content[:-1], content[: len(content) // 2], b"", content + b"\0"):
        path.write_bytes(changed)
        with pytest.warns(CheckpointWarning, match=rf"{name} (is cut off|is too long|was changed)"):
            assert is_step(load_checkpoint(run), 1)
    path.unlink()
    with pytest.warns(CheckpointWarning, match=f"{name} is missing"):
        assert is_step(load_checkpoint(run), 1)


def test_a_file_that_was_added_is_named_and_not_used(run: Path) -> None:
    (run / "checkpoints" / "step-00000002" / "generation_config.json").write_text("{}")
    (run / "checkpoints" / "step-00000002" / ".DS_Store").write_text("")
    with pytest.warns(CheckpointWarning, match="also holds generation_config.json, which fewbits did not save") as seen:
        assert is_step(load_checkpoint(run), 2)
    assert len(seen) == 1


def test_a_folder_that_was_renamed_to_another_step_is_damage(run: Path) -> None:
    (run / "checkpoints" / "step-00000002").rename(run / "checkpoints" / "step-00000003")
    with pytest.raises(FewbitsError, match="it holds step 2, so the folder was renamed"):
        load_checkpoint(run / "checkpoints" / "step-00000003")


def test_a_missing_latest_or_its_missing_folder_is_said_and_the_newest_is_used(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    with pytest.warns(CheckpointWarning, match="latest points to step-00000002, which is missing"):
        assert is_step(load_checkpoint(run), 1)
    (run / "checkpoints" / "latest").unlink()
    with pytest.warns(CheckpointWarning, match="latest is missing"):
        assert is_step(load_checkpoint(run), 1)


def test_when_none_is_intact_every_damage_is_listed(run: Path) -> None:
    flip(run / "checkpoints" / "step-00000001" / "state.json", 3, 1)
    flip(run / "checkpoints" / "step-00000002" / "model.safetensors", 300, 1)
    with pytest.raises(FewbitsError, match=r"No checkpoint .* step-00000002: model.* step-00000001: state"):
        load_checkpoint(run)


def test_a_damaged_checkpoint_that_was_named_is_not_replaced_by_another(run: Path) -> None:
    flip(run / "checkpoints" / "step-00000002" / "model.safetensors", 300, 1)
    with pytest.raises(FewbitsError, match=r"step-00000002 is damaged: model.safetensors was changed"):
        load_checkpoint(run / "checkpoints" / "step-00000002")


def test_an_intact_checkpoint_of_another_version_is_refused_and_not_passed_over(run: Path, monkeypatch) -> None:
    monkeypatch.setattr("fewbits.checkpoint.manifest.MANIFEST_VERSION", "fewbits.checkpoint/2")
    save(run / "checkpoints", 3)
    monkeypatch.undo()
    with pytest.raises(FewbitsError, match=r"written in version 2 of fewbits.checkpoint; this fewbits reads version 1"):
        load_checkpoint(run)


def test_a_manifest_with_a_right_checksum_and_wrong_content_is_refused(run: Path) -> None:
    path = run / "checkpoints" / "step-00000002" / "manifest.json"
    body = json.loads(path.read_bytes())
    del body["checksum"]
    for change, message in [
        ({"step": "2"}, "step is '2', expected int"),
        ({"files": {}}, "does not list model.safetensors"),
        ({"save_dtype": "fp8"}, "save_dtype is 'fp8', expected null or 'bf16' or 'fp16'"),
        ({"extra": 1}, "extra is not a known key"),
    ]:
        path.write_bytes(manifest._sealed(body | change))
        with pytest.raises(FewbitsError, match=message):
            load_checkpoint(path.parent)


def test_a_wrong_header_raises_instead_of_allocating(run: Path) -> None:
    """The hash would notice it too, but only after the header was believed."""
    folder = run / "checkpoints" / "step-00000002"
    content = (folder / "model.safetensors").read_bytes()
    huge = (10**9).to_bytes(8, "little") + content[8:]
    lies = content.replace(b'"shape":[6,4]', b'"shape":[9,9]').replace(b"[0,40]", b"[0,99]")
    for changed in (huge, lies, b"\xff" * 8 + content[8:]):
        (folder / "model.safetensors").write_bytes(changed)
        sizes = {"bytes": len(changed), "sha256": hashlib.sha256(changed).hexdigest()}
        body = json.loads((folder / "manifest.json").read_bytes())
        del body["checksum"]
        body["files"]["model.safetensors"] = sizes  # somebody sealed it again
        (folder / "manifest.json").write_bytes(manifest._sealed(body))
        with pytest.raises(FewbitsError, match=r"model.safetensors was changed \((its|the entry)"):
            load_checkpoint(folder)


def test_foreign_folders_get_one_sentence_each(tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match=r"does not exist. Name a run folder"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FewbitsError, match=r"it is empty"):
        load_checkpoint(tmp_path)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FewbitsError, match=r"is not a run or checkpoint of fewbits \(it holds thesis.tex\)"):
        load_checkpoint(tmp_path)
    with pytest.raises(FewbitsError, match=r"is a file. Name a run folder"):
        load_checkpoint(tmp_path / "thesis.tex")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FewbitsError, match="looks like a Hugging Face folder"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(FewbitsError, match="has no checkpoint yet"):
        load_checkpoint(tmp_path)
    (tmp_path / "step-00000007").mkdir()
    with pytest.raises(FewbitsError, match=r"step-00000007 is damaged: manifest.json is missing"):
        load_checkpoint(tmp_path / "step-00000007")


def test_an_undamaged_load_warns_of_nothing(run: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(run)


def test_another_shape_is_reported_with_the_first_tensor_and_both_shapes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 0, {"a": torch.zeros(2), "b": torch.zeros(3, 4)}, {}, {}, {}, 1)
    stored = load_checkpoint(tmp_path).model
    check_shapes({"a": torch.zeros(2), "b": (3, 4)}, stored)
    with pytest.raises(FewbitsError, match=r"'b' is \[3, 4\] there and \[4, 4\] here"):
        check_shapes({"a": (2,), "b": (4, 4)}, stored)
    with pytest.raises(FewbitsError, match=r"has no tensor 'c' \(expected \[1\]\)"):
        check_shapes({"a": (2,), "c": (1,)}, stored)
    with pytest.raises(FewbitsError, match=r"has a tensor 'b' \[3, 4\] that is not expected"):
        check_shapes({"a": (2,)}, stored)

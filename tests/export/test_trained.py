"""A run that was trained for a quantized checkpoint becomes the very model that it was, in codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fewbits
from fewbits.checkpoint.hf import read_stored
from fewbits.cli.main import run
from fewbits.errors import FewbitsError
from fewbits.export.trained import build_trained
from fewbits.kernels import dispatch
from fewbits.nn.packed import packed_layers
from fewbits.precision.precision import Precision
from fewbits.train.evaluate import evaluate_run

TRAIN = (
    "train --tokenizer bytes --max_steps 12 --warmup_steps 2 --lr 1e-2 --batch_size 4 --context 32 --n_layer 2 --n_embd 64 "
    "--n_head 4 --vocab_size 0 --eval_batches 2 --eval_every 0 --sample_every 0 --compile false --device cpu"
)
PRECISIONS = {
    "int8-qat": "int8 row, activations int8",
    "int4-qat": "int4 group:32",
    "binary-qat": "binary row",
    "fp8-qat": "fp8_e4m3 row, activations fp8",
    "int4-qat, output=bf16 x int4/group:64/learned": "int4 group:64",
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(3):
        lines = (f"{number} times {i} is {number * i}; the sum is {number + i}.\n" for i in range(100))
        (folder / f"table{number}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides multiply int8 in integers, whatever a timing would choose here."""
    monkeypatch.setattr(dispatch, "_choices", dict(dispatch._choices))
    dispatch.replay({name: ["native", "a test"] for name in ("int8 on cpu", "bf16 on cpu")})
    dispatch.replay({"int8 against bf16 on cpu": ["integers", "a test"]})


@pytest.mark.parametrize(("precision", "scheme"), PRECISIONS.items())
def test_what_is_written_is_the_model_as_it_was_trained(
    texts: Path, tmp_path: Path, precision: str, scheme: str, integers: None
) -> None:
    source, out = tmp_path / "run", tmp_path / "small"
    command = [*TRAIN.split(), "--precision", precision, "--data", str(texts), "--out_dir", str(source)]
    keep = ["--keep", "blocks.0.mlp.up"] if precision == "int4-qat" else []
    assert run([*command, *keep]) == 0
    assert run(["quantize", str(source), "--out", str(out), "--eval_batches", "2", "--device", "cpu"]) == 0
    document = json.loads((out / "quantize.json").read_text())
    assert document["scheme"] == scheme and {row["method"] for row in document["layers"]} == {"trained"}
    assert document["difference"]["mean"] == 0.0  # not a bit of the loss changes
    model, _ = fewbits.load(out)
    assert len(packed_layers(model)) == (7 if keep else 8)  # what the run kept out stays out
    trained = build_trained(source, read_stored(source), Precision.parse(precision))
    ids = torch.randint(0, 100, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(ids), trained(ids))
    if "learned" in precision:  # `fewbits eval --precision` finds the scales too, and does not make up new ones
        assert (
            evaluate_run(source, device="cpu", precision=precision)["loss"] == evaluate_run(out, device="cpu")["loss"]
        )
        with pytest.raises(FewbitsError, match="holds no learned scales"):
            evaluate_run(source, device="cpu", precision="int8-qat, output=bf16 x int8/row/learned")


def test_options_that_contradict_the_training_are_one_sentence(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "run", tmp_path / "small"
    command = [*TRAIN.split(), "--max_steps", "2", "--precision", "int4-qat", "--data", str(texts)]
    assert run([*command, "--out_dir", str(source)]) == 0
    for arguments, words in (
        (["--format", "int8"], "--format int8 contradicts it"),
        (["--granularity", "group:16"], "--granularity group:16 contradicts it"),
        (["--method", "gptq"], "--method gptq contradicts it"),
        (["--activations", "int8"], "--activations int8 contradicts it"),
        (["--dtype", "fp32"], "--dtype fp32 contradicts it"),
        (["--calibrate", str(texts)], "Leave --calibrate out"),
    ):
        capsys.readouterr()
        assert run(["quantize", str(source), "--out", str(out), "--device", "cpu", *arguments]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and words in lines[0], lines
        assert not out.exists()
    assert run(["quantize", str(source), "--out", str(out), "--device", "cpu", "--format", "int4"]) == 0

"""`fewbits quantize` as a user meets it: every format, the numbers it reports, what it refuses, and nothing half-written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import fewbits
from fewbits.checkpoint.load import load_checkpoint
from fewbits.checkpoint.save import save_model
from fewbits.cli.main import run
from fewbits.data.corpus import open_corpus
from fewbits.data.tokens import TokenStore
from fewbits.export.measured import measure, paired_difference
from fewbits.export.quantized import quantize_model
from fewbits.nn.packed import packed_layers
from fewbits.train.evaluate import evaluate_run, run_config

TRAIN = (
    "train --tokenizer bytes --max_steps 30 --warmup_steps 2 --lr 1e-2 --batch_size 8 --context 32 --n_layer 2 --n_embd 32 "
    "--n_head 4 --vocab_size 0 --eval_batches 2 --eval_every 0 --sample_every 0 --compile false --device cpu --precision fp32"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a second."""
    folder = tmp_path_factory.mktemp("trained")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(3):
        lines = (f"{number} times {i} is {number * i}; the sum is {number + i}.\n" for i in range(400))
        (texts / f"table{number}.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    (folder / "short.txt").write_text("a\nb\n", encoding="utf-8")
    assert run([*TRAIN.split(), "--data", str(texts), "--out_dir", str(folder / "run")]) == 0
    return folder / "run"


def quantize(trained: Path, out: Path, *arguments: str) -> int:
    return run(["quantize", str(trained), "--eval_batches", "4", "--device", "cpu", "--out", str(out), *arguments])


def refused(trained: Path, out: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The sentence of a refused command line, which wrote nothing."""
    capsys.readouterr()
    assert quantize(trained, out, *arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fewbits: error: "), lines
    assert not out.exists() and not list(out.parent.glob(".saving*"))
    return lines[0]


CASES = {
    "int8": ["--format", "int8"],
    "int8 activations": ["--format", "int8", "--activations", "int8"],
    "int4": ["--format", "int4"],
    "int4 mse": ["--format", "int4", "--method", "mse", "--granularity", "row"],
    "int4 gptq": ["--format", "int4", "--method", "gptq", "--granularity", "group:16"],
    "int4 awq": ["--format", "int4", "--method", "awq", "--dtype", "fp32"],
    "fp8": ["--format", "fp8"],
    "fp4": ["--format", "fp4"],
    "binary": ["--format", "binary"],
    "bf16": ["--format", "bf16"],
    "fp16": ["--format", "fp16"],
}


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())
def test_every_format_is_written_loaded_evaluated_and_generated_from(trained, tmp_path, capsys, arguments):
    out = tmp_path / "small"
    assert quantize(trained, out, *arguments) == 0, capsys.readouterr()
    document = json.loads((out / "quantize.json").read_text())
    model, tokenizer = fewbits.load(out)
    assert tokenizer is not None and document["schema"] == "fewbits.quantize/1"
    assert document["bytes_after"] == pytest.approx((out / "model.safetensors").stat().st_size, rel=0.01)
    assert document["bytes_before"] > 1.5 * document["bytes_after"]
    # the model that was measured is the model that is on disk: same loss to the last bit on the whole held-out part
    found = evaluate_run(out, device="cpu")
    source = evaluate_run(trained, device="cpu")
    assert found["data"] == source["data"] and found["part"] == "held out" and found["tokens"] == source["tokens"]
    limit = {"binary": 1.0, "int4": 0.1, "fp4": 0.1}.get(arguments[1], 0.01)
    assert abs(found["loss"] / source["loss"] - 1) < limit
    assert run(["generate", str(out), "--prompt", "1 times", "--tokens", "5", "--device", "cpu"]) == 0
    plain = arguments[1] in ("bf16", "fp16")
    assert bool(packed_layers(model)) != plain and len(document["layers"]) == (0 if plain else 8)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "held-out loss" in page and ("blocks.1.mlp.down" in page) != plain


def test_the_document_says_what_was_measured(trained, tmp_path, capsys):
    assert quantize(trained, tmp_path / "small", "--format", "int4", "--method", "gptq") == 0
    printed = capsys.readouterr().out
    document = json.loads((tmp_path / "small" / "quantize.json").read_text())
    before, after = document["before"], document["after"]
    assert math.exp(after["loss"]) == pytest.approx(after["perplexity"])
    assert all(0 <= after[name] <= 1 for name in ("accuracy", "precision", "recall", "f1"))
    assert document["difference"]["mean"] == pytest.approx(after["loss"] / before["loss"] - 1)
    low, high = document["difference"]["interval"]
    assert low < document["difference"]["mean"] < high and document["difference"]["batches"] == len(
        after["batch_losses"]
    )
    assert set(document["generation_tok_per_s"]) == {"before (float32)", "before, in bf16", "after"}
    assert document["calibrated_on"] == document["measured_on"] and document["stored_as"].startswith(
        "compressed-tensors"
    )
    assert "embedding and head, one tied weight" in json.dumps(document["choices"])
    assert "--method gptq" in document["command"] and "--act_order" not in document["command"]
    for words in ("blocks.0.attention.qkv", "held-out loss", "weights on disk", "next token: F1", "kept"):
        assert words in printed


def test_calibration_reads_the_training_part_and_never_the_held_out_one(trained, tmp_path, monkeypatch):
    seen = []

    def spy(model, options, batches):
        seen.extend(batches)
        return quantize_model(model, options, batches)

    monkeypatch.setattr("fewbits.export.run.quantize_model", spy)
    assert quantize(trained, tmp_path / "small", "--format", "int4", "--method", "gptq") == 0
    config = run_config(trained)
    store = TokenStore.open_or_build(open_corpus(config.data.data), fewbits.load(trained)[1])
    train, val = (bytes(bytearray(int(i) % 256 for i in part)) for part in (store.train, store.val))
    rows = [bytes(bytearray(int(i) % 256 for i in row)) for batch in seen for row in batch["input_ids"]]
    assert len(rows) >= 8 and all(row in train and row not in val for row in rows)


def test_the_difference_is_paired_by_batch():
    before = {"loss": 2.0, "batch_losses": [1.0, 3.0]}
    after = {"loss": 2.02, "batch_losses": [1.01, 3.03]}
    found = paired_difference(before, after)
    # differences 0.005 and 0.015 of the loss: deviation 0.00707, t(0.975, 1) = 12.7062, over the root of 2
    assert found["mean"] == pytest.approx(0.01)
    assert found["interval"] == pytest.approx([0.01 - 12.7062 * 0.005, 0.01 + 12.7062 * 0.005], rel=1e-4)
    assert (
        paired_difference({"loss": 1.0, "batch_losses": [1.0]}, {"loss": 1.0, "batch_losses": [1.0]})["interval"]
        is None
    )


def test_measure_agrees_with_evaluation(trained):
    model, tokenizer = fewbits.load(trained)
    ids = torch.randint(0, 200, (2, 2, 33))
    batches = [{"input_ids": rows[:, :-1], "labels": rows[:, 1:].clone()} for rows in ids]
    batches[1]["labels"][:, ::2] = -100
    found = measure(model, batches, tokenizer.token_bytes)
    with torch.no_grad():
        logits = torch.cat([model(batch["input_ids"]).flatten(0, 1) for batch in batches])
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    assert found["tokens"] == int((labels != -100).sum())
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    real = labels != -100
    assert found["accuracy"] == pytest.approx(float((logits[real].argmax(-1) == labels[real]).float().mean()))


def test_layers_that_are_kept_stay_as_they_are(trained, tmp_path, capsys):
    assert quantize(trained, tmp_path / "small", "--keep", "blocks.0.*,*.down") == 0
    model, _ = fewbits.load(tmp_path / "small")
    assert list(packed_layers(model)) == ["blocks.1.attention.qkv", "blocks.1.attention.output", "blocks.1.mlp.up"]
    source, _ = fewbits.load(trained)
    assert torch.equal(model.blocks[0].mlp.up.weight, source.blocks[0].mlp.up.weight.bfloat16())


def test_a_hugging_face_folder_and_an_untied_head(tmp_path, trained, capsys):
    config = fewbits.ModelConfig(
        vocab_size=264, context=32, n_layer=1, n_head=2, n_embd=32, norm="rmsnorm", activation="swiglu", positions="rope",
        bias=False, tied=False,
    )  # fmt: skip
    from fewbits.checkpoint.hf import to_hf

    config_json, tensors = to_hf(config, fewbits.Transformer(config).state_dict())
    del config_json["fewbits"]
    checkpoint = load_checkpoint(trained)
    files = {"config.json": json.dumps(config_json), "tokenizer.json": checkpoint.files["tokenizer.json"]}
    folder = save_model(tmp_path / "llama", 0, tensors, {}, files)
    for name in ("manifest.json", "state.json", "optimizer.safetensors"):
        (folder / name).unlink()
    texts = str(trained.parent / "texts")
    missing = refused(folder, tmp_path / "small", capsys, "--format", "int4", "--method", "gptq")
    assert "does not say what it was trained on, and gptq needs a text. Name one with --calibrate" in missing
    arguments = ["--format", "int4", "--method", "gptq", "--calibrate", texts, "--data", texts, "--keep", "none"]
    assert quantize(folder, tmp_path / "small", *arguments) == 0, capsys.readouterr()
    model, _ = fewbits.load(tmp_path / "small")
    assert "head" in packed_layers(model)
    rows = json.loads((tmp_path / "small" / "quantize.json").read_text())["layers"]
    assert {row["layer"]: row["method"] for row in rows}["head"] == "mse"  # no block sees its inputs
    assert run(["generate", str(tmp_path / "small"), "--tokens", "3", "--device", "cpu"]) == 0


BAD = {
    "format": (["--format", "int9x"], "There is no format 'int9x' to quantize with. Did you mean 'int"),
    "method": (["--method", "gtpq"], "no method 'gtpq' to quantize with. Did you mean 'gptq'"),
    "granularity": (["--granularity", "rows"], "There is no granularity 'rows'. Did you mean 'row'"),
    "group": (
        ["--format", "int4", "--granularity", "group:24"],
        "group:24 does not divide the width 32 of blocks.0.attention.qkv. Use group:16",
    ),
    "gptq with fp16": (["--format", "fp16", "--method", "gptq"], "Method gptq does not apply to fp16"),
    "scales of bf16": (["--format", "bf16", "--granularity", "row"], "bf16 has no scales and no integers"),
    "gptq with binary": (["--format", "binary", "--method", "gptq"], "binary takes method nearest only"),
    "activations of int4": (
        ["--format", "int4", "--activations", "int8", "--granularity", "group:16"],
        "multiply int8 weights with one scale a row, not int4 group:16",
    ),
    "activations of auto": (["--format", "int4", "--activations", "int8"], "multiply int8 weights"),
    "keep": (["--keep", "blocks.9.*"], "keep 'blocks.9.*' matches no linear layer"),
    "keep all": (["--keep", "blocks"], "keeps every linear layer, so nothing is quantized"),
    "dtype": (["--dtype", "fp8"], "no dtype 'fp8'"),
    "corpus": (["--method", "gptq", "--calibrate", "nowhere"], "No corpus 'nowhere'"),
    "empty corpus": (["--method", "gptq", "--calibrate", "EMPTY"], "is empty. Name a file with text in it"),
    "short corpus": (
        ["--method", "gptq", "--calibrate", "SHORT"],
        "tokens, fewer than one context of 32 and the token after it. Name more text with --calibrate",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_sentence_and_leaves_nothing(trained, tmp_path, capsys, arguments, message):
    folder = trained.parent
    words = [{"EMPTY": str(folder / "empty.txt"), "SHORT": str(folder / "short.txt")}.get(w, w) for w in arguments]
    assert message in refused(trained, tmp_path / "small", capsys, *words)


def test_weights_that_are_not_finite_are_named(trained, tmp_path, capsys):
    checkpoint = load_checkpoint(trained)
    name = "transformer.h.1.mlp.c_fc.weight"
    checkpoint.model[name][3, 5] = float("nan")
    checkpoint.model[name][4, 7] = float("inf")
    bad = save_model(tmp_path / "bad", 30, checkpoint.model, checkpoint.state, checkpoint.files)
    said = refused(bad, tmp_path / "small", capsys)
    assert "'blocks.1.mlp.up.weight' holds nan at [5, 3] (2 in all)" in said


def test_a_quantized_checkpoint_is_not_quantized_resumed_or_opened_in_a_precision(trained, tmp_path, capsys):
    small = tmp_path / "small"
    assert quantize(trained, small) == 0
    said = refused(small, tmp_path / "again", capsys, "--format", "int4")
    assert "is quantized already (int8 row). Quantize the checkpoint that it was made from" in said
    capsys.readouterr()
    assert run(["train", "--resume", str(small)]) == 2
    assert (
        "was made by `fewbits quantize`: it is for use (eval, generate), and cannot be trained on"
        in capsys.readouterr().err
    )
    with pytest.raises(
        fewbits.FewbitsError, match=r"is quantized \(int8 row\) and runs as it is stored, not in bf16-mixed"
    ):
        evaluate_run(small, device="cpu", precision="bf16-mixed")
    with pytest.raises(fewbits.FewbitsError, match="cannot be prepared as fp16-mixed"):
        fewbits.prepare(fewbits.load(small)[0], "fp16-mixed")
    assert evaluate_run(small, device="cpu")["precision"] == "int8 row, in bf16"


def test_a_folder_that_is_there_is_refused_before_any_work(trained, tmp_path, capsys):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine.txt").write_text("mine")
    assert quantize(trained, tmp_path / "small") == 2
    captured = capsys.readouterr()
    assert "is there already and will not be overwritten" in captured.err and "quantizing" not in captured.out


def test_without_out_it_is_written_beside_the_run(trained, capsys):
    base = ["quantize", str(trained), "--eval_batches", "1", "--device", "cpu", "--format", "int4", "--method", "mse"]
    assert run(base) == 0
    assert (trained.parent / "run-int4-mse" / "model.safetensors").is_file()

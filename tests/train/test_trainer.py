"""The loop: what it leaves behind, what it counts, how it ends, and how it goes on."""

from __future__ import annotations

import io
import json
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fewbits.checkpoint.load import load_checkpoint
from fewbits.errors import FewbitsError
from fewbits.step import StepResult
from fewbits.train import begin, trainer
from fewbits.train.build import Training
from fewbits.train.config import Config
from fewbits.train.record import read_lines
from fewbits.train.rundir import Lock
from fewbits.train.trainer import exit_code, train

Make = Callable[..., Config]


def _lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return list(read_lines(run / name))


def _steps(run: Path) -> list[dict[str, Any]]:
    return [line for line in _lines(run) if "loss" in line]


def _at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """Does `act` while the given step runs."""
    take = Training.take_step

    def acting(self: Training) -> StepResult:
        if self.step.attempts + 1 == step:
            act()
        return take(self)

    monkeypatch.setattr(Training, "take_step", acting)


def _assert_same_end(a: Path, b: Path) -> None:
    left, right = load_checkpoint(a), load_checkpoint(b)
    assert left.step == right.step and left.state["step"] == right.state["step"]
    for one, other in ((left.model, right.model), (left.optimizer, right.optimizer)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_leaves_what_it_promises(tiny: Make, tmp_path: Path) -> None:
    summary = train(tiny(eval_every=3, sample_every=3, save_every=3, keep_checkpoints=2), quiet=True)
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} >= {"config.toml", "metrics.jsonl", "summary.json", "checkpoints"}
    assert json.loads((run / "summary.json").read_text()) == json.loads(json.dumps({"schema": 1, **summary}))
    assert {path.name for path in (run / "checkpoints").glob("step-*")} == {"step-00000003", "step-00000006"}
    assert set(_steps(run)[0]) == {
        "step", "tokens", "loss", "lr", "grad_norm", "loss_scale", "skipped", "ms", "tok_per_s", "mfu", "memory_bytes"
    }  # fmt: skip
    evaluations = [line for line in _lines(run) if "val_loss" in line]
    assert [line["step"] for line in evaluations] == [3, 6]
    assert [e["step"] for e in _lines(run, "events.jsonl") if e["event"] == "sample"] == [3, 6]
    assert summary["status"] == "finished" and exit_code(summary) == 0
    assert summary["val_loss"] == evaluations[-1]["val_loss"] and summary["final_loss"] == _steps(run)[-1]["loss"]
    assert summary["compression"]["gzip"] > 0 and summary["precision_table"] and summary["choices"]


def test_the_last_step_is_always_logged(tiny: Make, tmp_path: Path) -> None:
    train(tiny(max_steps=5, log_every=3), quiet=True)
    assert [line["step"] for line in _steps(tmp_path / "run")] == [1, 3, 5]


def test_the_loss_in_the_log_is_that_steps_own(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, float] = {}
    take = Training.take_step

    def noting(self: Training) -> StepResult:
        result = take(self)
        seen[self.step.attempts] = float(result.loss)
        return result

    monkeypatch.setattr(Training, "take_step", noting)
    train(tiny(max_steps=7, log_every=3), quiet=True)
    assert all(line["loss"] == seen[line["step"]] for line in _steps(tmp_path / "run"))


def test_the_device_is_read_at_log_points_only(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = trainer.Run._read

    def counting(self: trainer.Run, logs: bool) -> None:
        reads.append(self.done)
        read(self, logs)

    monkeypatch.setattr(trainer.Run, "_read", counting)
    train(tiny(max_steps=12, log_every=4, save_every=6), quiet=True)
    assert reads == [1, 4, 6, 8, 12]


def test_the_learning_rate_in_the_log_is_the_one_that_moved_the_weights(tiny: Make, tmp_path: Path) -> None:
    config = tiny(log_every=1, lr=0.5, warmup_steps=3, schedule="constant")
    train(config, quiet=True)
    assert [line["lr"] for line in _steps(tmp_path / "run")] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_a_skipped_step_is_counted_named_and_does_not_advance_the_schedule(tiny: Make, tmp_path: Path) -> None:
    config = tiny(
        precision="fp16-mixed", loss_scale="dynamic:initial=16777216,ceiling=16777216", log_every=1, max_steps=12,
        warmup_steps=12, schedule="constant",
    )  # fmt: skip
    summary = train(config, quiet=True)
    steps = _steps(tmp_path / "run")
    skipped = [n for e in _lines(tmp_path / "run", "events.jsonl") if e["event"] == "skipped" for n in e["steps"]]
    assert skipped and summary["skipped_steps"] == len(skipped) == steps[-1]["skipped"]
    assert steps[0]["loss_scale"] == 2.0**24 and steps[1]["loss_scale"] == 2.0**23
    assert steps[0]["lr"] == steps[1]["lr"] < steps[-1]["lr"]


def test_tokens_over_wall_time_is_the_reported_speed(tiny: Make, tmp_path: Path) -> None:
    summary = train(tiny(log_every=1, eval_every=2), quiet=True)
    assert summary["tokens"] == 6 * 4 * 16
    assert summary["tok_per_s"] == pytest.approx(summary["tokens"] / summary["wall_s"])
    for line in _steps(tmp_path / "run"):
        assert line["tok_per_s"] == pytest.approx(1000 * 4 * 16 / line["ms"])
    assert sum(line["ms"] for line in _steps(tmp_path / "run")) / 1000 <= summary["wall_s"]


def test_epochs_and_distinct_tokens_are_stated(tiny: Make) -> None:
    summary = train(tiny(max_steps=200, log_every=50), quiet=True)
    assert summary["epochs"] > 1 and 0 < summary["distinct_tokens"] < summary["tokens"]


def test_the_written_config_has_resolved_values_and_repeats_the_run(tiny: Make, tmp_path: Path) -> None:
    first = train(tiny("a", precision="auto", compile="auto", device="auto"), quiet=True)
    text = (tmp_path / "a" / "config.toml").read_text()
    config = Config.from_toml(text)
    assert config.precision == first["precision"] and config.model.vocab_size > 0
    assert config.train.device not in ("", "auto") and config.train.compile == "false"
    train(replace(config, train=replace(config.train, out_dir=str(tmp_path / "b"))), quiet=True)
    _assert_same_end(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(("precision", "master"), [("fp32", "auto"), ("bf16-mixed", "split"), ("fp16-mixed", "fp32")])
def test_stop_and_resume_equal_one_run(tiny: Make, tmp_path: Path, precision: str, master: str) -> None:
    options = {"precision": precision, "master": master, "dropout": 0.1, "micro_batches": 2, "eval_every": 2}
    whole = train(tiny("whole", **options), quiet=True)
    part = train(tiny("part", stop_at=3, **options), quiet=True)
    assert part["status"] == "stopped" and part["steps"] == 3 and exit_code(part) == 0
    rest = train(tiny("part", **options), resume=tmp_path / "part", quiet=True)
    _assert_same_end(tmp_path / "whole", tmp_path / "part")
    for key in ("final_loss", "val_loss", "tokens", "epochs", "skipped_steps", "status"):
        assert rest[key] == whole[key], key
    assert [line["step"] for line in _steps(tmp_path / "part")] == [1, 2, 3, 4, 6]


def test_a_resumed_run_reuses_its_choices_and_times_nothing(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = train(tiny(stop_at=3, precision="auto", compile="auto"), quiet=True)
    monkeypatch.setattr(begin, "choose_execution", lambda *_: pytest.fail("chosen again"))
    after = train(tiny(precision="auto", compile="auto"), resume=tmp_path / "run", quiet=True)
    assert {c["what"]: c["value"] for c in after["choices"]} == {c["what"]: c["value"] for c in before["choices"]}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    train(tiny("whole"), quiet=True)
    with monkeypatch.context() as patch:
        _at_step(patch, 4, lambda: signal.raise_signal(signal.Signals[name]))
        summary = train(tiny("cut"), quiet=True)
    assert summary["status"] == "stopped" and summary["reason"] == name and summary["steps"] == 4
    assert exit_code(summary) == 128 + signal.Signals[name]
    assert _steps(tmp_path / "cut")[-1]["step"] == 4
    train(tiny("cut"), resume=tmp_path / "cut", quiet=True)
    _assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_a_signal_during_an_evaluation_saves_too(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainer.evaluate

    def interrupted(*arguments: Any) -> dict[str, Any]:
        signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(trainer, "evaluate", interrupted)
    summary = train(tiny(eval_every=2), quiet=True)
    assert summary["status"] == "stopped" and summary["reason"] == "SIGTERM"
    assert load_checkpoint(tmp_path / "run").step == summary["steps"] == 3


def test_a_second_ctrl_c_stops_at_once_and_says_so(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.Interrupts, "SAME_PRESS_S", 0.0)

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    _at_step(monkeypatch, 4, twice)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), quiet=True)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "stopped"


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny("whole"), quiet=True)

    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        _at_step(patch, 4, kill)
        train(tiny("cut"), quiet=True)
    (tmp_path / "cut" / "summary.json").unlink()
    train(tiny("cut"), resume=tmp_path / "cut", quiet=True)
    _assert_same_end(tmp_path / "whole", tmp_path / "cut")
    assert [line["step"] for line in _steps(tmp_path / "cut")] == [1, 2, 4, 6]


def test_a_crash_is_told_in_the_summary_and_raised(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> None:
        raise RuntimeError("the cable was pulled")

    _at_step(monkeypatch, 3, crash)
    with pytest.raises(RuntimeError, match="cable"):
        train(tiny(), quiet=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "crashed" and "cable" in summary["reason"] and summary["steps"] == 2
    Lock(tmp_path / "run").release()  # and the lock is free again


@pytest.mark.parametrize("log_every", [1, 4, 100])
def test_a_diverged_run_ends_and_says_at_which_step(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    take = Training.take_step

    def poison(self: Training) -> StepResult:
        if self.step.attempts == 4:  # the fifth step
            with torch.no_grad():
                self.model.embed.weight[:] = torch.nan
        return take(self)

    monkeypatch.setattr(Training, "take_step", poison)
    summary = train(tiny(max_steps=9, log_every=log_every, save_every=3), quiet=True)
    assert summary["status"] == "diverged" and exit_code(summary) == 3
    assert summary["steps"] == 5 and summary["reason"] == "the loss is nan at step 5" and summary["skipped_steps"] == 1
    last = _steps(tmp_path / "run")[-1]
    assert last["step"] == 5 and last["loss"] is None and last["nonfinite"]["loss"] == "nan"
    assert summary["checkpoint"].endswith("step-00000003")
    assert load_checkpoint(tmp_path / "run").step == 3  # nothing broken was saved over it


def test_a_finished_run_is_not_resumed_and_says_what_it_is(tiny: Make, tmp_path: Path) -> None:
    train(tiny(), quiet=True)
    with pytest.raises(FewbitsError, match=r"is finished: 6 steps are done and max_steps is 6, held-out loss \d"):
        train(tiny(), resume=tmp_path / "run", quiet=True)


def test_a_run_that_was_made_longer_stays_longer(tiny: Make, tmp_path: Path) -> None:
    train(tiny(), quiet=True)
    train(tiny(max_steps=10, stop_at=8), resume=tmp_path / "run", quiet=True)
    stored = Config.from_toml((tmp_path / "run" / "config.toml").read_text(encoding="utf-8"))
    assert stored.train.max_steps == 10 and stored == replace(stored, train=replace(stored.train, stop_at=0))
    assert train(stored, resume=tmp_path / "run", quiet=True)["steps"] == 10


def test_a_resumed_run_says_which_options_it_does_not_take(tiny: Make, tmp_path: Path) -> None:
    train(tiny(stop_at=2), quiet=True)
    shown = io.StringIO()
    train(tiny(compile="true", graph="false"), resume=tmp_path / "run", console=Console(file=shown, width=200))
    assert "--compile true is not taken: a resumed run keeps what it began with" in shown.getvalue()


def test_a_foreign_folder_is_not_resumed_and_says_what_is_in_it(tiny: Make, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(FewbitsError, match=r"not a run of fewbits.*thesis\.tex"):
        train(tiny(), resume=tmp_path / "other", quiet=True)
    with pytest.raises(FewbitsError, match="does not exist"):
        train(tiny(), resume=tmp_path / "nowhere", quiet=True)


@pytest.mark.parametrize("change", [{"lr": 0.1}, {"n_layer": 2}, {"seed": 1}, {"batch_size": 8}, {"dropout": 0.3}])
def test_a_resumed_run_keeps_what_moves_its_weights(tiny: Make, tmp_path: Path, change: dict[str, Any]) -> None:
    train(tiny(stop_at=2), quiet=True)
    with pytest.raises(FewbitsError, match=f"{next(iter(change))} was .* a resumed run keeps it"):
        train(tiny(**change), resume=tmp_path / "run", quiet=True)


def test_resuming_falls_back_to_the_checkpoint_before_a_damaged_one(tiny: Make, tmp_path: Path) -> None:
    train(tiny("whole", save_every=2), quiet=True)
    train(tiny("cut", save_every=2, stop_at=4), quiet=True)
    file = tmp_path / "cut" / "checkpoints" / "step-00000004" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tiny("cut", save_every=2), resume=tmp_path / "cut", quiet=True)
    assert any("model.safetensors" in str(warning.message) for warning in caught)
    _assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_two_runs_in_one_directory_are_refused(tiny: Make, tmp_path: Path) -> None:
    lock = Lock(tmp_path / "run")
    with pytest.raises(FewbitsError, match="Another run"):
        train(tiny(), quiet=True)
    lock.release()
    train(tiny(stop_at=2), quiet=True)
    with pytest.raises(FewbitsError, match="holds a run already"):
        train(tiny(), quiet=True)
    lock = Lock(tmp_path / "run")
    with pytest.raises(FewbitsError, match="Another run"):
        train(tiny(), resume=tmp_path / "run", quiet=True)
    lock.release()


@pytest.mark.parametrize(
    "mistake",
    [
        {"data": "no/such/file.txt"},
        {"n_head": 3},
        {"context": 100_000},
        {"precision": "bf17"},
        {"device": "xpu"},
        {"tokenizer": "chars", "prompt": "\u2603", "sample_every": 3},
    ],
)
def test_a_mistake_leaves_nothing_behind(tiny: Make, tmp_path: Path, mistake: dict[str, Any]) -> None:
    with pytest.raises(FewbitsError):
        train(tiny(**mistake), quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_default_directory_is_numbered_by_recipe(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        train(tiny(""), quiet=True)
        assert (tmp_path / "runs" / f"nano-{number}" / "summary.json").exists()


def test_text_that_leaves_nothing_to_evaluate_on_is_refused_before_anything_is_trained(
    tiny: Make, tmp_path: Path
) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"text": "a single document. " * 100}) + "\n")
    with pytest.raises(FewbitsError, match="held out"):
        train(tiny(data=str(one)), quiet=True)
    assert not (tmp_path / "run").exists()


def test_several_ranks_are_refused(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FewbitsError, match="2 ranks"):
        train(tiny(), quiet=True)


def test_what_is_shown_names_every_choice_with_its_reason(tiny: Make) -> None:
    file = io.StringIO()
    train(tiny(eval_every=3, sample_every=6), console=Console(file=file, width=100))
    shown = file.getvalue()
    for word in ("device", "precision", "compile", "(why: ", "gzip", "xz", "loss scale", "reductions", "perplexity",
                 "6 N + 6 L D T", "finished", "wrote", "eta", "sample"):  # fmt: skip
        assert word in shown, word


def test_global_switches_are_put_back(tiny: Make) -> None:
    before = torch.get_float32_matmul_precision(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    train(tiny(precision="tf32", deterministic=True), quiet=True)
    after = torch.get_float32_matmul_precision(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    assert after == before

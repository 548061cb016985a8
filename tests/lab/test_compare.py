"""The orchestrator of comparisons: order, reuse, resuming, honest rows. Children are replaced by quick fakes here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fewbits.errors import FewbitsError
from fewbits.lab import session
from fewbits.lab.child import Ended
from fewbits.lab.compare import Comparison, compare
from fewbits.train.config import Config

BASE = Config.from_toml(
    'name = "tiny"\n[model]\ncontext = 32\nn_layer = 2\nn_head = 2\nn_embd = 32\n[data]\ntokenizer = "bytes"\n'
    '[optim]\nwarmup_steps = 10\n[train]\nmax_steps = 100\nbatch_size = 4\neval_batches = 2\ndevice = "cpu"\n'
)


class Children:
    """Stands in for `run_child`: writes what a block or a training would, and remembers what it was asked."""

    def __init__(self, loss: Callable[[Config], float | None] = lambda c: 2.0):
        self.loss, self.asked, self.configs = loss, [], []  # type: ignore[var-annotated]
        self.interrupt_at = -1
        self.crash = ""

    def __call__(self, arguments: Sequence[str], log: Path, watch: Callable[[], None] | None = None) -> Ended:
        if len(self.asked) == self.interrupt_at:
            self.interrupt_at = -1
            raise KeyboardInterrupt
        if arguments[1] == "fewbits.lab.block":
            spec = json.loads(Path(arguments[2]).read_text())
            config = Config.from_toml(spec["config"])
            self.asked.append(f"block {config.precision}")
            ms = {"fp32": 20.0, "bf16-mixed": 10.0}.get(config.precision, 40.0)
            size = {"fp32": 100, "bf16-mixed": 50}.get(config.precision, 80)
            block = {"status": "ok", "ms_per_step": ms, "tok_per_s": 1e3 / ms, "steps": 5, "timed_s": 1.0, "skipped": 0,
                     "peak_memory_bytes": size, "memory": {"activations": size}, "precision": "fp32",
                     "choices": [{"what": "precision", "value": "fp32", "reason": "fastest here"}]}  # fmt: skip
            return Ended(0, 3.0, "noise\n" + json.dumps(block) + "\n", "")
        resumed = "--resume" in arguments
        run = Path(arguments[-1])
        config = Config.from_toml((run / "config.toml" if resumed else Path(arguments[4])).read_text())
        self.configs.append(config)
        self.asked.append(f"{'resume' if resumed else 'train'} {run.parent.name} {config.train.seed}")
        run.mkdir(parents=True, exist_ok=True)
        if self.crash in self.asked[-1] and self.crash:
            log.write_text("Traceback ...\nRuntimeError: boom\n")
            return Ended(1, 1.0, "", "RuntimeError: boom")
        loss = self.loss(config)
        status = "diverged" if loss is None else "finished"
        summary = {"status": status, "val_loss": loss, "bits_per_byte": loss, "skipped_steps": 1, "steps": 100}
        (run / "summary.json").write_text(json.dumps(summary))
        if watch:
            watch()
        return Ended(0, 2.0, "", "")


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    fake = Children()
    monkeypatch.setattr(session, "run_child", fake)
    return fake


def ask(out: Path, **more: Any) -> Comparison:
    return compare(BASE, **{"precisions": ["fp32", "bf16-mixed"], "out_dir": out, "quiet": True, **more})


def test_blocks_alternate_and_runs_follow_seed_by_seed(children: Children, tmp_path: Path) -> None:
    ask(tmp_path / "c", seeds=2)
    assert children.asked == [
        "block fp32", "block bf16-mixed", "block fp32", "block bf16-mixed",
        "train fp32 0", "train bf16-mixed 0", "train fp32 1", "train bf16-mixed 1",
    ]  # fmt: skip


def test_speed_and_memory_are_ratios_to_the_first_row(children: Children, tmp_path: Path) -> None:
    row = ask(tmp_path / "c").row("bf16-mixed")
    assert (row["speed_ratio"], row["time_ratio"], row["memory_ratio"]) == pytest.approx((2.0, 0.5, 0.5), rel=1e-12)
    assert row["memory"] == {"activations": 50}


def test_differences_are_relative_and_paired_by_seed(children: Children, tmp_path: Path) -> None:
    children.loss = lambda c: (2.0 + c.train.seed) * (1.02 if c.precision == "bf16-mixed" else 1.0)
    result = ask(tmp_path / "c")
    assert result.row("bf16-mixed")["differences"] == pytest.approx([0.02] * 3, rel=1e-12)
    assert result.verdict("bf16-mixed") == "worse"


def test_two_seeds_are_not_a_verdict(children: Children, tmp_path: Path) -> None:
    assert ask(tmp_path / "c", seeds=2).verdict("bf16-mixed") == "not shown"


def test_a_finished_comparison_runs_nothing_again(children: Children, tmp_path: Path) -> None:
    first = ask(tmp_path / "c")
    done = len(children.asked)
    assert ask(tmp_path / "c").rows == first.rows and len(children.asked) == done


def test_more_seeds_add_only_their_runs(children: Children, tmp_path: Path) -> None:
    ask(tmp_path / "c", seeds=2)
    children.asked.clear()
    ask(tmp_path / "c", seeds=3)
    assert children.asked == ["train fp32 2", "train bf16-mixed 2"]


def test_another_value_adds_only_its_blocks_and_runs(children: Children, tmp_path: Path) -> None:
    ask(tmp_path / "c", seeds=1)
    children.asked.clear()
    ask(tmp_path / "c", seeds=1, precisions=["fp32", "bf16-mixed", "fp16-mixed"])
    assert children.asked == ["block fp16-mixed", "block fp16-mixed", "train fp16-mixed 0"]


@pytest.mark.parametrize("at", range(8))
def test_interrupted_anywhere_it_goes_on_to_the_same_rows(children: Children, tmp_path: Path, at: int) -> None:
    whole = ask(tmp_path / "whole", seeds=2).rows
    children.asked.clear()
    children.interrupt_at = at
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path / "c", seeds=2)
    assert ask(tmp_path / "c", seeds=2).rows == whole
    assert len(children.asked) == 8  # nothing ran twice


def test_a_run_with_a_checkpoint_is_resumed_and_one_without_starts_anew(children: Children, tmp_path: Path) -> None:
    children.interrupt_at = 5
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path / "c", seeds=1)
    cut = tmp_path / "c" / "runs" / "bf16-mixed" / "seed-0"
    (cut / "checkpoints").mkdir(parents=True)
    (cut / "checkpoints" / "latest").write_text("step-00000003")
    (cut / "config.toml").write_text((cut.parent / "seed-0.toml").read_text())
    ask(tmp_path / "c", seeds=2)
    assert children.asked[5:] == ["resume bf16-mixed 0", "train fp32 1", "train bf16-mixed 1"]


def test_a_diverged_run_is_reported_and_not_run_again(children: Children, tmp_path: Path) -> None:
    children.loss = lambda c: None if (c.precision, c.train.seed) == ("bf16-mixed", 1) else 2.0
    row = ask(tmp_path / "c").row("bf16-mixed")
    assert row["verdict"]["kind"] == "diverged" and row["losses"] == [2.0, None, 2.0]
    done = len(children.asked)
    ask(tmp_path / "c")
    assert len(children.asked) == done


def test_a_diverged_reference_leaves_nothing_shown(children: Children, tmp_path: Path) -> None:
    children.loss = lambda c: None if c.precision == "fp32" and c.train.seed == 0 else 2.0
    judged = ask(tmp_path / "c", seeds=4).row("bf16-mixed")["verdict"]
    assert judged["kind"] == "not shown" and "reference" in judged["reason"]


def test_a_crashed_run_says_its_last_line_and_is_tried_again(children: Children, tmp_path: Path) -> None:
    children.crash = "train bf16-mixed 0"
    result = ask(tmp_path / "c")
    crashed = [run for run in result.document["runs"] if run["status"] == "crashed"]
    assert [run["reason"] for run in crashed] == ["RuntimeError: boom"] and result.verdict("bf16-mixed") == "not shown"
    children.crash = ""
    assert ask(tmp_path / "c").verdict("bf16-mixed") == "same"


def test_another_training_in_the_same_folder_is_refused_by_name(children: Children, tmp_path: Path) -> None:
    ask(tmp_path / "c", seeds=1)
    other = replace(BASE, optim=replace(BASE.optim, lr=0.5))
    with pytest.raises(FewbitsError, match=r"optim\.lr was 0\.0006 and is now 0\.5"):
        compare(other, ["fp32", "bf16-mixed"], seeds=1, out_dir=tmp_path / "c", quiet=True)


def test_the_folder_of_a_run_is_not_taken_for_a_comparison(children: Children, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("seed = 7")
    with pytest.raises(FewbitsError, match=r"run holds a run already"):
        ask(tmp_path / "run")
    assert (tmp_path / "run" / "config.toml").read_text() == "seed = 7" and not children.asked


@pytest.mark.parametrize("rounds", [0, 2])
def test_what_no_run_can_do_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rounds: int) -> None:
    refused = Ended(2, 1.0, "", "fewbits: error: No corpus 'nowhere.txt'.")
    monkeypatch.setattr(session, "run_child", lambda *arguments: refused)
    with pytest.raises(FewbitsError, match=r"No corpus 'nowhere\.txt'"):
        ask(tmp_path / "c", rounds=rounds)
    assert not (tmp_path / "c").exists()


def test_any_option_can_be_varied(children: Children, tmp_path: Path) -> None:
    result = compare(
        replace(BASE, precision="fp32"), vary=("lr", ["1e-3", "3e-3"]), seeds=1, out_dir=tmp_path / "c", quiet=True
    )
    assert result.document["key"] == "optim.lr"
    assert [c.optim.lr for c in children.configs] == [1e-3, 3e-3]


def test_an_open_precision_is_decided_once_for_all_rows(children: Children, tmp_path: Path) -> None:
    compare(BASE, vary=("optim.clip", ["0", "1"]), seeds=1, out_dir=tmp_path / "c", quiet=True)
    assert children.asked[0] == "block auto" and children.asked.count("block auto") == 1
    assert {c.precision for c in children.configs} == {"fp32"}


def test_batch_sizes_are_judged_on_the_same_held_out_sequences(children: Children, tmp_path: Path) -> None:
    compare(replace(BASE, precision="fp32"), vary=("batch_size", ["4", "8"]), seeds=1, out_dir=tmp_path, quiet=True)
    assert [(c.train.batch_size, c.train.eval_batches) for c in children.configs] == [(4, 2), (8, 1)]


def test_a_variant_can_be_compared_with_itself(children: Children, tmp_path: Path) -> None:
    result = ask(tmp_path / "c", precisions=["bf16-mixed", "bf16"])
    assert result.document["variants"] == ["bf16-mixed", "bf16-mixed (2)"]
    assert result.verdict("bf16-mixed (2)") == "same"


def test_a_budget_shortens_the_horizon_with_its_warm_up_and_says_so(children: Children, tmp_path: Path) -> None:
    # 4 blocks of 3 fake seconds are not really spent; a run costs 1.5 * 2 s of start-up, 100 steps of 20 or 10 ms and
    # evaluations. 24 s for 6 runs leave about 0.2 s of steps each after start-up, far below 100 steps.
    result = ask(tmp_path / "c", budget=0.42)
    steps = children.configs[0].train.max_steps
    assert 20 <= steps < 100 and {c.train.max_steps for c in children.configs} == {steps}
    assert children.configs[0].optim.warmup_steps == round(10 * steps / 100)
    assert any(c["what"] == "max_steps" for c in result.document["choices"])


def test_a_budget_in_which_nothing_fits_is_refused(children: Children, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="--budget"):
        ask(tmp_path / "c", budget=0.1)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"precisions": ["fp32"]}, "at least two"),
        ({"precisions": ["fp32", "bf16-mixd"]}, "bf16-mixed"),
        ({"vary": ("optim.lr", ["1", "2"])}, "either"),
        ({"precisions": None, "vary": ("optim.lrr", ["1", "2"])}, r"optim\.lr"),
        ({"precisions": None, "vary": ("optim.lr", ["1", "many"])}, "many"),
        ({"precisions": None, "vary": ("train.seed", ["1", "2"])}, "seeds"),
        ({"precisions": None, "vary": ("data.data", ["a", "b"])}, "two texts"),
        ({"seeds": 0}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"margin": 50}, "margin"),
        ({"rounds": 0, "budget": 5.0}, "budget"),
    ],
)
def test_a_bad_request_is_one_sentence_and_leaves_nothing(
    children: Children, tmp_path: Path, request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(FewbitsError, match=message):
        ask(tmp_path / "c", **request_)
    assert not (tmp_path / "c").exists() and children.asked == []

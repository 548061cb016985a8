"""The command line: quick to start, forgiving about spelling, strict about meaning, one sentence for every mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from fewbits.cli import main as cli
from fewbits.cli.console import find_model, find_run
from fewbits.cli.main import COMMANDS, explain, run, sleep_soon
from fewbits.errors import FewbitsError
from fewbits.train.aliases import CONVERSIONS
from fewbits.train.config import load_recipe, options, override

ROOT = Path(__file__).parents[2]


@pytest.fixture
def trained(monkeypatch):
    """What `fewbits train` hands to the trainer, without training."""
    calls = []

    def fake(config, resume=None, console=None, quiet=False, profile=0):
        calls.append((config, resume))
        return {"status": "finished", "out_dir": "runs/none"}

    import fewbits.train.trainer

    monkeypatch.setattr(fewbits.train.trainer, "train", fake)
    monkeypatch.setattr("fewbits.report.html.write_report", lambda folder: folder / "report.html")
    return calls


def fewbits(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fewbits", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def refused(capsys, *arguments: str) -> str:
    """The one line that a refused command line prints."""
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fewbits: error: "), captured.err
    return lines[0]


def test_help_is_printed_without_importing_torch():
    code = (
        "import sys; from fewbits.cli.main import run; assert run(['--help']) == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for group in COMMANDS.values() for name in group)


@pytest.mark.parametrize("command", [name for group in COMMANDS.values() for name in group])
def test_every_command_has_help(command, capsys):
    assert run([command, "--help"]) == 0
    assert f"Usage: fewbits {command}" in capsys.readouterr().out


def test_the_bare_command_prints_what_there_is(capsys):
    assert run([]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Usage: fewbits") and captured.err == ""


def test_help_of_train_lists_every_option_and_every_converted_name(capsys):
    run(["train", "--help"])
    text = capsys.readouterr().out
    for name in [*(name.rpartition(".")[2] for name in options()), *CONVERSIONS]:
        assert f"--{name}" in text
    assert [line for line in text.splitlines() if line.startswith(("Model", "Data", "Optimizer", "Training"))]


def test_python_m_fewbits_is_the_command_and_a_mistake_exits_with_2_and_no_traceback():
    done = fewbits("trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fewbits: error: There is no command 'trian'") and done.stderr.count("\n") == 1


def test_options_reach_the_trainer_in_any_spelling(trained):
    assert run(["train", "--optim.lr=1e-3", "--n-embd", "64", "--n_head", "2", "--max_iters", "7", "--seed=3"]) == 0
    ((config, resume),) = trained
    assert resume is None
    assert (config.optim.lr, config.model.n_embd, config.train.max_steps, config.train.seed) == (1e-3, 64, 7, 3)
    assert config.name == "nano"


def test_switches_need_no_value_and_take_one(trained):
    run(["train", "--deterministic", "nano", "--no-bias", "--compile", "--qk_norm", "false", "--bf16"])
    ((config, _),) = trained
    assert config.train.deterministic and not config.model.bias and not config.model.qk_norm
    assert (config.train.compile, config.precision) == ("true", "bf16-mixed")


def test_a_conversion_is_printed(trained, capsys):
    run(["train", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3"])
    assert "train.batch_size=6" in capsys.readouterr().out


def test_config_takes_a_file(trained, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(load_recipe("nano").to_toml().replace("seed = 0", "seed = 9"), encoding="utf-8")
    run(["train", "--config", str(path)])
    assert trained[0][0].train.seed == 9


def test_the_config_of_a_run_repeats_it_in_a_new_directory(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    text = load_recipe("nano").to_toml().replace('out_dir = ""', 'out_dir = "runs/a"')
    (tmp_path / "runs" / "a" / "config.toml").write_text(text, encoding="utf-8")
    run(["train", "--config", "runs/a/config.toml"])
    run(["train", "--config", "runs/a/config.toml", "--out_dir", "runs/b"])
    assert [config.train.out_dir for config, _ in trained] == ["", "runs/b"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "Did you mean 'train'"),
        (["train", "nanoo"], "Did you mean 'nano'"),
        (["train", "--lrr", "3"], "Did you mean '--lr'"),
        (["train", "--hiden-size=3"], "Did you mean '--hidden_size'"),
        (["train", "--lr"], "--lr"),
        (["train", "--lr", "nan"], "at least 0"),
        (["train", "--n_head", "5"], "does not divide the width"),
        (["train", "--micro_batches", "3"], "does not divide into"),
        (["train", "--batch_size", "1e9"], "tokens a step"),
        (["train", "--n_embd", "524288", "--n_head", "4"], "parameters"),
        (["train", "--batch_size", "1000000", "--device", "cpu"], "GiB"),
        (["train", "--precision", "bf16-mixd"], "Did you mean 'bf16-mixed'"),
        (["train", "--precision", "fp9"], "Did you mean"),
        (["train", "nano", "--config", "x.toml"], "Keep one"),
        (["train", "notes.txt"], "--data notes.txt"),
        (["train", "a", "b"], "extra argument"),
        (["train", "--resume", "nowhere"], "There is no run"),
        (["report", "nowhere"], "There is no run"),
        (["eval", "nowhere"], "There is no run"),
        (["eval", "nowhere", "--devise", "cpu"], "Did you mean '--device'"),
        (["generate"], "RUN"),
        (["generate", "r", "--top_k", "-1"], "top_k"),
        (["generate", "r", "--temperature", "-1"], "temperature"),
        (["train", "--hlep"], "Did you mean '--help'"),
        (["train", "--bias", "maybe"], "true or false"),
        (["train", "--compile", "maybe"], "auto, true, false"),
        (["train", "--deterministic", "nanoo"], "Did you mean 'nano'"),
        (["train", "--name", "../../x"], "plain name"),
    ],
)
def test_a_mistake_is_one_sentence_with_what_would_fit(arguments, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []  # and nothing half-written


def test_several_ranks_are_told_that_this_version_has_one(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 ranks" in refused(capsys, "train")


def test_resume_takes_the_config_of_the_run_and_the_options_given_beside_it(trained, tmp_path, capsys):
    text = load_recipe("nano").to_toml().replace("seed = 0", "seed = 9")
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    checkpoint = tmp_path / "checkpoints" / "step-00000100"
    checkpoint.mkdir(parents=True)
    assert run(["train", "--resume", str(tmp_path), "--keep_checkpoints", "7"]) == 0
    assert run(["train", "--resume", str(checkpoint)]) == 0
    (config, resume), (_, exact) = trained
    assert (config.train.seed, config.train.keep_checkpoints) == (9, 7)
    assert (resume, exact) == (tmp_path, checkpoint)
    capsys.readouterr()
    assert "leave out 'nano'" in refused(capsys, "train", "nano", "--resume", str(tmp_path))


def test_a_resumed_run_is_not_told_to_stop_before_where_it_is(trained, tmp_path, capsys):
    stored = override(load_recipe("nano"), "train.stop_at", "100")  # as after `train --stop_at 100`
    (tmp_path / "config.toml").write_text(stored.to_toml(), encoding="utf-8")
    checkpoint = tmp_path / "checkpoints" / "step-00000100"
    checkpoint.mkdir(parents=True)
    for path in (tmp_path, checkpoint):
        assert "is at step 100" in refused(capsys, "train", "--resume", str(path), "--stop_at", "100")
    assert run(["train", "--resume", str(tmp_path), "--stop_at", "101"]) == 0
    assert run(["train", "--resume", str(tmp_path)]) == 0


def test_a_run_in_place_of_a_recipe_is_told_how_to_go_on_and_how_to_repeat_it(tmp_path, capsys):
    (tmp_path / "config.toml").touch()
    said = refused(capsys, "train", str(tmp_path))
    assert f"--resume {tmp_path}" in said and f"fewbits train {tmp_path / 'config.toml'}" in said


def test_a_model_is_the_checkpoint_that_was_named_and_a_wrong_name_leads_nowhere(tmp_path):
    (tmp_path / "config.toml").touch()
    checkpoint = tmp_path / "checkpoints" / "step-00000100"
    checkpoint.mkdir(parents=True)
    foreign = tmp_path / "hf"
    foreign.mkdir()
    (foreign / "config.json").touch()
    assert find_model(str(tmp_path)) == find_run(str(checkpoint)) == tmp_path
    assert find_model(str(checkpoint)) == checkpoint
    assert find_model(str(foreign)) == foreign
    for find in (find_model, find_run):
        with pytest.raises(FewbitsError, match="There is no run"):
            find(str(checkpoint.with_name("step-00000101")))


def test_a_folder_that_is_no_run_is_named(capsys, tmp_path):
    assert "holds no config.toml" in refused(capsys, "train", "--resume", str(tmp_path))


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "/runs/a"), 2, "/runs/a: no permission"),
        (OSError(28, "No space left on device", "/runs/a"), 2, "the disk is full"),
        (OSError(36, "File name too long", "/runs/a"), 2, "the name is too long"),
        (MemoryError(), 1, "Out of memory"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(raised, code, says, capsys, monkeypatch):
    def broken(*arguments, **options):
        raise raised

    monkeypatch.setattr(cli.fewbits, "main", broken)
    assert run(["train"]) == code
    assert says in capsys.readouterr().err


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch):
    assert explain(KeyError("x")) == ("", 1)

    def broken(*arguments, **options):
        raise KeyError("x")

    monkeypatch.setattr(cli.fewbits, "main", broken)
    with pytest.raises(KeyError):
        run(["train"])


def test_a_diverged_run_exits_with_3(trained, monkeypatch):
    import fewbits.train.trainer

    ended = {"status": "diverged", "out_dir": "runs/none"}
    monkeypatch.setattr(fewbits.train.trainer, "train", lambda *a, **k: ended)
    assert run(["train"]) == 3


def test_a_training_ends_with_its_page(texts, tmp_path, capsys):
    folder = tmp_path / "run"
    tiny = "--n_layer 1 --n_head 1 --n_embd 16 --context 16 --batch_size 2 --max_steps 2 --tokenizer bytes"
    where = ["--data", str(texts), "--out_dir", str(folder), "--device", "cpu"]
    assert run(["train", *tiny.split(), "--precision", "fp32", "--eval_batches", "1", *where]) == 0
    assert "<svg" in (folder / "report.html").read_text(encoding="utf-8")
    assert "report.html" in capsys.readouterr().out.replace("\n", "")


def test_a_console_that_cannot_show_a_character_gets_a_plain_one():
    code = (
        "import click; from fewbits.cli import main as cli\n"
        "cli.fewbits.main = lambda *a, **k: click.echo('caf\\u00e9 \\U0001f600 \\u4e2d') or print('\\U0001f600')\n"
        "raise SystemExit(cli.run(['train']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "gbk"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("gbk").split() == ["caf\u00e9", "?", "\u4e2d", "?"]


def test_every_command_is_found_under_its_name():
    context = click.Context(cli.fewbits)
    for name in cli.fewbits.list_commands(context):
        assert cli.fewbits.get_command(context, name).name == name


def test_threads_wait_awake_for_a_moment_unless_somebody_said_how_they_wait():
    for given, expected in (
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ):
        sleep_soon(given)
        assert given == expected

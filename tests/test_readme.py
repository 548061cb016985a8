"""What we show is what runs: every command and program of the README, and two steps of every recipe, all made tiny."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from fewbits.cli.main import run
from fewbits.train.config import load_recipe, recipes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

TINY = shlex.split(
    "--max_steps 2 --warmup_steps 1 --batch_size 4 --context 16 --n_layer 2 --n_embd 32 --n_head 4 --vocab_size 0 "
    "--log_every 1 --eval_batches 1 --sample_every 2 --sample_tokens 4 --compile false --device cpu"
)
# a command of the README begins with this -> it is run with that appended; later options win
MADE_SHORT = {
    "train --resume": [],
    "train shakespeare-char": TINY,
    "train --out_dir": [*TINY, "--tokenizer", "bytes", "--data", "my_texts"],
    "train": [*TINY, "--tokenizer", "bytes"],
    "bench": [*TINY, "--micro_batches", "1", "--precisions", "fp32", "--seconds", "0.01"],
    "compare": [*TINY, "--tokenizer", "bytes", "--data", "my_texts", "--seeds", "1", "--rounds", "0"],
    "generate": ["--tokens", "4"],
    "quantize": ["--eval_batches", "1", "--device", "cpu"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """The words of every command in the README, comments and set-up taken off."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    parts = [part for line in lines for part in line.split(" && ")]
    return [shlex.split(part, comments=True) for part in parts]


def shortened(words: list[str]) -> list[str]:
    """A command that ends in seconds: tiny sizes appended, a step number scaled down."""
    words = ["1" if before == "--stop_at" else word for before, word in zip(["", *words], words, strict=False)]
    beginning = next((begin for begin in MADE_SHORT if " ".join(words).startswith(begin)), None)
    return [*words, *MADE_SHORT.get(beginning or "", [])]


@pytest.fixture
def workplace(tmp_path, texts, monkeypatch):
    """A folder with the files that the README speaks of."""
    texts.rename(tmp_path / "my_texts")
    (tmp_path / "input.txt").write_text((tmp_path / "my_texts" / "table0.txt").read_text(encoding="utf-8"), "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the runs of `compare` are processes of their own
    return tmp_path


def ours(*kinds: str) -> list[list[str]]:
    """The commands of fewbits in the README, of these kinds or (without) of all others than compare."""
    found = [words[1:] for words in commands() if Path(words[0]).name == "fewbits"]
    return [words for words in found if (words[0] in kinds if kinds else words[0] != "compare")]


def test_every_command_of_the_readme_runs(workplace, capsys):
    assert len(ours()) >= 10
    for words in ours():  # in order: later ones look at the runs of earlier ones
        assert run(shortened(words)) == 0, f"{' '.join(words)}\n{capsys.readouterr()}"
    assert (workplace / "runs" / "mine" / "report.html").is_file()


@pytest.mark.parametrize("words", ours("compare"), ids=" ".join)
def test_every_comparison_of_the_readme_runs(words, workplace, capsys):
    assert run(shortened(words)) == 0, capsys.readouterr()
    assert list((workplace / "runs").rglob("compare.json"))


def test_every_program_of_the_readme_runs(capsys):
    for program in blocks("python"):
        exec(compile(program, "README.md", "exec"), {"__name__": "__main__"})
    assert "applied True" in capsys.readouterr().out


def test_the_set_up_of_the_readme_is_what_ci_runs():
    setups = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("python3 -m venv")]
    assert len(setups) == 2
    assert setups[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert all("-c constraints.txt" in line for line in setups)
    assert re.fullmatch(r"torch==[\d.]+\n", (ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_files_that_the_readme_points_to_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).is_file(), target


def test_every_recipe_is_described_in_the_readme():
    assert all(f"| `{name}` |" in README for name in recipes())


@pytest.mark.parametrize("name", sorted(recipes()))
def test_two_steps_of_every_recipe(name, workplace):
    recipe = load_recipe(name)
    heads = ["--n_kv_head", "2"] if recipe.model.n_kv_head else []
    width = ["--n_ff", "48"] if recipe.model.n_ff else []
    text = ["--data", "my_texts", "--tokenizer", "chars" if recipe.data.tokenizer == "chars" else "bpe:300"]
    halves = ["--micro_batches", "2" if recipe.train.micro_batches > 1 else "1"]
    words = ["train", name, *TINY, *heads, *width, *text, *halves, "--precision", "bf16-mixed", "--out_dir", "run"]
    assert run(words) == 0
    assert len((workplace / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) >= 2

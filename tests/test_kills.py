"""Three kills of a real training: inside a save, anywhere, and inside a save again. bench/kills.py does fifty."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from bench.kills import Place, final, inside_a_save, kill_anywhere, kill_inside_save, newest, resume

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


def test_a_training_killed_three_times_ends_with_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    """fp16, a loss scale that moves, fp32 masters, AdamW, dropout and accumulation: the most there is to restore."""
    place = Place(tmp_path)
    kind = "fp16-mixed adamw, fp32 masters, a loss scale that moves"
    expected, _, step_seconds = place.reference(kind)
    run = tmp_path / "run"
    # A kill that comes too late for a save hits whatever comes after it: that is a moment, too.
    kill_inside_save(place.begin(run, kind), run, after_step=4, delay=0.003)
    assert newest(run) >= 4, "killed before the checkpoint that it waited for"
    kill_anywhere(place.start("--resume", str(run)), run, after_step=newest(run) + 2, delay=5 * step_seconds)
    kill_inside_save(place.start("--resume", str(run)), run, after_step=newest(run), delay=0.01)
    end, went_on_from = resume(place, run, kind)
    assert end == run and final(run) == expected
    if went_on_from == "its newest checkpoint":
        assert not inside_a_save(run)  # what the kills left behind is gone

"""layers=auto on a GPU: every way of multiplying runs, eager and compiled, and what is chosen trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewbits
from fewbits import AdamW, ModelConfig, Step, Transformer
from fewbits.nn.candidates import Shape, candidates
from fewbits.nn.layers import MARGIN, pick
from fewbits.nn.timing import LEAST_ROUNDS, LayerTimer
from fewbits.precision.recipe import RECIPES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

SHAPE = Shape(4096, 1024, 4096, False)
GPT = ModelConfig(vocab_size=512, context=256, n_layer=2, n_head=4, n_embd=256)


@pytest.mark.parametrize(
    ("mode", "graph"), [("eager", False), ("eager", True), ("compiled", False), ("compiled", True)]
)
@pytest.mark.parametrize("recipe", ["fp8", "fp8-row", "int8"])
def test_every_way_of_a_layer_runs_and_a_winner_has_won_the_margin(recipe: str, mode: str, graph: bool) -> None:
    ways = candidates(RECIPES[recipe], SHAPE)
    times = LayerTimer(torch.device("cuda"), mode, rounds=LEAST_ROUNDS, graph=graph)(SHAPE, ways)
    assert list(times)[:2] == list(ways)[:2] and (mode == "compiled" or list(times) == list(ways))
    group = pick(SHAPE, ["a"], times)
    assert group.choice.value == "bf16" or group.ratio.high <= 1 - MARGIN


def test_what_is_chosen_trains_and_a_second_choice_comes_from_the_cache(tmp_path: Path) -> None:
    model = Transformer(GPT)
    layers = fewbits.choose_layers(model, "fp8-auto", 8 * 256, device="cuda", cache=tmp_path)
    assert fewbits.choose_layers(model, "fp8-auto", 8 * 256, device="cuda", cache=tmp_path) == layers
    model = fewbits.prepare(model, "fp8-auto", layers=layers).cuda()
    step = Step(model, AdamW(model.parameters(), lr=1e-3), "fp8-auto")
    ids = torch.randint(512, (8, 257), device="cuda")
    batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    losses = [float(step([batch]).loss) for _ in range(20)]
    assert losses[-1] < losses[0]

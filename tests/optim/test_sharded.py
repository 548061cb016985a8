"""Optimizer state follows the sharding of FSDP2: two processes, gloo, on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RANK_PROGRAM = """
import copy, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from fewbits.optim.adamw import AdamW
from fewbits.optim.clip import coefficient, measure

rank, meeting = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
one, yes, no = torch.ones(()), torch.tensor(True), torch.tensor(False)


def step(model, optimizer, x, applied, norms, factor):
    model(x).square().sum().backward()
    gradients = {p: p.grad for p in model.parameters()}
    norms.append([measure(gradients.values(), kind) for kind in ("norm", "inf")])
    optimizer.apply(factor=factor, applied=applied, lr_factor=one, gradients=gradients)
    optimizer.zero_grad()


for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)  # 5 and 7 rows: the shards are uneven, and some of the biases' are tiny
    whole = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5), nn.Linear(5, 1)).to(dtype)
    sharded = fully_shard(copy.deepcopy(whole), mesh=mesh)
    exact = [p.detach().float() * 1.001 for p in whole.parameters()]
    pairs = [(whole, AdamW(whole.parameters(), lr=1e-2)), (sharded, AdamW(sharded.parameters(), lr=1e-2))]
    for parameter, value in zip(whole.parameters(), exact):
        pairs[0][1].load_exact(parameter, value)
    for parameter, value in zip(sharded.parameters(), exact):
        pairs[1][1].load_exact(parameter, distribute_tensor(value, mesh, parameter.placements))
    norms = [[], []]
    for i in range(6):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i)).to(dtype)  # the same on both ranks
        for (model, optimizer), seen in zip(pairs, norms):
            step(model, optimizer, x, no if i == 2 else yes, seen, torch.tensor(0.3))
    optimizer = pairs[1][1]
    for single, parameter in zip(whole.parameters(), sharded.parameters()):
        state = optimizer.state[parameter]
        assert isinstance(parameter, DTensor)
        for name in ("exp_avg", "exp_avg_sq", *(["master"] if dtype == torch.bfloat16 else [])):
            assert state[name].placements == parameter.placements, name
            assert state[name].to_local().shape == parameter.to_local().shape, name
            if state[name].dtype != torch.int16:  # gloo and NCCL carry no int16: gather exact_weight instead
                assert torch.equal(state[name].full_tensor(), pairs[0][1].state[single][name]), name
        assert torch.equal(parameter.full_tensor(), single)
        assert torch.equal(optimizer.exact_weight(parameter).full_tensor(), pairs[0][1].exact_weight(single))
    assert int(optimizer.applied_steps) == 5
    for a, b in zip(*norms):
        assert a[1] == b[1]  # the largest element is the same element
        torch.testing.assert_close(a[0], b[0], rtol=2**-20, atol=0)  # sums of at most 40 squares in another order
        assert coefficient(b[0], 0.5) <= 1
    other = AdamW(sharded.parameters(), lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    for parameter in sharded.parameters():
        for name, value in optimizer.state[parameter].items():
            again = other.state[parameter][name]
            assert type(again) is type(value) and again.dtype == value.dtype
            assert torch.equal(getattr(again, "_local_tensor", again), getattr(value, "_local_tensor", value))
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_state_is_sharded_like_its_parameter_and_a_step_equals_the_single_process_one(tmp_path: Path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", RANK_PROGRAM]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)

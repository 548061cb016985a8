"""Steps wait on the device until all of them are read at once."""

from __future__ import annotations

import torch

from fewbits.step import StepResult
from fewbits.train.waiting import Arrived, Waiting


def test_steps_arrive_in_order_as_they_were_and_only_once():
    waiting, latched = Waiting(), torch.tensor(False)
    for number in (4, 5):
        loss = torch.tensor(number / 8, dtype=torch.float64)
        result = StepResult(loss, torch.tensor(0.5), torch.tensor(2.0**16), torch.tensor(number == 4))
        waiting.add(number, result, latched)
        latched |= True  # in place, as `Step` has it: what was added stays
    found, counters = waiting.read(torch.tensor(1), torch.tensor(2**31 + 1))
    assert found == [Arrived(4, 0.5, 0.5, 65536.0, True, False), Arrived(5, 0.625, 0.5, 65536.0, False, True)]
    assert counters == [1, 2**31 + 1]
    assert waiting.read(torch.tensor(3)) == ([], [3])

"""Runs of a stage show its modules' calls, and end in what the weights as they then are give."""

from __future__ import annotations

import pytest
import torch

from qcompress.model.runs import Runs, run_stage
from qcompress.model.stages import WholeStage

from .networks import Residual, live


@pytest.mark.parametrize("last", [True, False])
def test_what_a_run_ended_in_counts_only_while_no_weight_changes(last: bool) -> None:
    torch.manual_seed(0)
    module = Residual().eval().requires_grad_(False)
    names = tuple(name for name, one in module.named_modules() if isinstance(one, torch.nn.Conv2d | torch.nn.Linear))
    stage = WholeStage("model", names)
    states = live(Residual, "gptq", bits=3).calibration
    before = run_stage(stage, module, states)
    runs = Runs(stage, module, states)
    calls = runs.calls(names, last=last)
    assert all(len(calls[name]) == len(states) for name in names)
    if not last:
        module.get_submodule(names[0]).weight.mul_(2)
    wanted = run_stage(stage, module, states)
    assert all(torch.equal(a, b) for a, b in zip(runs.after(), wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, wanted, strict=True)) is last

"""The length of PyTorch's flight recorder: the calls of one step of the model, unless the user chose another length."""

import json
import os
import subprocess
import sys

import pytest

from distattn.supervision.flight_recorder import size_flight_recorder

NAMES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
# this makes more calls than PyTorch records by default
PROGRAM = """
import sys, tempfile
import torch, torch.distributed as dist
from torch._C._distributed_c10d import _dump_fr_trace_json
from distattn.supervision.flight_recorder import size_flight_recorder

size_flight_recorder(layers=7)
dist.init_process_group("gloo", init_method="file://" + tempfile.mkdtemp() + "/store", rank=0, world_size=1)
for _ in range(2900):
    dist.all_reduce(torch.zeros(1))
print(_dump_fr_trace_json().decode())
"""


@pytest.fixture
def unset(monkeypatch):
    for name in NAMES:
        # let monkeypatch undo whatever the test sets
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize("layers, entries", [(2, 2_000), (32, 12_800), (200, 24_000)])
def test_the_recorder_holds_a_step_of_the_model_within_bounds(unset, layers, entries):
    size_flight_recorder(layers)
    assert os.environ[NAMES[0]] == str(entries)


@pytest.mark.parametrize("name", NAMES)
def test_a_length_that_the_user_has_set_stays(unset, monkeypatch, name):
    monkeypatch.setenv(name, "0")
    size_flight_recorder(32)
    assert [os.environ.get(other) for other in NAMES] == ["0" if other == name else None for other in NAMES]


def test_pytorch_records_as_many_calls():
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=True)
    assert len(json.loads(done.stdout)["entries"]) == 2_800

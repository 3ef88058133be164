"""The preflight's messages for artificial facts (slow GPUs, too little memory), and the pairs of ranks that measure
links.
"""

import dataclasses
import os
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distattn.preflight import device_state as device_module
from distattn.preflight.comparison import named_places, problems_of, warnings_of
from distattn.preflight.device_state import Clock, DeviceState, device_state, driver_version, gpu_clock
from distattn.preflight.facts import RankFacts, checkpoint_bytes, code_digest
from distattn.preflight.memory_forecast import MemoryForecast, forecast_memory
from distattn.preflight.outliers import outliers_of
from distattn.preflight.probes import Link, RankSpeed, rounds_across, rounds_of
from distattn.preflight.report import report_table
from distattn.training.config.plan_settings import PlanSettings
from distattn.training.config.run_file import Config, ModelConfig, ParallelConfig, TrainConfig
from distattn.training.config.sections import CheckpointConfig, EngineConfig, MemoryConfig
from distattn.training.run_folder import RunFolder
from distattn.training.state_bytes import model_parameters, state_bytes

GB = 10**9
CUDA = torch.device("cuda", 0)


def facts_of(rank: int, host: str, **others) -> RankFacts:
    common = {"config": {}, "versions": {"NVIDIA driver": "550.54.15"}, "host_free": 900 * GB, "disk_free": GB}
    device = DeviceState("H100", 80 * GB, 85 * GB)
    forecast = MemoryForecast(40 * GB, 0, True)
    return RankFacts(
        **{"rank": rank, "host": host, "machine": host, "device": device, "forecast": forecast, **common, **others}
    )


def nodes(hosts: int, each: int) -> list[RankFacts]:
    return [facts_of(rank, f"node-{rank // each}") for rank in range(hosts * each)]


def speeds_of(facts: list[RankFacts], gbs) -> list[RankSpeed]:
    """Return the speeds of ranks whose links have the bandwidth `gbs(rank, peer)`."""

    def links(rank: RankFacts, inside: bool) -> list[Link]:
        each = sum(other.host == facts[0].host for other in facts)
        peers = [
            other.rank
            for other in facts
            if other.rank != rank.rank
            and (
                other.host == rank.host if inside else other.host != rank.host and (other.rank - rank.rank) % each == 0
            )
        ]
        return [Link(peer, gbs(rank.rank, peer), 8.0) for peer in peers]

    return [RankSpeed(600.0, 40.0, links(rank, True), links(rank, False)) for rank in facts]


def test_a_slow_gpu_is_named_with_the_median_and_its_clock():
    facts, clocks = nodes(2, 4), [Clock(1980, 1980)] * 8
    speeds = speeds_of(facts, lambda rank, peer: 45.0)
    assert outliers_of(facts, speeds, clocks, "cuda") == []
    speeds[5] = speeds[5]._replace(tflops=310.0)
    clocks[5] = Clock(345, 1980)
    (sentence,) = outliers_of(facts, speeds, clocks, "cuda")
    assert sentence == (
        "rank 5 on node-1: matrix products at 310 TFLOP/s, the median of all ranks is 600, its clock is 345 of 1,980 MHz; "
        "nvidia-smi -q -d PERFORMANCE,TEMPERATURE says why."
    )
    table = report_table(facts, speeds, clocks, 3.21)
    assert table[0] == "preflight: 8 ranks on 2 hosts in 3.2 s, all-to-all 40 GB/s a rank" and len(table) == 5
    assert "4, 5, 6, 7" in table[3] and "345 MHz" in table[3] and "80.0 GB" in table[3] and "40.0 GB" in table[3]
    assert table[4] == "  needed: a step of the rank that needs most, as distattn plan --memory counts it"
    # ranks on CPUs share the host's memory
    host, state = DeviceState("CPU", None, None), MemoryForecast(0, 3 * GB, False)
    facts = [facts_of(rank, "node", device=host, forecast=state) for rank in range(2)]
    table = report_table(facts, speeds[:2], [None] * 2, 3.21)
    assert "+" not in table[2] and "6.0 GB" in table[2]
    assert table[3].startswith(
        "  needed: weights, gradients and optimizer state of all ranks on a host; distattn plan --memory "
    )


def test_a_slow_link_is_named_by_its_ends_and_a_slow_adapter_by_its_rank():
    facts = nodes(4, 2)
    clocks = [None] * 8
    link = speeds_of(facts, lambda rank, peer: 5.0 if {rank, peer} == {1, 5} else 45.0)
    (sentence,) = outliers_of(facts, link, clocks, "cuda")
    assert sentence.startswith(
        "the link between rank 1 on node-0 and rank 5 on node-2 has 5 GB/s, the median to other hosts is 45"
    )
    # a link that is slow in only one direction is also named
    one_way = speeds_of(facts, lambda rank, peer: 5.0 if (rank, peer) == (5, 1) else 45.0)
    assert outliers_of(facts, one_way, clocks, "cuda") == [sentence]
    adapter = speeds_of(facts, lambda rank, peer: 5.0 if 3 in (rank, peer) and abs(rank - peer) > 1 else 45.0)
    (sentence,) = outliers_of(facts, adapter, clocks, "cuda")
    assert sentence.startswith(
        "rank 3 on node-1: all its links to other hosts are slow, the best has 5 GB/s, the median of other ranks' links is 45"
    )
    many = speeds_of(nodes(12, 1), lambda rank, peer: 5.0 if (rank + peer) % 4 == 0 else 45.0)
    sentences = outliers_of(nodes(12, 1), many, [None] * 12, "cuda")
    assert len(sentences) == 9 and "more links to other hosts are as slow" in sentences[-1]


def test_memory_that_a_step_needs_is_compared_with_what_is_free():
    facts = nodes(2, 2)
    assert problems_of(facts) == warnings_of(facts) == []
    full = DeviceState("H100", 30 * GB, 85 * GB)
    facts[3] = dataclasses.replace(facts[3], device=full)
    (problem,) = problems_of(facts)
    assert problem.startswith("rank 3 on node-1: a step needs 40.0 GB, and 30.0 GB are free on the device; ")
    facts[3] = dataclasses.replace(facts[3], device=full._replace(free=42 * GB))
    (warning,) = warnings_of(facts)
    assert not problems_of(facts) and warning.startswith(
        "rank 3 on node-1: a step needs 40.0 GB of 42.0 GB that are free"
    )
    # a different device is not a reason to stop, but a different driver is
    facts[3] = facts_of(3, "node-1", device=DeviceState("A100", 80 * GB, 85 * GB), versions={"NVIDIA driver": "535.1"})
    (problem,), (warning,) = problems_of(facts), warnings_of(facts)
    assert problem.startswith("rank 3 on node-1: NVIDIA driver is 535.1, on most ranks 550.54.15")
    assert warning.startswith("rank 3 on node-1 has the device A100, most ranks H100")
    # the memory needs of all ranks on a host are added up
    facts = [dataclasses.replace(rank, forecast=MemoryForecast(0, 500 * GB, False)) for rank in nodes(1, 2)]
    (problem,) = problems_of(facts)
    assert problem.startswith(
        "ranks 0, 1 on node-0: model and optimizer need 1.0 TB of the host's memory, of which 900.0 GB are free"
    )
    assert named_places(nodes(7, 1)).endswith("rank 3 on node-3, and ranks on 3 more hosts")


@pytest.mark.parametrize("members", [1, 2, 5, 8])
def test_every_pair_meets_once_and_no_rank_is_in_two_pairs_of_a_round(members):
    rounds = list(rounds_of(range(members)))
    assert len(rounds) == (members - 1 + members % 2 if members > 1 else 1)
    for pairs in rounds:
        assert len({rank for pair in pairs for rank in pair}) == 2 * len(pairs)
    assert sorted(tuple(sorted(pair)) for pairs in rounds for pair in pairs) == list(combinations(range(members), 2))
    # ranks with the same local rank are paired. Additional ranks of a node have no partner
    across = list(rounds_across([[0, 1, 2], [3, 4]]))
    assert across == [[(0, 3), (1, 4)]]


SHAPE = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)


@pytest.mark.parametrize("name", ["ring", "allgather", "ulysses"])
def test_a_step_is_counted_where_it_can_be_and_the_state_where_not(name, monkeypatch):
    monkeypatch.setattr("distattn.preflight.memory_forecast.first_packs", lambda plan, config: [[90, 60]])
    config = Config(
        model=SHAPE, parallel=ParallelConfig(ranks=2, strategy=name, layout="zigzag"), train=TrainConfig(steps=2)
    )
    data, plan = SimpleNamespace(plan=None), PlanSettings.of_config(config).plan([90, 60])
    forecast = forecast_memory(config, data, CUDA, plan, 1)
    assert forecast.whole_step and forecast.device > state_bytes(config) and forecast.host == 0
    state = state_bytes(config)
    assert forecast_memory(config, data, torch.device("cpu"), plan, 1) == MemoryForecast(0, state, False)
    # the folder of a run resumed on a different number of ranks has no plan for that number
    wider = dataclasses.replace(config, parallel=ParallelConfig(ranks=4, strategy=name, layout="zigzag"))
    assert forecast_memory(wider, data, CUDA, plan, 1) == MemoryForecast(state_bytes(wider), 0, False)
    other = dataclasses.replace(config, engine=EngineConfig(name="deepspeed"))
    assert forecast_memory(other, data, CUDA, plan, 1) == MemoryForecast(state_bytes(other), 0, False)
    hosted = dataclasses.replace(config, memory=MemoryConfig(state_on_host=True))
    assert forecast_memory(hosted, data, CUDA, plan, 1).host >= state


def test_checkpoints_need_room_for_those_that_are_kept_at_once(tmp_path):
    run = RunFolder(tmp_path)
    each = 12 * model_parameters(Config(model=SHAPE))

    def need(every: int, keep: int = 3) -> int:
        checkpoint = CheckpointConfig(every_steps=every, keep_last=keep)
        return checkpoint_bytes(run, Config(model=SHAPE, train=TrainConfig(steps=10), checkpoint=checkpoint))

    assert [need(0), need(-1), need(5), need(1), need(1, keep=1)] == [each, 0, 2 * each, 4 * each, 2 * each]


def test_the_nvidia_drivers_output_is_parsed(tmp_path, monkeypatch):
    driver = tmp_path / "version"
    monkeypatch.setattr(device_module, "_DRIVER", driver)
    assert driver_version() is None
    driver.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\nGCC version: 12.3.0\n"
    )
    assert driver_version() == "550.54.15"
    properties = SimpleNamespace(name="NVIDIA H100", uuid="1-2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GB, 80 * GB))
    assert device_state(CUDA) == DeviceState("NVIDIA H100", 70 * GB, 80 * GB)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    tool = tmp_path / "nvidia-smi"
    for answer, clock in (("1755, 1980", Clock(1755, 1980)), ("[N/A], [N/A]", None), ("", None)):
        tool.write_text(f'#!/bin/sh\n[ "$1" = --id=GPU-1-2 ] && echo "{answer}"\n')
        tool.chmod(0o755)
        assert gpu_clock(CUDA) == clock
    assert gpu_clock(torch.device("cpu")) is None


def test_the_code_s_digest_is_that_of_all_its_files(monkeypatch):
    before = code_digest()
    assert before == code_digest()
    read = Path.read_bytes
    # code_digest must notice a changed file in a symbolically linked folder of the package
    monkeypatch.setattr(Path, "read_bytes", lambda file: read(file) + b" " * (file.name == "spec.py"))
    assert code_digest() != before


def test_what_a_kernel_needs_is_a_warning_to_the_hosts_that_lack_it():
    facts = [facts_of(0, "a"), facts_of(1, "b", advice="Triton 3.6.0 is wrong: install torch 2.13")]
    (warning,) = [line for line in warnings_of(facts) if "install torch 2.13" in line]
    assert "b" in warning and "chunked" in warning


def test_a_full_disk_ends_a_new_run_and_is_a_warning_to_a_resumed_run():
    begins = [facts_of(rank, "node-0", disk_free=0, disk_needed=GB) for rank in range(2)]
    assert any("the disk of the run folder has 0 B free" in problem for problem in problems_of(begins))
    goes_on = [facts_of(rank, "node-0", disk_free=0, disk_needed=GB, goes_on=True) for rank in range(2)]
    assert not problems_of(goes_on)
    assert any("the disk of the run folder has 0 B free" in warning for warning in warnings_of(goes_on))

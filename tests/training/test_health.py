"""Health reports: a slow rank is named while it is slow, and so is a GPU whose error counters grow."""

import importlib.util
import os
import socket
import sys
import time
import types
import urllib.error
import urllib.request
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import new_run, tiny_config

import distattn as da
from distattn.ir.errors import DistattnError
from distattn.training import loop
from distattn.training.config.checks import problems_of
from distattn.training.config.sections import CheckpointConfig, Config, EngineConfig, HealthConfig, TrainConfig
from distattn.training.health.device_counters import COUNTERS, DeviceCounters
from distattn.training.health.health_reports import HealthReport, HealthReports, slowest_rank
from distattn.training.reporting.json_lines import read_rows
from distattn.training.reporting.prometheus import PrometheusFile, PrometheusPort, prometheus_text
from distattn.training.reporting.step_clock import StepCosts
from distattn.training.run_folder import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
HOST = socket.gethostname()
# seconds of a planted sleep, long compared to the tiny model's computation even on a busy machine
NAP = 3.0


def costs(compute):
    return StepCosts(compute + 0.7, 0.2, 0.5, None, None, None)


def reported(rank, adaptive):
    """Return health reports, each over two steps, for planted compute times: first rank 2 is slow, then no rank, then
    rank 0.
    """
    settings = dict(strategy="cad", data="per_rank", adaptive=True) if adaptive else dict(strategy="ring")
    reports = []
    with da.ContextParallel(**settings) as cp:
        health = HealthReports(cp, torch.device("cpu"), 2, reports.append)
        for step, computes in enumerate([(1, 1, 1.5)] * 6 + [(1, 1, 1.05)] * 2 + [(1.25, 1, 1)] * 2, 1):
            health.after_step(step, costs(computes[rank]))
        health.close()
    return [asdict(report) for report in reports]


def test_a_slow_rank_is_named_as_long_as_it_is_slow():
    reports, same, others = run_on_ranks(3, reported, False)
    assert reports == same == others
    reports = [HealthReport(**report) for report in reports]
    assert [report.step for report in reports] == [2, 4, 6, 8, 10]
    first, _, third, fourth, fifth = reports
    assert first.compute_seconds == pytest.approx((1, 1, 1.5)) and first.wait_seconds == (0.5, 0.5, 0.5)
    assert (first.slowest, first.slow, first.hosts) == (2, True, (HOST,) * 3) and first.over_median == pytest.approx(
        0.5
    )
    assert first.text == (
        f"Rank 2 on {HOST} computes 1.5 s a step, 50% over the median of 1 (named in 1 of 1 reports, the last 1 in a row)."
    )
    assert "named in 3 of 3 reports, the last 3 in a row" in third.text
    # the report is shown to the user only once
    assert [report.is_news for report in reports] == [False, False, True, False, False]
    assert fourth.text == "No rank computes 10% longer than the median of 1 s a step." and not fourth.slow
    assert f"Rank 0 on {HOST}" in fifth.text and "named in 1 of 5 reports" in fifth.text


def test_the_report_says_if_attention_is_distributed_by_speed():
    reports = run_on_ranks(3, reported, True)[0]
    assert reports[0]["text"].endswith(
        "; attention is already balanced by the ranks' speeds, so this is the remaining difference."
    )
    assert slowest_rank([1.0, None]) == (None, None) and slowest_rank([]) == (None, None)


def config_of(engine, texts, folder, **health):
    return tiny_config(
        texts,
        folder,
        engine=EngineConfig(name=engine),
        train=TrainConfig(steps=6),
        checkpoint=CheckpointConfig(every_steps=-1),
        health=HealthConfig(every_steps=2, **health),
    )


def train_with_naps(rank, folder, config, place):
    """Train with rank 1 sleeping in steps 3 to 6, and rank 0 in steps 5 and 6. place: in a layer, or before the
    optimizer's step.
    """
    os.environ["LOCAL_RANK"] = str(rank)
    if config.engine.name == "megatron":
        import megatron_on_cpu  # noqa: F401
    open_engine = loop.open_engine

    def opened(*args):
        engine = open_engine(*args)
        step = [0]
        backward, update = engine.backward, engine.update

        def nap(*_):
            if step[0] > 2 and (rank == 1 or step[0] > 4):
                time.sleep(NAP)

        def counted(*args):
            step[0] += 1
            return backward(*args)

        engine.backward = counted
        if place == "layer":
            layer = next(module for name, module in engine.model.named_modules() if name.endswith(".mlp"))
            layer.register_forward_pre_hook(nap)
        else:
            engine.update = lambda rate: (nap(), update(rate))
        return engine

    loop.open_engine = opened
    original = dist.Work.wait
    loop.train(RunFolder(folder), config, True, torch.device("cpu"))
    assert dist.Work.wait is original


@pytest.mark.parametrize(("engine", "place"), [("fsdp2", "update"), ("deepspeed", "layer"), ("megatron", "layer")])
def test_in_every_engine_the_rank_that_sleeps_is_named(texts, tmp_path, engine, place):
    pytest.importorskip({"fsdp2": "torch", "deepspeed": "deepspeed", "megatron": "megatron.core"}[engine])
    metrics = tmp_path / "health.prom"
    config = config_of(engine, texts, tmp_path / "run", prometheus_file=str(metrics))
    run = new_run(config)
    run_on_ranks(2, train_with_naps, run.folder, config, place)
    # ignore the first report: in the first step ranks also import modules, which may take a single rank a long time
    _, second, third = read_rows(run.health_file)
    assert second["slowest"] == 1 and second["slow"] and f"Rank 1 on {HOST}" in second["text"]
    # the sleep counts as the sleeper's compute time and as the other rank's wait, except for the time that the other
    # rank spends waiting for the report between two steps. A busy machine only adds to both times
    assert second["compute_seconds"][1] >= NAP and second["wait_seconds"][0] > NAP / 4
    # both ranks sleep now, so rank 1 is no longer the slow one
    assert third["compute_seconds"][0] > NAP / 2 and third["over_median"] < second["over_median"]
    assert f'distattn_compute_seconds{{host="{HOST}",rank="1"}}' in metrics.read_text()
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert {"health/slowest_rank", "health_compute_seconds/1", "health_wait_seconds/0"} <= set(events.Tags()["scalars"])


class Nvml(types.ModuleType):
    """The API of nvidia-ml-py for one GPU, whose counters a test sets."""

    NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 0, 1, 0
    NVML_NVLINK_ERROR_DL_REPLAY, NVML_NVLINK_ERROR_DL_RECOVERY, NVML_NVLINK_ERROR_DL_CRC_FLIT = 0, 1, 2
    NVML_NVLINK_MAX_LINKS, NVML_ERROR_NOT_SUPPORTED, nvmlEventTypeXidCriticalError = 4, 3, 8

    class NVMLError(Exception):
        pass

    def __init__(self, index):
        super().__init__("pynvml")
        self.index, self.memory, self.rows, self.crc, self.xids = index, {0: 0, 1: 0}, (0, 0), [0, 0], []
        self.ended = []
        self.nvmlInit = lambda: None
        self.nvmlShutdown = lambda: self.ended.append("shut down")
        self.nvmlEventSetFree = lambda events: self.ended.append(events)
        self.nvmlDeviceGetIndex = lambda handle: self.index
        self.nvmlDeviceGetTotalEccErrors = lambda handle, kind, counter: self.memory[kind]
        self.nvmlDeviceGetRemappedRows = lambda handle: (*self.rows, 0, 0)
        self.nvmlEventSetCreate = lambda: "events"
        self.nvmlDeviceRegisterEvents = lambda handle, kinds, events: None

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "GPU-1":
            raise self.NVMLError(6)
        return uuid

    def nvmlDeviceGetNvLinkErrorCounter(self, handle, link, kind):
        if link >= 2 or kind == self.NVML_NVLINK_ERROR_DL_REPLAY:
            raise self.NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        return self.crc[link] if kind == self.NVML_NVLINK_ERROR_DL_CRC_FLIT else 0

    def nvmlEventSetWait_v2(self, events, milliseconds):
        assert milliseconds == 0
        if not self.xids:
            raise self.NVMLError(10)
        return types.SimpleNamespace(eventData=self.xids.pop(0))


def with_counters(rank):
    nvml, reports = Nvml(index=4 + rank), []
    sys.modules["pynvml"] = nvml
    nvml.memory[0], nvml.crc = 7, [5, 6]
    with da.ContextParallel(strategy="ring") as cp:
        health = HealthReports(cp, torch.device("cpu"), 1, reports.append, DeviceCounters("GPU-1"))
        health.after_step(1, costs(1.0))
        if rank == 1:
            nvml.memory[1], nvml.crc, nvml.xids = 2, [5, 9], [48, 63]
        health.after_step(2, costs(1.0))
        health.after_step(3, costs(1.0))
        health.close()
    assert nvml.ended == ["events", "shut down"]
    return [asdict(report) for report in reports]


def test_a_counter_that_grows_is_named_with_its_gpu():
    quiet, grown, after = (HealthReport(**report) for report in run_on_ranks(2, with_counters)[0])
    # errors from before the run are not news
    assert quiet.errors == () and not quiet.is_news and quiet.counters[0][:5] == (7, 0, 0, 11, None)
    place = f"rank 1 on {HOST}, GPU 5: "
    assert grown.errors == (
        f"{place}2 more uncorrected memory errors, 2 in all.",
        f"{place}3 more NVLink CRC errors, 14 in all.",
        f"{place}2 more Xid messages (the last: 63), 2 in all.",
    )
    assert grown.is_news and all(error in grown.text for error in grown.errors)
    assert after.errors == () and after.counters[1][-1] == 2


def test_without_nvml_there_are_no_counters(monkeypatch):
    for module in (None, Nvml(0)):
        monkeypatch.setitem(sys.modules, "pynvml", module)
        for uuid in (None, "GPU-of another container"):
            counters = DeviceCounters(uuid)
            assert counters.index == -1 and all(value != value for value in counters.read())
            counters.close()
    assert DeviceCounters.of_device(torch.device("cpu")).index == -1


def test_prometheus_reads_a_file_or_a_port_with_the_token(tmp_path, capsys):
    report = HealthReport(**run_on_ranks(2, with_counters)[0][1] | {"hosts": ('a"b', "c")})
    text = prometheus_text(report).decode()
    metrics = {metric.name: metric for metric in text_string_to_metric_families(text)}
    seconds = {f"distattn_{name}_seconds" for name in ("step", "compute", "wait", "data")}
    assert metrics.keys() == seconds | {"distattn_step", "distattn_device_errors", "distattn_slowest_over_median"}
    assert {metric.type for metric in metrics.values()} == {"gauge"}
    values = {
        (sample.name, *sample.labels.items()): sample.value for metric in metrics.values() for sample in metric.samples
    }
    assert values["distattn_wait_seconds", ("host", "c"), ("rank", "1")] == 0.5
    errors = ("host", "c"), ("kind", "NVLink CRC errors"), ("rank", "1")
    assert values["distattn_device_errors", *errors] == 14.0 and 'host="a\\"b"' in text
    assert "nan" not in text.lower() and len(COUNTERS) == len(report.counters[0])
    PrometheusFile(tmp_path / "a.prom").publish(report)
    assert (tmp_path / "a.prom").read_text() == text and [path.name for path in tmp_path.iterdir()] == ["a.prom"]
    missing = PrometheusFile(tmp_path / "no" / "a.prom")
    missing.publish(report)
    missing.publish(report)
    assert capsys.readouterr().err.count("cannot be written: No such file or directory; the run goes on.") == 1
    port = PrometheusPort("127.0.0.1", 0, "right")
    try:
        port.publish(report)
        request = urllib.request.Request(f"http://127.0.0.1:{port.port}/metrics")
        for token in ("wrong", "rigĥt".encode().decode("latin-1"), ""):
            request.add_unredirected_header("Authorization", f"Bearer {token}")
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(request)
        request.add_unredirected_header("Authorization", "Bearer right")
        with urllib.request.urlopen(request) as answer:
            assert answer.read().decode() == text
        with pytest.raises(DistattnError, match=f"cannot listen on 127.0.0.1, port {port.port}"):
            PrometheusPort("127.0.0.1", port.port, "right")
    finally:
        port.close()


def test_reports_for_prometheus_without_its_package_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DistattnError, match=r"need the package prometheus_client: pip install 'distattn\[train\]'"):
        PrometheusFile(tmp_path / "a.prom")


def test_impossible_health_settings_are_refused_by_name():
    wrong = HealthConfig(every_steps=0, prometheus_file="a.prom", prometheus_port=70000, prometheus_address="eth0")
    problems = " ".join(map(str, problems_of(Config(health=wrong))))
    assert "health.prometheus_file: there are no reports to publish" in problems
    assert (
        "health.prometheus_port: must be at most 65,535" in problems and "health.prometheus_address: 'eth0'" in problems
    )

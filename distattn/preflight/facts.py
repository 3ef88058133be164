"""The facts that each rank collects before a run: code, configuration, packages, device, disk, data and memory forecast."""

from __future__ import annotations

import json
import os
import platform
import socket
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from distattn.adapters.huggingface_spans import recurrent_op
from distattn.checkpoints.checkpoint_folder import list_checkpoints
from distattn.checkpoints.owner import machine_digest
from distattn.doctor.environment import PACKAGES
from distattn.ir.errors import DistattnError
from distattn.ir.op import OPS
from distattn.ir.plan import Plan
from distattn.kernels.recurrence.hopper import fla_core_advice
from distattn.memory.host_memory import available_bytes
from distattn.preflight.device_state import DeviceState, device_state, driver_version
from distattn.preflight.memory_forecast import MemoryForecast, forecast_memory
from distattn.training.config.run_file import Config
from distattn.training.config.run_settings import configured_model
from distattn.training.run_data import open_data
from distattn.training.run_facts import resume_facts
from distattn.training.run_folder import RunFolder
from distattn.training.state_bytes import model_parameters

# suffixes of the files that count as code
_CODE = (".py", ".json", ".j2")
# the entries of `resume_facts` to compare, with their names in sentences
_DIGESTS = {"model": "model configuration", "plan": "plan of packs"}


@dataclass(frozen=True)
class RankFacts:
    """The facts of one rank.

    rank: its index in the job, from 0. host: the host's name. machine: an identifier that tells hosts with the same name apart.
    config: the settings' values by key. versions: package versions by name. host_free: free host memory in bytes. disk_free: free
    bytes on the run folder's disk. disk_needed: bytes that the run's checkpoints still need. goes_on: True if the run has already
    done steps. digests: digests of the data and the model by name. failure: a sentence if something could not be read; in that
    case the facts that depend on it are missing. advice: a sentence about a package to install for a faster kernel.
    """

    rank: int
    host: str
    machine: str
    config: dict[str, Any]
    versions: dict[str, str]
    device: DeviceState
    host_free: int | None
    disk_free: int = 0
    disk_needed: int = 0
    goes_on: bool = False
    digests: dict[str, str] = field(default_factory=dict)
    forecast: MemoryForecast | None = None
    failure: str = ""
    advice: str = ""

    def as_json(self) -> str:
        """Return the facts as JSON text for `from_json`."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> RankFacts:
        """Build the facts from the output of `as_json`."""
        fields = json.loads(text)
        forecast = fields.pop("forecast")
        fields["device"] = DeviceState(*fields["device"])
        return RankFacts(**fields, forecast=None if forecast is None else MemoryForecast(*forecast))

    @property
    def place(self) -> tuple[str, str]:
        """The identity of the rank's machine. Ranks on the same machine share its memory."""
        return self.host, self.machine


def collect_facts(run: RunFolder, config: Config, device: torch.device) -> RankFacts:
    """Collect the facts of this rank. Errors are stored in `failure` instead of being raised, so that all ranks learn of them."""
    fields: dict[str, Any] = {
        "rank": dist.get_rank(),
        "host": socket.gethostname(),
        "machine": machine_digest(),
        "config": _flat(asdict(config)),
        "versions": package_versions(),
        "device": device_state(device),
        "host_free": available_bytes(),
    }
    try:
        disk = os.statvfs(run.folder)
        fields |= {"disk_free": disk.f_bavail * disk.f_frsize, "disk_needed": checkpoint_bytes(run, config)}
        fields["goes_on"] = run.metrics_file.exists() or bool(list_checkpoints(run.checkpoints))
        fields |= _facts_of_data(run, config, device, dist.get_rank())
    except DistattnError as error:
        fields["failure"] = str(error)
    except OSError as error:
        fields["failure"] = f"{error.filename or run.folder}: {error.strerror or error}."
    return RankFacts(**fields)


def kernel_advice(device: torch.device, model: Any) -> str:
    """Return advice to install a package that a model's fast kernels need on this device, or "" if nothing is missing.

    model: the model's transformers configuration.
    """
    op = recurrent_op(model)
    if device.type != "cuda" or op is None or OPS[op].decay != "token":
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return str(fla_core_advice(10 * major + minor, (OPS[op].delta,)) or "")


def code_digest() -> str:
    """Return a digest of all source files of this package on this rank's disk, as 16 hexadecimal digits."""
    root = Path(__file__).parents[1]
    hashed = xxhash.xxh3_64()
    # follow links: parallel, kernels and others are links in the package's folder
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            if name.endswith(_CODE):
                file = Path(folder, name)
                hashed.update(f"{file.relative_to(root)}\0".encode())
                hashed.update(file.read_bytes())
    return hashed.hexdigest()


def package_versions() -> dict[str, str]:
    """Return the versions of Python, CUDA, NVIDIA's driver and a run's packages, leaving out those that are not installed."""
    versions: dict[str, str | None] = {"Python": platform.python_version()}
    for name in ("distattn", *PACKAGES):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    versions |= {"CUDA": torch.version.cuda, "NVIDIA driver": driver_version()}
    return {name: value for name, value in versions.items() if value is not None}


def checkpoint_bytes(run: RunFolder, config: Config) -> int:
    """Return the bytes that a run's checkpoints will need on top of those that exist.

    Counts the checkpoints that `[checkpoint]` keeps, and the checkpoint being written, but not those that
    checkpoint.keep_every_hours keeps permanently.
    """
    every, steps = config.checkpoint.every_steps, config.train.steps
    if every < 0:
        return 0
    saves = -(-steps // every) if every else 1
    at_once = min(saves, config.checkpoint.keep_last + 1)
    # weights and both moments of AdamW
    each = 3 * model_parameters(config) * (8 if config.model.dtype == "float64" else 4)
    # the next checkpoint must fit in any case
    return each * max(at_once - len(list_checkpoints(run.checkpoints)), 1)


def _facts_of_data(run: RunFolder, config: Config, device: torch.device, rank: int) -> dict[str, Any]:
    """Return the digests of the model, the data and the plans, the memory forecast, and the advice on kernels."""
    data = open_data(run, config)
    with data.plan:
        model = configured_model(config, data.vocabulary, data.context)
        facts = resume_facts(config, data, model)
        digests = {name: facts[key] for key, name in _DIGESTS.items()}
        digests |= {f"corpus {corpus.name}": corpus.digest for corpus in data.corpora}
        plan = Plan.load(run.plan_file) if run.plan_file.exists() else None
        if plan is not None:
            digests["attention plan"] = plan.digest
        forecast = forecast_memory(config, data, device, plan, rank)
        return {"digests": digests, "forecast": forecast, "advice": kernel_advice(device, model)}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings. Return their values by their command-line keys, such as "train.steps"."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat

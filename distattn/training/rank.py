"""One rank of a run in a process of its own, started by `distattn.launch`: its device, its threads, its process group."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash

from distattn.ir.errors import DistattnError, LostRankError
from distattn.supervision.flight_recorder import lengthen_flight_recorder
from distattn.supervision.heartbeats import tell_end, telling
from distattn.training import config as configuration
from distattn.training.config import Config
from distattn.training.job_members import check_members
from distattn.training.job_store import job_store
from distattn.training.loop import train
from distattn.training.proposal import Proposal
from distattn.training.run_folder import RunFolder
from distattn.training.run_settings import runs_on_gpus

# the wait for the store of a job that is about to end
_STORE_PATIENCE = timedelta(seconds=5)
# of the system's errors those that do not pass; a file system that does not answer for a while is another matter
_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT)


def main(
    folder: str, json_lines: bool, proposed: str, may_begin: Callable[[RunFolder, Config, torch.device], bool]
) -> int:
    """Run one rank of a run. Returns the exit code. may_begin: looks at all ranks before they train; it prints why they may not.

    proposed: the name of the launcher's proposal, which rank 0 applies before the first step; "" without one.
    """

    def work(run: RunFolder, config: Config, device: torch.device) -> int:
        if not may_begin(run, config, device):
            return DistattnError.exit_code
        if config.preflight.action == "only":
            return 0
        train(run, config, json_lines, device, proposal=Proposal(run, proposed) if proposed else None)
        return 0

    return on_rank(folder, work, proposed)


def on_rank(folder: str, work: Callable[[RunFolder, Config, torch.device], int], proposed: str = "") -> int:
    """Do work as one rank of the run of a folder, with a device and the process group. Returns its exit code, or an error's.

    proposed: the name of the launcher's proposal, which has the configuration; "" where it is that of the run.
    """
    run = RunFolder(Path(folder))
    try:
        config = Proposal(run, proposed).load() if proposed else configuration.load(run.config_file)
    except DistattnError as error:
        # ranks of a machine read the same file, and have no store yet to ask what others have said
        if os.environ.get("LOCAL_RANK", os.environ["RANK"]) == "0" or run.logs.is_dir():
            sys.stderr.write(f"distattn: rank {os.environ['RANK']}: {error}\n")
            sys.stderr.flush()
        tell_end(error.exit_code, error)
        return error.exit_code
    # ranks share the machine's cores; more threads than cores only wait for each other
    here = int(os.environ.get("LOCAL_WORLD_SIZE", config.parallel.ranks))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
    device = torch.device("cpu")
    if runs_on_gpus(config):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    lengthen_flight_recorder(config.model.num_layers)
    # norms of gradients on the host are added up there
    on_device = "cpu:gloo,cuda:nccl" if config.memory.state_on_host else "nccl"
    with telling("connecting to the other ranks", waits=True):
        joined = job_store()
        dist.init_process_group("gloo" if device.type == "cpu" else on_device, **joined)
    try:
        check_members(run.secret_file)
        code = work(run, config, device)
    except DistattnError as error:
        # with another rank the store may be lost, too
        _say(str(error), run, None if isinstance(error, LostRankError) else joined["store"])
        tell_end(error.exit_code, error)
        return error.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror or error}."
        _say(text, run, joined["store"])
        code = DistattnError.exit_code if error.errno in _LASTING else 1
        tell_end(code, DistattnError(text) if error.errno in _LASTING else error)
        return code
    # only where all have come so far: NCCL waits for the others here, and an error is to be told at once
    dist.destroy_process_group()
    return code


def _say(text: str, run: RunFolder, store: dist.Store | None) -> None:
    """Print why this rank ends, unless ranks share a console and another one has said the same.

    store: that of the job; None where it is not asked what others have said.
    """
    if store is None or run.logs.is_dir() or is_first_to_say(text, store):
        sys.stderr.write(f"distattn: rank {dist.get_rank()}: {text}\n")
        sys.stderr.flush()


def is_first_to_say(text: str, store: dist.Store) -> bool:
    """Return whether no other rank of this job has said this sentence: ranks that share a console say it once.

    True, too, where the store does not answer, since it is better to say a sentence twice than not at all.
    """
    try:
        store.set_timeout(_STORE_PATIENCE)
        return store.add(f"said {xxhash.xxh3_64_hexdigest(text.encode())}", 1) == 1
    except RuntimeError:
        return True

"""The process of one rank, started by `distattn.launch`: sets up its device, threads and process group."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash

from distattn.ir.errors import DistattnError, LostRankError
from distattn.ir.text_format import print_message
from distattn.supervision.flight_recorder import size_flight_recorder
from distattn.supervision.heartbeats import activity, set_end
from distattn.training.config import run_file as configuration
from distattn.training.config.run_file import Config
from distattn.training.config.run_settings import runs_on_gpus
from distattn.training.join_job import authenticate_ranks, job_store
from distattn.training.loop import train
from distattn.training.proposal import Proposal
from distattn.training.run_folder import RunFolder

# timeout of requests to the store of a job that is about to end
_STORE_PATIENCE = timedelta(seconds=5)
# system errors that do not go away by themselves, unlike those of a temporarily unresponsive file system
_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT)


def main(
    folder: str, json_lines: bool, proposed: str, may_begin: Callable[[RunFolder, Config, torch.device], bool]
) -> int:
    """Run one rank of a run, and return the exit code.

    proposed: name of the launcher's proposal, which rank 0 applies before the first step; "" if there is no proposal.
    may_begin: a function that checks all ranks before training; if they may not start, it prints why and returns False.
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
    """Run `work` as one rank of the run in `folder`, with a device and process group, and return its exit code.

    If a DistattnError or OSError is raised, print it, record it as this rank's end and return the error's exit code.

    proposed: name of the launcher's proposal, which has the configuration; "" to use the run's own configuration.
    """
    run = RunFolder(Path(folder))
    try:
        config = Proposal(run, proposed).load() if proposed else configuration.load(run.config_file)
    except DistattnError as error:
        # print once per machine, since its ranks read the same file (`is_first_to_print` needs the store)
        if os.environ.get("LOCAL_RANK", os.environ["RANK"]) == "0" or run.logs.is_dir():
            print_message(f"rank {os.environ['RANK']}: {error}")
        set_end(error.exit_code, error)
        return error.exit_code
    # ranks share the machine's cores, and more threads than cores would only wait for each other
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", config.parallel.ranks))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    device = torch.device("cpu")
    if runs_on_gpus(config):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    size_flight_recorder(config.model.num_layers)
    # if gradients are on the host, their norms are reduced there, which needs gloo
    gpu_backend = "cpu:gloo,cuda:nccl" if config.memory.state_on_host else "nccl"
    with activity("connecting to the other ranks", waits=True, key="connecting"):
        store_arguments = job_store()
        dist.init_process_group("gloo" if device.type == "cpu" else gpu_backend, **store_arguments)
    try:
        authenticate_ranks(run.secret_file)
        code = work(run, config, device)
    except DistattnError as error:
        # do not use the store if another rank was lost, because the store may have been lost with it
        _print_error(str(error), run, None if isinstance(error, LostRankError) else store_arguments["store"])
        set_end(error.exit_code, error)
        return error.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror or error}."
        _print_error(text, run, store_arguments["store"])
        code = DistattnError.exit_code if error.errno in _LASTING else 1
        set_end(code, DistattnError(text) if error.errno in _LASTING else error)
        return code
    # done only if there was no error: NCCL waits for the other ranks here, but an error must be reported immediately
    dist.destroy_process_group()
    return code


def _print_error(text: str, run: RunFolder, store: dist.Store | None) -> None:
    """Print why this rank is exiting, unless ranks share a console and another rank has printed the same text.

    store: the job's store, or None if it must not be used.
    """
    if store is None or run.logs.is_dir() or is_first_to_print(text, store):
        print_message(f"rank {dist.get_rank()}: {text}")


def is_first_to_print(text: str, store: dist.Store) -> bool:
    """Return True if no other rank of this job has printed this text, so that ranks sharing a console print it once.

    Also True if the store does not answer, since printing twice is better than not at all.
    """
    try:
        store.set_timeout(_STORE_PATIENCE)
        return store.add(f"said {xxhash.xxh3_64_hexdigest(text.encode())}", 1) == 1
    except RuntimeError:
        return True

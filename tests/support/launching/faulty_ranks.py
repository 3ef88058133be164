"""A small training job whose ranks all-reduce over gloo. Supervision tests make one rank die or hang in various ways."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from distattn.ir.errors import DistattnError
from distattn.supervision.heartbeats import activity, set_activity

# the heartbeat limit of a step without a fault
ENDLESS_SECONDS = 600.0


def run(folder: str, steps: int) -> int:
    """Run training steps, each of which depends on all earlier ones. Resume after the last step recorded in `folder`."""
    rank, torn = int(os.environ["RANK"]), Path(folder, "fault.json")
    torch.set_num_threads(1)
    with activity("rendezvous", waits=True, key="rendezvous"):
        dist.init_process_group("gloo")
    file = Path(folder, "losses.jsonl")
    before = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    dist.barrier()
    fault = {}
    # the faulty rank of an earlier attempt may have removed the file
    with contextlib.suppress(FileNotFoundError):
        fault = json.loads(torn.read_text())
    value = torch.tensor(before[-1][1] if before else 1.0, dtype=torch.float64)
    for step in range(len(before), steps):
        # use a long limit so that a slow machine does not look like a hang
        seconds = 0.0 if fault.get("step") == step else ENDLESS_SECONDS
        set_activity("computing", step=step, seconds=seconds)
        # long enough for the watch to look several times
        time.sleep(0.05)
        mine = fault.get("rank") == rank and fault.get("step") == step
        if mine:
            # otherwise rank 0 could be killed before it records a step that all ranks have summed
            while step and not (file.exists() and file.read_text().count("\n") >= step):
                time.sleep(0.001)
            if not fault.get("again"):
                torn.unlink()
            hang(fault["kind"], Path(folder))
        part = (value * (rank + 1)).sin()
        with activity("all-reduce of the loss", seconds=seconds, waits=True, key="loss"):
            dist.all_reduce(part)
        value = part
        if rank == 0:
            with open(file, "a") as opened:
                opened.write(json.dumps([step, value.item()]) + "\n")
    dist.destroy_process_group()
    return 0


def hang(kind: str, folder: Path) -> None:
    """Inject a fault of the given kind. Return only if other ranks are to report the fault."""
    if kind == "cut":
        subprocess.run(["ip", "link", "set", os.environ["GLOO_SOCKET_IFNAME"], "down"], check=True)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind in ("server is killed", "server is stopped"):
        # the parent is the fork server, whose ranks end with it
        os.kill(os.getppid(), signal.SIGKILL if kind == "server is killed" else signal.SIGSTOP)
        set_activity("computing", seconds=ENDLESS_SECONDS)
        time.sleep(ENDLESS_SECONDS)
    if kind == "abort":
        # NCCL's watchdog ends a process in this way
        os.abort()
    if kind in ("exit", "leave"):
        os._exit(255 if kind == "exit" else 0)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "lock":
        set_activity("reading shard 12")
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    if kind == "read":
        os.mkfifo(folder / "never")
        with activity("reading never"):
            (folder / "never").read_bytes()
    if kind == "interpreter":
        while True:
            # sleep repeatedly, because a signal ends a sleep
            ctypes.PyDLL(None).sleep(1000)
    if kind == "message":
        peer = (int(os.environ["RANK"]) + 1) % dist.get_world_size()
        with activity(f"key/value move 3 of layer 17 from rank {peer}", waits=True, peers=(peer,)):
            dist.recv(torch.zeros(1), peer, tag=9)
    if kind == "refused":
        raise DistattnError("tokens.bin: token 7 is not in the vocabulary.")
    if kind == "raised":
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

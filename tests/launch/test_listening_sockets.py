"""A run listens only on the loopback, no stranger can join it, and its secret is stored in a single file."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from listening import family_of, listening_addresses
from ports import free_ports
from processes import run_on_ranks
from tiny_runs import write_run_file
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry
from waiting import LIMIT_SECONDS

from distattn.ir.errors import DistattnError, LostRankError
from distattn.launch.ranks import loopback
from distattn.launch.ranks.loopback import NODES_RENDEZVOUS, _socket_of
from distattn.training.job_secret import read_secret, write_secret
from distattn.training.join_job import authenticate_ranks, job_store

ROOT = Path(__file__).parents[2]
# an environment variable that must not appear in any log or report
PLANTED = secrets.token_hex(16)
SECTIONS = """
[train]
steps = 100000
[checkpoint]
every_steps = 1
keep_last = 1
[reference_check]
steps = 0
"""


@pytest.mark.full
def test_a_run_listens_on_the_loopback_alone_and_keeps_its_secret(tmp_path):
    write_run_file(tmp_path, SECTIONS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PLANTED_TOKEN": PLANTED}
    environment.pop("GLOO_SOCKET_IFNAME", None)
    command = [sys.executable, "-m", "distattn.launch.cli", "train", "run.toml"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step "):
                break
        family = list(family_of(process.pid))
        listening = {at for member in family for at in listening_addresses(member)}
        assert len(family) >= 3 and listening, lines
        assert {address for address, _ in listening} == {"127.0.0.1"}
        secret = (tmp_path / "run" / "secret").read_text().strip()
        assert (tmp_path / "run" / "secret").stat().st_mode & 0o777 == 0o600
        # the store answers any process on this machine, so it must hold no secret
        ((_, port),) = set(listening_addresses(family[0]))
        content = list(content_of_store(port))
        assert content and not any(bytes.fromhex(secret) in entry or secret.encode() in entry for entry in content)
        titles = [" ".join(member.cmdline()).strip() for member in family]
        for role in ("rank 0", "rank 1", "fork server"):
            assert sum(title == f"distattn {role}: run" for title in titles) == 1, titles
        for member in family:
            assert secret not in " ".join(member.cmdline()) and secret not in str(environment_of(member))
    finally:
        process.terminate()
        lines.append(process.communicate(timeout=LIMIT_SECONDS)[0])
    assert secret not in "".join(lines) and PLANTED not in "".join(lines)
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file() and file.name != "secret":
            content_of_file = file.read_bytes()
            assert secret.encode() not in content_of_file and PLANTED.encode() not in content_of_file, file


def environment_of(process):
    """Return a process's environment, or an empty dict if the process has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.environ()
    return {}


def content_of_store(port):
    """Yield all keys and values of the TCPStore on a port."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    for key in store.list_keys():
        yield key.encode()
        if store.check([key]):
            yield store.get(key)


def members(rank, folder):
    file = Path(folder, "secret" if rank != 1 else "other")
    try:
        authenticate_ranks(file)
    except DistattnError as error:
        return str(error)
    return ""


def test_a_process_without_the_secret_is_named_and_does_not_become_a_rank(tmp_path):
    write_secret(tmp_path / "secret")
    (tmp_path / "other").write_bytes((tmp_path / "secret").read_bytes())
    (tmp_path / "other").chmod(0o600)
    assert run_on_ranks(3, members, str(tmp_path)) == ["", "", ""]
    write_secret(tmp_path / "other")
    first, second, third = run_on_ranks(3, members, str(tmp_path))
    assert first == third and first.startswith("rank 1 did not prove to know the secret in")
    assert second.startswith("ranks 0, 2 did not prove")
    (tmp_path / "other").unlink()
    first, second, _ = run_on_ranks(3, members, str(tmp_path))
    assert first.startswith("rank 1 did not prove") and "there is no secret of this job" in second


def test_only_its_user_can_read_a_secret(tmp_path):
    file = tmp_path / "secret"
    write_secret(file)
    before = read_secret(file)
    write_secret(file)
    assert read_secret(file) != before and len(before) == 32
    file.chmod(0o640)
    with pytest.raises(DistattnError, match="others may read this job's secret; chmod 600 it"):
        read_secret(file)
    file.write_text("00")
    file.chmod(0o600)
    with pytest.raises(DistattnError, match="damaged; distattn resume writes a new secret"):
        read_secret(file)


def test_the_store_of_rank_0_listens_on_the_address_that_it_was_given(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(DistattnError, match=f"rank 0 cannot listen on 127.0.0.1, port {port}"):
            job_store()
    store = job_store()
    assert (store["rank"], store["world_size"]) == (0, 1)
    assert ("127.0.0.1", port) in listening_addresses(psutil.Process())
    assert {address for address, at in listening_addresses(psutil.Process()) if at == port} == {"127.0.0.1"}
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    with pytest.raises(DistattnError, match="rank 0 cannot listen on 192.0.2.1"):
        job_store()


@pytest.mark.parametrize(
    ("host", "everywhere"), [("127.0.0.1", False), ("localhost", False), ("a-name-of-no-host", True)]
)
def test_the_store_of_several_nodes_listens_on_the_address_that_they_were_given(host, everywhere):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with _socket_of(host, port):
        addresses = {address for address, at in listening_addresses(psutil.Process()) if at == port}
    assert addresses == ({"::"} if everywhere else {"127.0.0.1"})


def test_agents_of_several_nodes_meet_in_the_first_ones_store():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    first, second = (_agent(node, port) for node in range(2))
    with ThreadPoolExecutor() as threads:
        # each one waits for the other
        there = threads.submit(first.next_rendezvous)
        here = second.next_rendezvous()
        there_ = there.result()
    assert [(end.rank, end.world_size) for end in (there_, here)] == [(0, 2), (1, 2)]
    there_.store.set("of the first", "word")
    assert here.store.get("of the first") == b"word"
    assert {address for address, at in listening_addresses(psutil.Process()) if at == port} == {"127.0.0.1"}


def test_nodes_that_do_not_meet_are_told_the_address(monkeypatch):
    monkeypatch.setattr(loopback, "_LIMIT", timedelta(seconds=1))
    (port,) = free_ports(1)
    with pytest.raises(
        LostRankError, match=rf"^some of 2 nodes did not come to 127.0.0.1:{port} within 0 minutes: look"
    ):
        _agent(0, port).next_rendezvous()
    with pytest.raises(
        LostRankError, match=rf"^node 1 does not reach node 0 at 127.0.0.1:{port} within 0 minutes: look"
    ):
        _agent(1, port).next_rendezvous()


def _agent(node: int, port: int):
    parameters = RendezvousParameters(NODES_RENDEZVOUS, f"127.0.0.1:{port}", "a run", 2, 2, rank=node)
    return rendezvous_handler_registry.create_handler(parameters)

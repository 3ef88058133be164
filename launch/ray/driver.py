"""Connects this process, as a driver, to a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants
from ray.exceptions import RayError

from distattn.ir.errors import DistattnError
from distattn.parallel.runtime.communication.network_interfaces import LOOPBACK

# the address that stands for a new cluster on this machine
_HERE = "local"


@contextmanager
def connected(address: str, quiet: bool, cores_here: Callable[[], int]) -> Iterator[None]:
    """Connect to the cluster at `address` (HOST:PORT), else at RAY_ADDRESS, else on this machine, else to a new cluster here.

    quiet: hide the output of the cluster's processes. cores_here: returns the number of CPUs for a new cluster. Raises
    DistattnError if no cluster can be reached or started.
    """
    options: dict[str, Any] = {"log_to_driver": not quiet, "logging_level": "ERROR"}
    if address == _HERE or not _join(address, options):
        _begin_here(cores_here(), options)
    try:
        yield
    finally:
        ray.shutdown()


def _begin_here(cores: int, options: dict[str, Any]) -> None:
    """Start a cluster of this machine alone, with all sockets on the loopback interface."""
    # keep Ray, here and in its processes, from replacing the loopback with another of the machine's addresses and from
    # listening on all of them
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray.init(address="local", num_cpus=cores, include_dashboard=False, _node_ip_address=LOOPBACK, **options)


def _join(address: str, options: dict[str, Any]) -> bool:
    """Connect to an existing cluster. Return False if none is named or running here. Raises DistattnError if connecting fails."""
    named = address or os.environ.get("RAY_ADDRESS", "")
    try:
        ray.init(address=named or "auto", **options)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        # a RayError means that a cluster is running here but refuses the connection
        if named or isinstance(error, RayError):
            first = str(error).strip().splitlines()[0]
            raise DistattnError(f"ray.address: no cluster at {named or 'this machine'}: {first}") from None
        return False
    return True

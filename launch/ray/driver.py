"""This process as a driver of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants
from ray.exceptions import RayError

from distattn.ir.errors import DistattnError
from distattn.parallel.runtime.network_interfaces import LOOPBACK

# in place of an address: a new cluster on this machine
_HERE = "local"


@contextmanager
def connected(address: str, quiet: bool, cores_here: Callable[[], int]) -> Iterator[None]:
    """Around work on a cluster: that at an address, HOST:PORT, or of RAY_ADDRESS or this machine; a new one here where none is.

    quiet: nothing of what processes of the cluster print appears here. cores_here: called for the CPUs of a new one. Raises
    DistattnError where no cluster can be had.
    """
    given: dict[str, Any] = {"log_to_driver": not quiet, "logging_level": "ERROR"}
    if address == _HERE or not _joined(address, given):
        _begin_here(cores_here(), given)
    try:
        yield
    finally:
        ray.shutdown()


def _begin_here(cores: int, given: dict[str, Any]) -> None:
    """A cluster of this machine alone, all of whose sockets are on the loopback."""
    # Ray takes an address of the machine for the loopback's otherwise, and listens on all of them; here, and in its processes
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray.init(address="local", num_cpus=cores, include_dashboard=False, _node_ip_address=LOOPBACK, **given)


def _joined(address: str, given: dict[str, Any]) -> bool:
    """Become a driver of a cluster; False where none was named and none is there. Raises DistattnError."""
    named = address or os.environ.get("RAY_ADDRESS", "")
    try:
        ray.init(address=named or "auto", **given)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        # a cluster that is there and lets nobody in was meant, too
        if named or isinstance(error, RayError):
            first = str(error).strip().splitlines()[0]
            raise DistattnError(f"ray.address: no cluster at {named or 'this machine'}: {first}") from None
        return False
    return True

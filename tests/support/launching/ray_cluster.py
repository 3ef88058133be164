"""A Ray cluster of several raylets on this machine. Each raylet is a node, and everything listens on the loopback.

The cluster runs in another process, since Ray reads its environment when it is imported: python ray_cluster.py CPUS. It
obeys the commands on its standard input (add NAME, kill NAME, miss NAME) and answers each with one line.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NODE = {"object_store_memory": 80 << 20, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
# with these settings Ray notices a killed node, whose checks fail immediately, after 5 s instead of the default 12 s. A
# node that is slow on a loaded machine still has more than a minute
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 10000,
    "health_check_failure_threshold": 10,
}


class RayCluster:
    """Nodes with `cpus` CPUs each, and a head without CPUs.

    environment: the variables that processes need to use the cluster. address: the head's address.
    """

    def __init__(self, cpus: int, *names: str):
        # paths of sockets must be short, and no other user may read the token
        self._folder = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        token = Path(self._folder.name, "token")
        token.touch(0o600)
        token.write_text(os.urandom(32).hex())
        self.environment = {
            # without this, Ray uses an address other than the loopback
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": self._folder.name,
            # every node is this machine, whose name need not resolve
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self._said = Path(self._folder.name, "said")
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(cpus)],
            env=os.environ | self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said.open("w"),
            text=True,
        )
        self.address = self._answer()
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        """Add a node named `name`."""
        self._ask(f"add {name}")

    def kill(self, name: str) -> None:
        """Kill a node's raylet, and with it everything that it runs."""
        self._ask(f"kill {name}")

    def wait_without(self, name: str) -> None:
        """Wait until the other nodes know that node `name` is gone."""
        self._ask(f"miss {name}")

    def stop(self) -> None:
        """Stop the cluster."""
        self._process.communicate()
        self._folder.cleanup()

    def _ask(self, request: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{request}\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, self._said.read_text()
        return line


def main(cpus: int) -> None:
    import ray
    from ray.cluster_utils import Cluster

    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    # Ray's own output must not be mistaken for an answer
    os.dup2(2, 1)
    head = {"num_cpus": 0, "_system_config": HEALTH, **NODE}
    cluster = Cluster(initialize_head=True, shutdown_at_exit=True, head_node_args=head)
    nodes: dict[str, Any] = {}
    answers.write(f"{cluster.address}\n")
    for line in sys.stdin:
        action, name = line.split()
        if action == "add":
            nodes[name] = cluster.add_node(num_cpus=cpus, node_name=name, **NODE)
        elif action == "kill":
            cluster.remove_node(nodes.pop(name), allow_graceful=False)
        else:
            if not ray.is_initialized():
                ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            while any(node["Alive"] and node["NodeName"] == name for node in ray.nodes()):
                time.sleep(0.1)
        answers.write(f"{action} {name}\n")
    cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))

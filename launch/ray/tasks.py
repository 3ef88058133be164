"""Commands as tasks of a Ray cluster, each with GPUs and CPUs of its own: measurements on every node, or cases of a benchmark.

python -m distattn.launch.ray.tasks FOLDER [options] -- COMMAND
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distattn.ir.errors import DistattnError
from distattn.launch.command_line import CommandParser, array_words, print_line, print_message
from distattn.launch.ray.agent import child_environment
from distattn.launch.ray.driver import connected
from distattn.launch.ray.nodes import node_names

USAGE = """usage: python -m distattn.launch.ray.tasks FOLDER [--ray.address HOST:PORT] [--array KEY=VALUE,VALUE... | --every-node]
                                           [--gpus N] [--cpus N] -- COMMAND ARGUMENTS

Runs a command on a Ray cluster: once for each value of an argument (--KEY=VALUE is added), as many at a time as the cluster has
room for, or once on every node. FOLDER gets NAME.log with what each prints; files that it writes into {out} come into
FOLDER/NAME. --gpus and --cpus are those of one task (default 0 and 1), with --every-node all that the node has. The command's
python is the one that runs Ray's workers.
"""
# what stands for the folder whose files come back
_OUT = "{out}"


class Task(NamedTuple):
    """A command to run. words: {out} in them becomes a folder. node: Ray's number of the node it is for, empty for any."""

    name: str
    words: tuple[str, ...]
    cpus: float
    gpus: float
    node: str = ""


class TaskEnd(NamedTuple):
    """How a command has ended. code: -N where signal N killed it, 1 where its node or worker was lost. files: by name."""

    code: int
    output: str
    files: dict[str, bytes]


class RayNode(NamedTuple):
    """A node of the cluster that has CPUs or GPUs. number: Ray's."""

    name: str
    number: str
    cpus: float
    gpus: float


def task_nodes() -> list[RayNode]:
    """Nodes for tasks that each take a whole one, by name: where some have GPUs only these."""
    names = node_names()
    found = [
        RayNode(
            names[node["NodeID"]], node["NodeID"], node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    with_gpus = [node for node in found if node.gpus]
    return sorted(with_gpus or [node for node in found if node.cpus])


def run_tasks(tasks: Sequence[Task]) -> Iterator[tuple[Task, TaskEnd]]:
    """Run commands on the cluster this process is connected to; yields them as they end. Those that lack room wait."""
    folder = os.getcwd()
    waiting = {_options(task).remote(task.words, folder): task for task in tasks}
    while waiting:
        for done in ray.wait(list(waiting), num_returns=1)[0]:
            try:
                end: TaskEnd = ray.get(done)
            except RayError as error:
                end = TaskEnd(1, f"was lost: {str(error).strip().splitlines()[0]}\n", {})
            yield waiting.pop(done), end


def run_command(words: Sequence[str], folder: str) -> TaskEnd:
    """Run a command in a folder, or where this process is where a node does not have it: a task. It ends with its worker."""
    program = sys.executable if words[0] == "python" else words[0]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "distattn.launch.ranks.die_with_launcher", str(os.getpid()), "--"]
        done = subprocess.run(
            [*command, program, *(word.replace(_OUT, out) for word in words[1:])],
            cwd=folder if os.path.isdir(folder) else None,
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        files = {str(file.relative_to(out)): file.read_bytes() for file in Path(out).rglob("*") if file.is_file()}
        return TaskEnd(done.returncode, done.stdout.decode("utf-8", "replace"), files)


def _options(task: Task) -> Any:
    given: dict[str, Any] = {"num_cpus": task.cpus, "num_gpus": task.gpus, "max_retries": 0}
    if task.node:
        given["scheduling_strategy"] = NodeAffinitySchedulingStrategy(task.node, soft=False)
    return ray.remote(run_command).options(**given)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code: 0, or that of the first task that failed."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if arguments else 2
    try:
        return _run(arguments)
    except DistattnError as error:
        print_message(str(error))
        return error.exit_code


def _run(arguments: Sequence[str]) -> int:
    parser = CommandParser("ray.tasks")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ray.address", dest="address", default="")
    parser.add_argument("--array")
    parser.add_argument("--every-node", action="store_true")
    for name, default in (("gpus", 0.0), ("cpus", 1.0)):
        parser.add_argument(f"--{name}", type=float, default=default)
    split = list(arguments).index("--") if "--" in arguments else len(arguments)
    given, words = parser.parse_args(arguments[:split]), tuple(arguments[split + 1 :])
    if not words:
        raise DistattnError("ray.tasks: the command comes after --, such as -- python benchmarks/planning.py.")
    if given.every_node == (given.array is not None):
        raise DistattnError(
            "ray.tasks: --array has one task for each value, --every-node one for each node; give one of both."
        )
    try:
        given.folder.mkdir(parents=True)
    except OSError as error:
        raise DistattnError(
            f"ray.tasks: {given.folder} cannot be made: {error.strerror}; name another folder."
        ) from None
    codes = []
    with connected(given.address, quiet=False, cores_here=lambda: os.cpu_count() or 1):
        if given.every_node:
            tasks = [
                Task(node.name.replace("/", "_"), words, node.cpus, node.gpus, node.number) for node in task_nodes()
            ]
        else:
            tasks = [
                Task(word.partition("=")[2].replace("/", "_"), (*words, word), given.cpus, given.gpus)
                for word in array_words(given.array)
            ]
        for task, end in run_tasks(tasks):
            _keep(given.folder, task, end)
            print_line(f"{task.name}: exit code {end.code}, {given.folder / task.name}.log")
            codes.append(end.code)
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def _keep(folder: Path, task: Task, end: TaskEnd) -> None:
    (folder / f"{task.name}.log").write_text(end.output, "utf-8")
    for name, content in end.files.items():
        (folder / task.name / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / task.name / name).write_bytes(content)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

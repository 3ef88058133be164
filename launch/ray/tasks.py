"""Runs commands as tasks of a Ray cluster, each with its own GPUs and CPUs, to measure nodes or run a benchmark's cases.

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
from distattn.ir.text_format import print_message
from distattn.launch.command_line import CommandParser, array_words, print_line
from distattn.launch.ray.agent import child_environment
from distattn.launch.ray.driver import connected
from distattn.launch.ray.nodes import node_names
from distattn.supervision.helper_processes import shell_exit_code

USAGE = """usage: python -m distattn.launch.ray.tasks FOLDER [--ray.address HOST:PORT] [--array KEY=VALUE,VALUE... | --every-node]
                                           [--gpus N] [--cpus N] -- COMMAND ARGUMENTS

Runs a command on a Ray cluster: once for each value of an argument (--KEY=VALUE is added), as many at a time as the cluster has
room for, or once on every node. The output of each task is written to FOLDER/NAME.log; files that it writes into {out} are
copied to FOLDER/NAME. --gpus and --cpus are those of one task (default 0 and 1); with --every-node a task gets all of its node.
The command's python is the one that runs Ray's workers.
"""
# placeholder for the folder whose files are returned
_OUT = "{out}"


class Task(NamedTuple):
    """A command to run. command: {out} in it is replaced with a folder. node: Ray's id of the node to run on; "" for any."""

    name: str
    command: tuple[str, ...]
    cpus: float
    gpus: float
    node: str = ""


class TaskEnd(NamedTuple):
    """The result of a command. code: exit code, -N if signal N killed it, 1 if its node or worker was lost.

    output: stdout and stderr. files: contents of the files in {out}, by name.
    """

    code: int
    output: str
    files: dict[str, bytes]


class RayNode(NamedTuple):
    """A node of the cluster with CPUs or GPUs. number: Ray's node id."""

    name: str
    number: str
    cpus: float
    gpus: float


def task_nodes() -> list[RayNode]:
    """Return the nodes for tasks that occupy an entire node, sorted by name. If nodes have GPUs, return only those nodes."""
    names = node_names()
    nodes = [
        RayNode(
            names[node["NodeID"]], node["NodeID"], node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    with_gpus = [node for node in nodes if node.gpus]
    return sorted(with_gpus or [node for node in nodes if node.cpus])


def run_tasks(tasks: Sequence[Task]) -> Iterator[tuple[Task, TaskEnd]]:
    """Run commands on the connected cluster as soon as there is room. Yield (task, end) when a task ends."""
    folder = os.getcwd()
    waiting = {_options(task).remote(task.command, folder): task for task in tasks}
    while waiting:
        for done in ray.wait(list(waiting), num_returns=1)[0]:
            try:
                end: TaskEnd = ray.get(done)
            except RayError as error:
                end = TaskEnd(1, f"was lost: {str(error).strip().splitlines()[0]}\n", {})
            yield waiting.pop(done), end


def run_command(command: Sequence[str], folder: str) -> TaskEnd:
    """Run a command as a task. It is killed if the worker ends. folder: working directory, if it exists on the node."""
    program = sys.executable if command[0] == "python" else command[0]
    with tempfile.TemporaryDirectory() as out:
        wrapper = [sys.executable, "-m", "distattn.launch.ranks.die_with_launcher", str(os.getpid()), "--"]
        done = subprocess.run(
            [*wrapper, program, *(argument.replace(_OUT, out) for argument in command[1:])],
            cwd=folder if os.path.isdir(folder) else None,
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        files = {str(file.relative_to(out)): file.read_bytes() for file in Path(out).rglob("*") if file.is_file()}
        return TaskEnd(done.returncode, done.stdout.decode("utf-8", "replace"), files)


def _options(task: Task) -> Any:
    options: dict[str, Any] = {"num_cpus": task.cpus, "num_gpus": task.gpus, "max_retries": 0}
    if task.node:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(task.node, soft=False)
    return ray.remote(run_command).options(**options)


def main(arguments: Sequence[str]) -> int:
    """Run the command. Return 0, or the exit code of the first task that failed."""
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
    options, command = parser.parse_args(arguments[:split]), tuple(arguments[split + 1 :])
    if not command:
        raise DistattnError("ray.tasks: the command comes after --, such as -- python benchmarks/planning.py.")
    if options.every_node == (options.array is not None):
        raise DistattnError(
            "ray.tasks: --array has one task for each value, --every-node one for each node; give one of the two."
        )
    try:
        options.folder.mkdir(parents=True)
    except OSError as error:
        raise DistattnError(
            f"ray.tasks: {options.folder} cannot be created: {error.strerror}; name another folder."
        ) from None
    codes = []
    with connected(options.address, quiet=False, cores_here=lambda: os.cpu_count() or 1):
        if options.every_node:
            tasks = [
                Task(node.name.replace("/", "_"), command, node.cpus, node.gpus, node.number) for node in task_nodes()
            ]
        else:
            tasks = [
                Task(argument.partition("=")[2].replace("/", "_"), (*command, argument), options.cpus, options.gpus)
                for argument in array_words(options.array)
            ]
        for task, end in run_tasks(tasks):
            _keep(options.folder, task, end)
            print_line(f"{task.name}: exit code {end.code}, {options.folder / task.name}.log")
            codes.append(end.code)
    return next((shell_exit_code(code) for code in codes if code), 0)


def _keep(folder: Path, task: Task, end: TaskEnd) -> None:
    (folder / f"{task.name}.log").write_text(end.output, "utf-8")
    for name, content in end.files.items():
        (folder / task.name / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / task.name / name).write_bytes(content)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The files in cluster/jobs: they use their schedulers' fields, start an existing module, and continue after exit code
75.
"""

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from job_schemas import DstackTask, JobSet, SkyTask, TrainingRuntime, TrainJob

from distattn.checkpoints.owner import JOB_VARIABLE
from distattn.ir.errors import RunStopped
from distattn.launch import run_node

JOBS = Path(__file__).parents[2] / "cluster" / "jobs"
STOPPED = RunStopped.exit_code


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((JOBS / name).read_text()))


def check_policies(spec) -> None:
    """Check that a pod's exit code 75 fails its job for the reason in the JobSet's rule, and that other exit codes use
    up restarts.
    """
    (rule,) = spec.failurePolicy.rules
    assert rule.action == "RestartJobSetAndIgnoreMaxRestarts" and rule.onJobFailureReasons == ["PodFailurePolicy"]
    (job,) = spec.replicatedJobs
    assert job.template.spec.backoffLimit == 0 and spec.failurePolicy.maxRestarts > 0
    (failure,) = job.template.spec.podFailurePolicy.rules
    (container,) = job.template.spec.template.spec.containers
    assert failure.action == "FailJob" and failure.onExitCodes.values == [STOPPED]
    assert failure.onExitCodes.containerName == container.name
    pod = job.template.spec.template.spec
    assert {mount.name for mount in container.volumeMounts} == {volume.name for volume in pod.volumes}
    # JobSet sets this label on all pods across restarts
    (variable,) = container.env
    assert variable.name == JOB_VARIABLE
    assert variable.valueFrom.fieldRef.fieldPath == "metadata.labels['jobset.sigs.k8s.io/jobset-uid']"


def test_kubeflow_trainer():
    runtime, job = documents("kubeflow-trainjob.yaml")
    runtime, job = TrainingRuntime.model_validate(runtime), TrainJob.model_validate(job)
    check_policies(runtime.spec.template.spec)
    assert job.spec.runtimeRef.name == runtime.metadata.name
    assert job.spec.trainer.numNodes == runtime.spec.mlPolicy.numNodes
    check_command(job.spec.trainer.command, {"PET_MASTER_ADDR": "a", "PET_MASTER_PORT": "29500", "PET_NODE_RANK": "1"})


def test_jobset():
    (document,) = documents("jobset.yaml")
    jobset = JobSet.model_validate(document)
    check_policies(jobset.spec)
    (job,) = jobset.spec.replicatedJobs
    spec = job.template.spec
    assert spec.completions == spec.parallelism == 4 and spec.completionMode == "Indexed"
    (container,) = spec.template.spec.containers
    assert f"{jobset.metadata.name}-{job.name}-0-0.{jobset.metadata.name}:29500" in container.command[-1]
    check_command(container.command, {"JOB_COMPLETION_INDEX": "1"})


def test_skypilot():
    (document,) = documents("skypilot.yaml")
    task = SkyTask.model_validate(document)
    assert task.resources.job_recovery.recover_on_exit_codes == [STOPPED]
    environment = {"SKYPILOT_NODE_IPS": "a\nb\nc\nd", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "4"}
    check_command(["bash", "-c", task.run], environment | {"SKYPILOT_TASK_ID": "sky 7"}, job="sky 7")


def test_dstack():
    (document,) = documents("dstack.yaml")
    task = DstackTask.model_validate(document)
    assert set(task.retry.on_events) == {"no-capacity", "interruption", "error"}
    environment = {"DSTACK_MASTER_NODE_IP": "a", "DSTACK_NODE_RANK": "1", "DSTACK_NODES_NUM": str(task.nodes)}
    check_command(["bash", "-c", task.commands[0]], environment | {"DSTACK_RUN_ID": "sky 7"}, job="sky 7")


def check_command(command: list[str], environment: dict[str, str], job: str = "") -> None:
    """Check that a shell running the command starts run_node as the second of four nodes. job: the job name it sets."""
    assert command[:2] == ["bash", "-c"]
    shown = f'exec() {{ printf "%s\\n" "${JOB_VARIABLE}" "$@"; }}\n' + command[2]
    done = subprocess.run(
        ["bash", "-c", shown], env=environment | {"PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    job_name, *started = done.stdout.splitlines()
    assert started[:3] == ["python", "-m", run_node.__name__] and done.returncode == 0 and job_name == job, done.stderr
    address = started[4]
    assert started[3] == "/runs/mine" and started[5:] == ["1", "4"] and address.endswith(":29500"), shlex.join(started)


@pytest.mark.parametrize("name", sorted(file.name for file in JOBS.glob("*.yaml")))
def test_a_file_begins_with_the_commands_that_start_it(name):
    head = (JOBS / name).read_text().splitlines()[:3]
    assert "distattn launch folder CONFIG --nodes 4 --gpus 8 --run.folder /runs/mine" in head[1] and name in head[2]

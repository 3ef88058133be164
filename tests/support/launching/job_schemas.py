"""The fields of four schedulers that cluster/jobs uses, named as in their public references. Any other field is an
error.

Kubernetes: batch/v1 Job and core/v1 Pod of the API reference; JobSet: jobset.x-k8s.io/v1alpha2; Kubeflow Trainer v2.2:
trainer.kubeflow.org/v1alpha1; SkyPilot: "Task YAML"; dstack: "Task", reference/dstack.yml.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[int, Field(ge=0)]
DURATION = r"^\d+[smhdw]$"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: Name | None = None
    labels: dict[str, str] = {}


# ---- Kubernetes


class VolumeMount(Strict):
    name: Name
    mountPath: str


class Claim(Strict):
    claimName: Name


class EmptyDir(Strict):
    medium: Literal["", "Memory"] = ""


class Volume(Strict):
    name: Name
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None


class Resources(Strict):
    limits: dict[str, int | str] = {}
    requests: dict[str, int | str] = {}


class Port(Strict):
    containerPort: Annotated[int, Field(ge=1, le=65535)]


class FieldRef(Strict):
    # only the fields that environment variables may refer to
    fieldPath: Annotated[str, Field(pattern=r"^metadata\.(name|namespace|uid|(labels|annotations)\['[^']+'\])$")]


class EnvSource(Strict):
    fieldRef: FieldRef


class EnvVar(Strict):
    name: str
    valueFrom: EnvSource


class Container(Strict):
    name: Name
    image: str
    command: list[str] = []
    env: list[EnvVar] = []
    ports: list[Port] = []
    resources: Resources = Resources()
    volumeMounts: list[VolumeMount] = []


class PodSpec(Strict):
    # podFailurePolicy requires that pods are never restarted
    restartPolicy: Literal["Never"]
    terminationGracePeriodSeconds: Seconds = 30
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []


class PodTemplate(Strict):
    metadata: Metadata = Metadata()
    spec: PodSpec


class OnExitCodes(Strict):
    containerName: Name | None = None
    operator: Literal["In", "NotIn"]
    values: Annotated[list[int], Field(min_length=1)]


class PodFailureRule(Strict):
    action: Literal["FailJob", "FailIndex", "Ignore", "Count"]
    onExitCodes: OnExitCodes


class PodFailurePolicy(Strict):
    rules: Annotated[list[PodFailureRule], Field(max_length=20)]


class JobSpec(Strict):
    completions: Count = 1
    parallelism: Count = 1
    completionMode: Literal["NonIndexed", "Indexed"] = "NonIndexed"
    backoffLimit: Seconds = 6
    podFailurePolicy: PodFailurePolicy | None = None
    template: PodTemplate


class JobTemplate(Strict):
    metadata: Metadata = Metadata()
    spec: JobSpec


# ---- JobSet


class FailureRule(Strict):
    name: Name
    action: Literal["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
    onJobFailureReasons: list[
        Literal[
            "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"
        ]
    ] = []


class FailurePolicy(Strict):
    maxRestarts: Seconds = 0
    rules: list[FailureRule] = []


class Network(Strict):
    enableDNSHostnames: bool


class ReplicatedJob(Strict):
    name: Name
    replicas: Count = 1
    template: JobTemplate


class JobSetSpec(Strict):
    network: Network | None = None
    failurePolicy: FailurePolicy
    replicatedJobs: Annotated[list[ReplicatedJob], Field(min_length=1)]


class JobSet(Strict):
    apiVersion: Literal["jobset.x-k8s.io/v1alpha2"]
    kind: Literal["JobSet"]
    metadata: Metadata
    spec: JobSetSpec


# ---- Kubeflow Trainer


class TorchPolicy(Strict):
    # this policy has no fields since v2.2
    pass


class MlPolicy(Strict):
    numNodes: Count
    torch: TorchPolicy


class JobSetTemplate(Strict):
    spec: JobSetSpec


class RuntimeSpec(Strict):
    mlPolicy: MlPolicy
    template: JobSetTemplate


class TrainingRuntime(Strict):
    apiVersion: Literal["trainer.kubeflow.org/v1alpha1"]
    kind: Literal["TrainingRuntime"]
    metadata: Metadata
    spec: RuntimeSpec


class RuntimeRef(Strict):
    apiGroup: Literal["trainer.kubeflow.org"]
    kind: Literal["TrainingRuntime", "ClusterTrainingRuntime"]
    name: Name


class Trainer(Strict):
    image: str
    numNodes: Count
    resourcesPerNode: Resources
    command: list[str]


class TrainJobSpec(Strict):
    runtimeRef: RuntimeRef
    trainer: Trainer


class TrainJob(Strict):
    apiVersion: Literal["trainer.kubeflow.org/v1alpha1"]
    kind: Literal["TrainJob"]
    metadata: Metadata
    spec: TrainJobSpec


# ---- SkyPilot


class JobRecovery(Strict):
    strategy: Literal["FAILOVER", "EAGER_NEXT_REGION"]
    max_restarts_on_errors: Seconds
    recover_on_exit_codes: list[Annotated[int, Field(ge=0, le=255)]]


class SkyResources(Strict):
    accelerators: Annotated[str, Field(pattern=r"^[\w-]+:\d+$")]
    image_id: str
    use_spot: bool
    job_recovery: JobRecovery


class SkyTask(Strict):
    name: Name
    num_nodes: Count
    resources: SkyResources
    volumes: dict[str, str]
    run: str


# ---- dstack


class Retry(Strict):
    on_events: list[Literal["no-capacity", "interruption", "error"]]
    duration: Annotated[str, Field(pattern=DURATION)]


class DstackResources(Strict):
    gpu: str
    shm_size: Annotated[str, Field(pattern=r"^\d+[MGT]B$")]


class DstackTask(Strict):
    type: Literal["task"]
    name: Name
    nodes: Count
    image: str
    commands: list[str]
    volumes: list[Annotated[str, Field(pattern=r"^/[^:]+:/[^:]+$")]]
    stop_duration: Annotated[str, Field(pattern=DURATION)]
    retry: Retry
    resources: DstackResources

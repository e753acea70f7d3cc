"""The descriptions of jobs for Kubernetes, against the published schemas of who reads them."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import jsonschema_rs
import pytest
import yaml
from torch.distributed.run import config_from_args, get_args_parser
from torchx import specs
from torchx.runner import get_runner

from launch import trainjob
from launch.components import JobError, evaluate, export, plan, train

client = pytest.importorskip("kubernetes.client", reason="pip install -r requirements/kubernetes.txt")
published = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install -r requirements/dev.txt")

JOB: dict[str, Any] = {
    **{"config": "c.toml", "out": "/s/run", "j": "2x8", "gpu": 8, "cpu": 96, "memMB": 900_000},
    **{"max_restarts": 3, "max_retries": 2, "image": "registry/tandemrec:7", "env": {"A": "b c"}},
}
MOUNTS = ["type=volume", "src=claim", "dst=/s", "type=bind", "src=/data", "dst=/data", "readonly"]
APPS = [
    train("data.log=/s/$log a", **JOB, mounts=MOUNTS),
    evaluate(run="/s/run", j="3x1"),
    export(run="/s/run", out="/s/snap", mounts=MOUNTS),
    plan("--set", "data.log=/s/log", config="c.toml", world_size=16),
]

# What a Volcano Job may say, without the pods' template: the fields and types of
# config/crd/volcano/bases/batch.volcano.sh_jobs.yaml in volcano-sh/volcano (Apache-2.0), commit ed72c7c, with
# unknown fields refused, which a cluster would drop in silence.
NAME = {"type": "string", "maxLength": 253, "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9-]+)*$"}
COUNT = {"type": "integer", "minimum": 0}
EVENTS = ["*", "PodPending", "PodRunning", "PodFailed", "PodEvicted", "Unknown", "TaskCompleted", "OutOfSync"]
EVENT = {"enum": [*EVENTS, "CommandIssued", "JobUpdated", "TaskFailed"]}


def closed(**fields: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": fields}


POLICIES = {
    "type": "array",
    "items": closed(
        action={"type": "string"},
        event=EVENT,
        events={"type": "array", "items": EVENT},
        exitCode={"type": "integer"},
        timeout={"type": "string"},
    ),
}
TASK = closed(
    dependsOn={"type": "object"},
    maxRetry=COUNT,
    minAvailable=COUNT,
    name={"type": "string"},
    partitionPolicy={"type": "object"},
    policies=POLICIES,
    replicas=COUNT,
    template={"type": "object"},
    topologyPolicy={"type": "string"},
)
VOLCANO_JOB = closed(
    apiVersion={"const": "batch.volcano.sh/v1alpha1"},
    kind={"const": "Job"},
    metadata={"type": "object"},
    spec=closed(
        maxRetry=COUNT,
        minAvailable=COUNT,
        minSuccess={"type": "integer", "minimum": 1},
        networkTopology={"type": "object"},
        plugins={"type": "object", "additionalProperties": {"type": "array", "items": {"type": "string"}}},
        policies=POLICIES,
        priorityClassName=NAME,
        queue=NAME,
        runningEstimate={"type": "string"},
        schedulerName={"type": "string", "maxLength": 63},
        tasks={"type": "array", "items": TASK},
        ttlSecondsAfterFinished=COUNT,
        volumes={"type": "array"},
    ),
)


def volcano_job(app: specs.AppDef) -> dict[str, Any]:
    """As it would be sent."""
    with warnings.catch_warnings(), get_runner() as runner:
        # TorchX's own, about retries in Volcano 1.4.
        warnings.filterwarnings("ignore", "\\s*Role train configured with restarts")
        wanted = {"queue": "default", "service_account": "me", "priority_class": "high"}
        made = runner.dryrun(app, "kubernetes", wanted).request.resource
    job: dict[str, Any] = client.ApiClient().sanitize_for_serialization(made)
    return job


def holds(whole: Any, part: Any) -> bool:
    """Whether a thing is as it was but for fields that were added with their defaults."""
    if isinstance(part, dict):
        return all(key in whole and holds(whole[key], value) for key, value in part.items())
    if isinstance(part, list):
        return len(whole) == len(part) and all(map(holds, whole, part))
    return bool(whole == part)


def assert_published(model: str, thing: dict[str, Any]) -> None:
    """That the published model takes it, and drops nothing of it that it does not know."""
    assert holds(getattr(published, model).from_dict(copy.deepcopy(thing)).to_dict(), thing)


@pytest.mark.parametrize("app", APPS, ids=lambda app: app.roles[0].name)
def test_a_volcano_job_is_what_its_schema_says(app: specs.AppDef) -> None:
    job, schema = volcano_job(app), jsonschema_rs.validator_for(VOLCANO_JOB)
    schema.validate(job)
    for task in job["spec"]["tasks"]:
        assert_published("IoK8sApiCoreV1PodTemplateSpec", task["template"])
    for wrong in ({"minAvailable": "2"}, {"maxRetries": 2}, {"queue": "My_Queue"}):
        with pytest.raises(jsonschema_rs.ValidationError):
            schema.validate({**job, "spec": {**job["spec"], **wrong}})


@pytest.mark.parametrize("app", APPS, ids=lambda app: app.roles[0].name)
def test_a_train_job_is_what_its_schema_says(app: specs.AppDef) -> None:
    job = trainjob.manifest(app)
    assert_published("TrainerV1alpha1TrainJob", job)
    wrong = copy.deepcopy(job)
    wrong["spec"]["trainer"]["numNodes"] = "two"
    with pytest.raises(ValueError, match="numNodes"):
        assert_published("TrainerV1alpha1TrainJob", wrong)
    wrong = copy.deepcopy(job)
    wrong["spec"]["trainer"]["nodes"] = 2
    with pytest.raises(AssertionError):
        assert_published("TrainerV1alpha1TrainJob", wrong)


def test_a_train_job_is_printed_with_the_options_of_the_component(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "c.toml", "--out", "/s/run", "-j", "2x8", "--gpu", "8", "--cpu", "96"]
    more = ["--max_retries", "2", "--mounts", "type=volume,src=claim,dst=/s", "--", "data.log=/s/log"]
    assert trainjob.main(["--runtime", "torch-gpu", "train", *words, *more]) == 0
    said = capsys.readouterr()
    assert "--max_retries has no effect" in said.err
    spec = yaml.safe_load(said.out)["spec"]
    assert spec["runtimeRef"] == {"name": "torch-gpu"}
    trainer = spec["trainer"]
    assert (trainer["numNodes"], trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]) == (2, "8")
    assert trainer["command"][:2] == ["bash", "-c"]
    (job,) = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert (job["name"], container["name"]) == ("node", "node")
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/dev/shm", "/s"]
    assert trainjob.main(["train", *words, "--name", "My_Job"]) == 2
    assert "--name My_Job: needs a-z" in capsys.readouterr().err


def test_torchrun_in_a_train_job_does_as_the_line_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer sets defaults of torchrun's options on each node, its address for the first node among them."""
    line = trainjob.manifest(APPS[0])["spec"]["trainer"]["command"][2].rpartition("torch.distributed.run ")[2]
    line = line.replace('"${PET_MASTER_ADDR:=localhost}:29500"', "tandemrec-node-0-0.tandemrec:29500")
    given = {"NNODES": "2", "NPROC_PER_NODE": "auto", "NODE_RANK": "1", "MASTER_PORT": "29400"}
    for name, value in {**given, "MASTER_ADDR": "tandemrec-node-0-0.tandemrec"}.items():
        monkeypatch.setenv(f"PET_{name}", value)
    words = re.findall(r"\S+", line.partition("launch.cli")[0] + "launch.cli")
    config, _, _ = config_from_args(get_args_parser().parse_args(words))
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (2, 2, 8)
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", "tandemrec-node-0-0.tandemrec:29500")
    assert (config.run_id, config.max_restarts) == ("tandemrec", 3)


def test_fewer_nodes_are_refused() -> None:
    with pytest.raises(JobError, match="one number of nodes"):
        trainjob.manifest(train(config="c", out="o", j="2:4x8"))

"""Prints the Kubeflow TrainJob (trainer.kubeflow.org/v1alpha1, Trainer v2) of a job of launch/components.py.

    python -m launch.trainjob train --config configs/dare.toml --out /shared/a -j 2x8 | kubectl create -f -

TorchX 0.7.0 has no scheduler for it. The options are the component's. The containers are run as the cluster's
training runtime says (`--runtime`); it must be one for torch, which tells the nodes the first one's address.
What is mounted is added to it by a patch, which Trainer has known since release 2.2. See docs/cluster.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

import yaml
from torchx.schedulers.kubernetes_scheduler import role_to_pod
from torchx.specs import AppDef, macros
from torchx.specs.builders import materialize_appdef

from launch import components
from launch.components import JobError
from launch.reporting import USER_ERROR

# Of the pods' names, which must be shorter than 64: NAME-node-0-NODE-xxxxx.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
# The job and the container that Trainer's own runtimes have (`AncestorTrainer`, `Node` in its constants).
_NODE = "node"
_VERBS = ("train", "evaluate", "export", "plan")


def manifest(app: AppDef, runtime: str = "torch-distributed") -> dict[str, Any]:
    """The TrainJob as Kubernetes reads it.

    Args:
        app: made by a component.
        runtime: a ClusterTrainingRuntime of the cluster.

    Raises:
        JobError: the name is none for Kubernetes, or the job may run on fewer nodes than it asks for.
    """
    if not _NAME.fullmatch(app.name):
        raise JobError(f"--name {app.name}: needs a-z, 0-9 and `-`, a letter first, at most 40 in all")
    asked = app.roles[0]
    if asked.min_replicas is not None and asked.min_replicas < asked.num_replicas:
        raise JobError(
            f"-j {asked.min_replicas}:{asked.num_replicas}x...: a TrainJob has one number of nodes"
        )
    # The name of the variable is Trainer's: what it sets are defaults of torchrun's options.
    values = macros.Values(img_root="", app_id=app.name, replica_id="0", rank0_env="PET_MASTER_ADDR")
    pod = _plain(role_to_pod(_NODE, values.apply(asked), service_account=None))["spec"]
    container = pod["containers"][0]
    patched = {
        "volumes": pod["volumes"],
        "containers": [{"name": _NODE, "volumeMounts": container["volumeMounts"]}],
    }
    jobs = [{"name": _NODE, "template": {"spec": {"template": {"spec": patched}}}}]
    template = {"spec": {"replicatedJobs": jobs}}
    patch = {"manager": "tandemrec", "trainingRuntimeSpec": {"template": template}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": app.name},
        "spec": {
            "runtimeRef": {"name": runtime},
            "trainer": {
                "image": container["image"],
                "command": container["command"],
                "env": container["env"],
                "numNodes": asked.num_replicas,
                "resourcesPerNode": container["resources"],
            },
            "runtimePatches": [patch],
        },
    }


def _plain(thing: Any) -> Any:
    from kubernetes.client import ApiClient

    return ApiClient().sanitize_for_serialization(thing)


def main(words: Sequence[str]) -> int:
    """Prints it as YAML; -> the exit code."""
    parser = argparse.ArgumentParser("python -m launch.trainjob", description=str(__doc__).splitlines()[0])
    parser.add_argument("--runtime", default="torch-distributed", help="the cluster's ClusterTrainingRuntime")
    parser.add_argument("verb", choices=_VERBS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="the component's, see its --help")
    given = parser.parse_args(words)
    try:
        app = materialize_appdef(getattr(components, given.verb), given.options)
        text = yaml.safe_dump(manifest(app, given.runtime), sort_keys=False)
    except ModuleNotFoundError as error:
        print(f"{error}: pip install --no-deps -r requirements/kubernetes.txt", file=sys.stderr)
        return USER_ERROR
    except JobError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    if app.roles[0].max_retries:
        print("--max_retries has no effect: the runtime's failurePolicy says how often", file=sys.stderr)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

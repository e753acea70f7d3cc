"""The scheduler that `torchx run -s slurm` takes: TorchX's own, mended where first jobs fail.

TorchX 0.7.0 asks `sacct` about a job, also right after it has submitted one. Where a cluster keeps no
accounts, `torchx run`, `status`, `log` and `list` would end in a traceback, the first of them with the job
submitted. Here the controller is asked (`squeue`), and `sacct` for what that has forgotten. Slurm's refusal
is shown as a message; what will not have its effect is said before a job is submitted, and where its output
will lie after that. pyproject.toml names this as an entry point. See docs/cluster.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchx.schedulers.api import AppDryRunInfo, DescribeAppResponse, ListAppResponse
from torchx.schedulers.slurm_scheduler import SLURM_STATES, SlurmBatchRequest, SlurmScheduler
from torchx.specs import AppDef, AppState, ReplicaStatus, Role, RoleStatus

from launch.components import CONFIG, JobError

_SACCT = ("sacct", "--noheader", "--parsable2", "--allocations")
_NAME = re.compile(r"[\w.-]+")
_FIELDS = ("job", "state", "name", "node", "why")
# It makes srun give each task a terminal of its own, for which progress bars then draw, into a file.
# Python's own buffering is off by PYTHONUNBUFFERED, which the script sets, too.
_TERMINAL = "export SLURM_UNBUFFEREDIO=1\n"
# At the end of its time a job gets SIGTERM, and after that no script of it runs that could start it again. If
# the signal is asked for earlier, only the ranks get it: they save, and the script goes on to --max_retries.
# Slurm may send it up to a minute before that.
_BEFORE_TIMEOUT_S = 120


class Request(SlurmBatchRequest):  # type: ignore[misc]
    """What is submitted."""

    def materialize(self) -> str:
        """The batch script."""
        return str(super().materialize()).replace(_TERMINAL, "")


class Slurm(SlurmScheduler):  # type: ignore[misc]
    """TorchX's scheduler for Slurm, with `squeue` where there is no `sacct`."""

    def _submit_dryrun(self, app: AppDef, cfg: Mapping[str, Any]) -> AppDryRunInfo[Request]:
        """The request for a job whose nodes' parts are named NAME-0, NAME-1, ... as `--name` says.

        Raises:
            JobError: a name that cannot be part of a file's name, mounts, or no configuration there.
        """
        if not _NAME.fullmatch(app.name):
            raise JobError(f"--name {app.name}: it names files, so use letters, digits, `_`, `.` and `-`")
        if any(role.mounts for role in app.roles):
            raise JobError("--mounts: Slurm has none; name paths on storage that all nodes share")
        for config in (role.metadata.get(CONFIG) for role in app.roles):
            # The nodes see the folders that this machine sees.
            if config is not None and not Path(config).is_file():
                raise JobError(f"--config {config}: no such file")
        app = replace(app, roles=[replace(role, name=app.name) for role in app.roles])
        made = super()._submit_dryrun(app, cfg).request
        if made.max_retries:
            for part in made.replicas.values():
                part.sbatch_opts["signal"] = f"TERM@{_BEFORE_TIMEOUT_S}"
        for line in [*_without_effect(app, made), *_without_accounts()]:
            print(f"slurm: {line}", file=sys.stderr)
        return AppDryRunInfo(Request(made.cmd, made.replicas, made.job_dir, made.max_retries), repr)

    def schedule(self, dryrun_info: AppDryRunInfo[Request]) -> str:
        """Submits it; -> the job's number.

        Raises:
            JobError: Slurm has refused it, or its commands are not here.
        """
        try:
            job = str(super().schedule(dryrun_info))
        except FileNotFoundError as error:
            where = "submit where Slurm's commands are, on a login node, say"
            raise JobError(f"{error.filename or error} not found: {where}") from None
        except subprocess.CalledProcessError:
            raise JobError(f"Slurm has refused the job, for the reason above. {_offered()}") from None
        request = dryrun_info.request
        folder, first = Path(request.job_dir or Path.cwd()), next(iter(request.replicas))
        stop = "to stop it, with a checkpoint" if "launch.cli train" in str(request) else "to stop it"
        print(
            f"slurm: job {job}; what its nodes print: {folder}/slurm-{job}-{first}.out and .err, so for each "
            f"node; what Slurm says of it: {folder}/slurm-{job}.out; {stop}: scancel {job}",
            file=sys.stderr,
        )
        return job

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """The states of the job's parts; None where Slurm knows no such job (any more)."""
        rows = _rows("--jobs", app_id)
        if not rows:
            return None
        parts = [(row["name"].rpartition("-"), _state(row["state"]), row["node"]) for row in rows]
        roles: dict[str, list[ReplicaStatus]] = {}
        for (role, _, at), state, node in parts:
            if role and at.isdecimal():
                status = ReplicaStatus(id=int(at), role=role, state=state, hostname=node)
                roles.setdefault(role, []).append(status)
        return DescribeAppResponse(
            app_id=app_id,
            roles=[Role(name=role, num_replicas=len(each), image="") for role, each in roles.items()],
            roles_statuses=[RoleStatus(role, each) for role, each in roles.items()],
            state=parts[0][1],
            msg=" ".join(word for word in (rows[0]["state"], rows[0]["why"]) if word != "None"),
        )

    def list(self) -> list[ListAppResponse]:
        """The user's jobs that the controller knows."""
        firsts = [row for row in _rows() if row["job"].partition("+")[2] in ("", "0")]
        return [ListAppResponse(row["job"].partition("+")[0], _state(row["state"])) for row in firsts]


def create_scheduler(session_name: str, **_: object) -> Slurm:
    """What TorchX calls."""
    return Slurm(session_name)


def _told(*command: str) -> tuple[str | None, str]:
    """What a command prints, None where it fails or is not there; and why."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None, f"{command[0]} not found"
    return (done.stdout if done.returncode == 0 else None), " ".join(done.stderr.split())


def _rows(*which: str) -> list[dict[str, str]]:
    """One row for each node's part of jobs, the first part first; without `which`, of all the user's jobs."""
    columns = "--format=%i|%T|%j|%N|%r"
    text, _ = _told("squeue", "--noheader", "--states=all", columns, *(which or ["--me"]))
    # The controller forgets a job some minutes after its end (MinJobAge).
    if which and not text:
        text, _ = _told(*_SACCT, "--format=JobID,State,JobName,NodeList", *which)
        text = "\n".join(f"{line}|None" for line in (text or "").splitlines())
    rows = [dict(zip(_FIELDS, line.split("|"), strict=True)) for line in (text or "").splitlines()]
    return sorted(rows, key=lambda row: [int(word) for word in re.findall(r"\d+", row["job"])])


def _state(text: str) -> AppState:
    # sacct says who has ended a job: `CANCELLED by 1000`. What is not in the table is on its way, or on its
    # way out (CONFIGURING, COMPLETING, STOPPED, ...).
    known: AppState | None = SLURM_STATES.get(text.split(maxsplit=1)[0])
    return AppState.RUNNING if known is None else known


def _without_accounts() -> Sequence[str]:
    text, why = _told(*_SACCT, "--jobs=1")
    if text is not None:
        return []
    kept, _ = _told("scontrol", "show", "config")
    age = re.search(r"MinJobAge\s*= (\d+) sec", kept or "")
    until = f"for {age[1]} s after its end" if age else "for a while after its end"
    return [
        f"no accounts are kept here ({why}): `torchx status`, `log` and `list` know a job only {until}; "
        "what became of it stands in its files"
    ]


def _without_effect(app: AppDef, made: SlurmBatchRequest) -> Iterator[str]:
    """What of the wish for a job does nothing on Slurm, or not what one may think."""
    role = app.roles[0]
    if role.min_replicas is not None and role.min_replicas < role.num_replicas:
        yield f"the least number of nodes has no effect: it starts on all {role.num_replicas} or not at all"
    if role.resource.memMB > 0 and not any("mem" in each.sbatch_opts for each in made.replicas.values()):
        yield "--memMB has no effect: the partition's nodes are configured without their memory"
    python = shutil.which("python")
    if python is None or Path(python).parent != Path(sys.executable).parent:
        there = f"`python` on your PATH is {python}" if python else "there is no `python` on your PATH"
        yield (
            f"{there}, and the nodes take that one; torchx runs in {Path(sys.executable).parent.parent}. "
            "Activate the environment that has tandemrec"
        )
    if not os.environ.get("SBATCH_EXPORT", "ALL").startswith("ALL"):
        yield "SBATCH_EXPORT keeps your environment from the nodes, which then find no tandemrec; unset it"


def _offered() -> str:
    """The partitions, with what their nodes have."""
    text, why = _told(
        "sinfo", "--noheader", "--format=%R: %D node(s) with %c cores, %m MB, %G, for at most %l"
    )
    if text is None:
        return f"sinfo fails, too: {why}"
    return "The partitions (-cfg partition=...): " + "; ".join(text.replace("(null)", "no GPUs").splitlines())

"""A Slurm of its own on machines apart (machines.py): one that controls and submits, and nodes that compute.

It is Debian's slurm-wlm as installed; only its configuration is written here. Each machine has a /run of its
own, where munged, slurmctld and slurmd keep their sockets, process ids, spool and state. So there may be
several such clusters at once, also beside a Slurm of the system's, and they leave nothing.

Why the settings are as they are:
* `proctrack/linuxproc`, `task/none`, `jobacct_gather/none`: control groups belong to the machine, not to us.
* `config_overrides`: the nodes have the cores and memory that are written here, whatever the hardware has.
* No accounting, as many a small cluster: no `sacct`, which `torchx status` and `torchx log` ask.
* Short timers, so that a test sees in seconds what takes minutes on a cluster.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.cluster.machines import SCRATCH, Network, network, wait_until
from tests.cluster.machines import obstacle as no_machines

HEAD = "head"
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "sinfo")


def obstacle() -> str | None:
    """Why there can be no Slurm here, and what to do; None where there can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found (Debian: apt-get install slurm-wlm munge)"
    if not Path("/etc/slurm").is_dir():
        return "/etc/slurm is missing, which Debian's slurm-wlm makes"
    return no_machines()


def configuration(nodes: Sequence[str], more: Mapping[str, str]) -> str:
    """The text of slurm.conf."""
    settings = {
        "ClusterName": "apart",
        "SlurmctldHost": HEAD,
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        # A requeued job waits for as long before it starts again; the default is 120 s.
        "AuthInfo": "cred_expire=5",
        "StateSaveLocation": "/run/slurmctld",
        "SlurmdSpoolDir": "/run/slurmd",
        "SlurmctldPidFile": "/run/slurmctld.pid",
        "SlurmdPidFile": "/run/slurmd.pid",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "SlurmdParameters": "config_overrides",
        "ReturnToService": "2",  # a node that comes back after it was down takes work again
        "SlurmdTimeout": "6",
        "SlurmctldTimeout": "10",
        "BatchStartTimeout": "20",
        "MessageTimeout": "5",
        "TCPTimeout": "2",
        "KillWait": "20",  # from SIGTERM to SIGKILL
        "MinJobAge": "300",
        # Jobs of several nodes are started by the backfill scheduler; the default is every 30 s.
        "SchedulerParameters": "bf_interval=1,sched_interval=1",
        **more,
    }
    lines = [f"{key}={value}" for key, value in settings.items()]
    lines += [f"NodeName={node} CPUs=2 RealMemory=4000 State=UNKNOWN" for node in nodes]
    lines += [f"PartitionName=all Nodes={','.join(nodes)} Default=YES State=UP MaxTime=10"]
    return "\n".join(lines) + "\n"


class Slurm:
    """The cluster; commands are given on its head."""

    def __init__(self, apart: Network, logs: Path, key: Path) -> None:
        self._apart, self._logs, self._key = apart, logs, key
        for name in apart.machines:
            self._start(name)

    def _start(self, name: str) -> None:
        machine, log = self._apart.machines[name], str(self._logs / f"munged-{name}.log")
        machine.run("mkdir", "-p", "/run/munge", "/run/slurmd", "/run/slurmctld")
        files = [
            f"--pid-file=/run/munge/{name}.pid",
            "--seed-file=/run/munge/seed",
            f"--key-file={self._key}",
        ]
        machine.run("munged", "--force", *files, f"--log-file={log}", "--num-threads=2")
        daemon = "slurmctld" if name == HEAD else "slurmd"
        machine.run(daemon, "-L", str(self._logs / f"{daemon}-{name}.log"))

    def boot(self, node: str, scratch: str = "64M") -> None:
        """Starts a node again that `power_cut` ended, or with another size of its disk."""
        self._apart.boot(node, scratch)
        self._start(node)

    def power_cut(self, node: str) -> None:
        """It is gone from one moment to the next, and no packet tells the others."""
        self._apart.cut(node)
        self._apart.machines[node].close()

    def kill(self, node: str, what: str) -> None:
        """SIGKILL for all processes of a node whose command line has these words."""
        self._apart.machines[node].kill(what)

    def fill(self, node: str) -> None:
        """Leaves no byte on the node's own disk."""
        self._apart.machines[node].run("dd", "if=/dev/zero", f"of={SCRATCH}/full", "bs=1M", check=False)

    def on_head(self, *command: str, **more: object) -> subprocess.CompletedProcess[str]:
        return self._apart.machines[HEAD].run(*command, **more)  # type: ignore[arg-type]

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of the first node's part."""
        text = self.on_head("scontrol", "show", "job", job).stdout.split("\n\n")[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait(self, job: str, *states: str, seconds: float = 60) -> str:
        wait_until(f"job {job} in {states}", lambda: self.state(job) in states, seconds, every=0.3)
        return self.state(job)


@contextmanager
def slurm(nodes: Sequence[str] = ("node-a", "node-b"), **settings: str) -> Iterator[Slurm]:
    with TemporaryDirectory(prefix="slurm-") as text:
        folder = Path(text)
        (folder / "etc").mkdir()
        (folder / "etc" / "slurm.conf").write_text(configuration(nodes, settings), encoding="utf-8")
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        with network([HEAD, *nodes], {folder / "etc": "/etc/slurm"}) as apart:
            cluster = Slurm(apart, folder, key)
            idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
            up = lambda: cluster.on_head(*idle, check=False).stdout.strip() == str(len(nodes))  # noqa: E731
            try:
                wait_until("all nodes are idle", up, 30)
                yield cluster
            except BaseException as error:
                for log in sorted(folder.glob("slurm*.log")):
                    error.add_note(f"--- {log.name}\n{log.read_text(encoding='utf-8')[-3000:]}")
                raise


if __name__ == "__main__":
    sys.exit(obstacle())

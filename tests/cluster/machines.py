"""Machines apart on this one: each has its own network, host name, processes and scratch disk.

They are Linux namespaces, so they need root and nothing else. What is shared is what a cluster shares: the
file system. A machine ends with the process that made it, whatever ends that, and takes with it all that runs
on it; nothing of it is left, neither names nor addresses nor mounts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

# A disk of the machine's own, as /scratch is on a cluster; it hides an empty folder that every system has.
SCRATCH = "/mnt"
TOOLS = ("unshare", "nsenter", "ip", "mount", "hostname", "pkill")


def obstacle() -> str | None:
    """Why there can be no machines here, and what to do; None where there can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        packages = "util-linux iproute2 mount hostname procps"
        return f"{', '.join(missing)} not found (Debian: apt-get install {packages})"
    tried = subprocess.run(
        [
            "unshare",
            "--mount",
            "--net",
            "--pid",
            "--uts",
            "--fork",
            "ip",
            "link",
            "add",
            "name",
            "probe",
            "type",
            "bridge",
        ],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    if tried.returncode:
        return f"it needs root and the right to make namespaces ({tried.stderr.strip()})"
    return None


def wait_until(what: str, happened: Callable[[], object], seconds: float, every: float = 0.1) -> None:
    """Raises TimeoutError where it has not happened within so many seconds."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError(f"after {seconds:.0f} s not yet: {what}")
        time.sleep(every)


class Machine:
    """One machine; `close` is a power cut: nothing on it says goodbye, and no packet tells the others."""

    def __init__(self, name: str, hosts: Path, scratch: str = "64M", binds: Mapping[Path, str] | None = None):
        """Starts it, without a network.

        Args:
            name: the host name.
            hosts: its /etc/hosts.
            scratch: size of its own disk, under SCRATCH.
            binds: folder -> where the machine sees it.
        """
        self.name = name
        kinds = ["--mount", "--net", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]
        steps = [
            f"hostname {name}",
            "mount -t tmpfs tmpfs /run",
            f"mount -t tmpfs -o size={scratch} tmpfs {SCRATCH}",
            f"mount --bind '{hosts}' /etc/hosts",
            *(f"mount --bind '{source}' {place}" for source, place in (binds or {}).items()),
            "ip link set lo up",
            "echo up",
            # bash waits here as the machine's first process, and buries what others leave. It ends when
            # nobody holds the other end any more.
            "read -r _",
        ]
        self._init = subprocess.Popen(
            ["unshare", *kinds, "bash", "-c", " && ".join(steps)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._init.stdout is not None
        if self._init.stdout.readline() != "up\n":
            self.close()
            raise RuntimeError(f"the machine {name} did not start")

    @property
    def pid(self) -> int:
        return self._init.pid

    def words(self, command: Sequence[str], cwd: Path | None = None) -> list[str]:
        """The command line that runs a command on this machine."""
        spaces = [f"--{kind}=/proc/{self.pid}/ns/{kind}" for kind in ("mount", "net", "uts")]
        spaces = [space.replace("ns/mount", "ns/mnt") for space in spaces]
        pids = f"--pid=/proc/{self.pid}/ns/pid_for_children"
        return ["nsenter", *spaces, pids, f"--wd={cwd or Path.cwd()}", "--", *command]

    def run(
        self,
        *command: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 60,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.words(command, cwd),
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{self.name}: {command} -> {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def start(
        self, *command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, **more: Any
    ) -> subprocess.Popen[str]:
        words, whole = self.words(command, cwd), {**os.environ, **(env or {})}
        return subprocess.Popen(words, env=whole, text=True, stdin=subprocess.DEVNULL, **more)

    def runs(self, what: str) -> bool:
        """Whether there is a process whose command line has these words."""
        return self.run("pgrep", "-f", f"python.*{what}", check=False).returncode == 0

    def kill(self, what: str) -> None:
        """SIGKILL for all processes whose command line has these words."""
        self.run("pkill", "-9", "-f", what)

    def close(self) -> None:
        self._init.kill()
        for stream in (self._init.stdin, self._init.stdout):
            if stream is not None:
                stream.close()
        self._init.wait(20)

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Network:
    """A switch in the first machine, with a cable to each other one."""

    def __init__(self, folder: Path, names: Sequence[str], binds: Mapping[Path, str] | None = None) -> None:
        self.address = {name: f"10.77.0.{at}" for at, name in enumerate(names, 1)}
        self._hosts, self._binds = folder / "hosts", binds
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.address.items())]
        self._hosts.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.machines: dict[str, Machine] = {}
        for name in names:
            self.boot(name)

    @property
    def switch(self) -> Machine:
        return next(iter(self.machines.values()))

    def boot(self, name: str, scratch: str = "64M") -> Machine:
        """Starts a machine, or starts it again."""
        if name in self.machines:
            self.machines.pop(name).close()
        machine = Machine(name, self._hosts, scratch, self._binds)
        self.machines[name] = machine
        if machine is self.switch:
            self._ip(machine, "link", "add", "switch", "type", "bridge")
            device = "switch"
        else:
            device = "eth0"
            # The kernel keeps a dead machine's network, as long as it has something to send there; it may
            # be gone by now, or go meanwhile.
            self._ip(self.switch, "link", "delete", f"to-{name}", check=False)
            peer = ["peer", "name", device, "netns", str(machine.pid)]
            self._ip(self.switch, "link", "add", f"to-{name}", "type", "veth", *peer)
            self._ip(self.switch, "link", "set", f"to-{name}", "master", "switch", "up")
        self._ip(machine, "address", "add", f"{self.address[name]}/24", "dev", device)
        self._ip(machine, "link", "set", device, "up")
        return machine

    def cut(self, name: str) -> None:
        """Pulls the machine's cable; it goes on and hears nothing."""
        self._ip(self.switch, "link", "set", f"to-{name}", "nomaster")

    def mend(self, name: str) -> None:
        self._ip(self.switch, "link", "set", f"to-{name}", "master", "switch")

    @staticmethod
    def _ip(machine: Machine, *words: str, check: bool = True) -> None:
        # In this process's own view of processes, so that a machine can be named by its first process.
        command = ["nsenter", f"--net=/proc/{machine.pid}/ns/net", "ip", *words]
        subprocess.run(command, check=check, timeout=20, stderr=None if check else subprocess.DEVNULL)

    def close(self) -> None:
        for machine in reversed(self.machines.values()):
            machine.close()


@contextmanager
def network(names: Sequence[str], binds: Mapping[Path, str] | None = None) -> Iterator[Network]:
    """Machines that reach each other by their names; `names[0]` holds the switch and must not be closed."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="machines-")))
        made = Network(folder, names, binds)
        stack.callback(made.close)
        yield made

"""Several hosts on one machine: Linux namespaces joined by a bridge, each with its own sshd.

A host has its own network, processes, name, /dev/shm and /tmp (where its home and all that Ray keeps are). The rest of the file
system, Python and its packages included, is the machine's. What is on the machine itself reaches the hosts, and they reach it at
``Network.address``. Everything goes when the block ends, and the hosts also when this process is killed.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = {"ip": "iproute2", "unshare": "util-linux", "setpriv": "util-linux", "sshd": "openssh-server", "rsync": "rsync"}
"""What a host is made with, and Debian's package of each."""

BOOT = """
set -e
hostname $NAME
mount --bind $FOLDER/passwd /etc/passwd
mount --bind $FOLDER/hosts /etc/hosts
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind $FOLDER/tmp /tmp
read linked  # the network is there
ip link set lo up
ip address add $ADDRESS/24 dev eth0
ip link set eth0 up
ip route add default via $GATEWAY  # it leads nowhere, but a host without one does not know its own address
exec $(command -v sshd) -D -e -f /tmp/sshd_config
"""

SSHD = """
HostKey /tmp/host_key
AuthorizedKeysFile /tmp/home/.ssh/authorized_keys
PermitRootLogin prohibit-password
StrictModes no
PidFile none
"""


def lacking() -> str | None:
    """What keeps this machine from having hosts, as a sentence, or none."""
    if os.geteuid() != 0:
        return "hosts in namespaces need root"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    packages = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program, path=path)})
    return (
        f"hosts in namespaces need programs that are not installed: apt-get install {' '.join(packages)}" if packages else None
    )


@dataclass(frozen=True)
class Host:
    """A running host."""

    name: str
    address: str
    home: Path  # of its root user, as seen from here; /tmp/home for itself
    interface: str  # the machine's end of its cable

    def unplug(self) -> None:
        """Cut it off from the network: it goes on, and nobody is told."""
        _run("ip", "link", "set", self.interface, "down")

    def plug_in(self) -> None:
        """Connect it again."""
        _run("ip", "link", "set", self.interface, "up")


@dataclass(frozen=True)
class Network:
    """Running hosts, and what leads to them."""

    address: str  # of the machine itself, for its hosts
    hosts: tuple[Host, ...]
    key: Path  # the private ssh key that all of them let in, as root


@contextmanager
def network(folder: Path, count: int) -> Iterator[Network]:
    """So many hosts, for the length of a ``with`` block. Raises ``OSError`` if the machine cannot have them."""
    if reason := lacking():
        raise OSError(reason)
    number = os.getpid() % 10_000  # so that two test runs do not meet
    subnet, bridge = f"10.{100 + number // 250}.{number % 250}", f"vlae{number}"
    key = folder / "key"
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    with ExitStack() as stack:
        _run("ip", "link", "add", bridge, "type", "bridge")
        stack.callback(_run, "ip", "link", "delete", bridge)
        _run("ip", "address", "add", f"{subnet}.1/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        hosts = tuple(
            stack.enter_context(_host(folder, f"host{place}", bridge, f"{subnet}.{10 + place}", f"{subnet}.1", key))
            for place in range(count)
        )
        yield Network(f"{subnet}.1", hosts, key)


@contextmanager
def _host(folder: Path, name: str, bridge: str, address: str, gateway: str, key: Path) -> Iterator[Host]:
    own = folder / name
    home = own / "tmp/home"
    (home / ".ssh").mkdir(parents=True)
    (own / "tmp").chmod(0o1777)
    shutil.copy(key.with_suffix(".pub"), home / ".ssh/authorized_keys")
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(own / "tmp/host_key"))
    (own / "tmp/sshd_config").write_text(SSHD)
    (own / "passwd").write_text(Path("/etc/passwd").read_text().replace(":/root:", ":/tmp/home:", 1))
    (own / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")  # as Debian's installer leaves it
    inside = {"NAME": name, "FOLDER": str(own), "ADDRESS": address, "GATEWAY": gateway}
    interface = f"{bridge}h{name[-1]}"
    separate = ["--net", "--mount", "--pid", "--fork", "--uts", "--ipc", "--mount-proc", "--kill-child"]
    with (own / "log").open("w") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *separate, "sh", "-c", BOOT],
            env={"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"} | inside,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while Path(f"/proc/{process.pid}/ns/net").readlink() == Path("/proc/self/ns/net").readlink():
            time.sleep(0.01)
        _run("ip", "link", "add", interface, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
        _run("ip", "link", "set", interface, "master", bridge, "up")
        assert process.stdin
        process.stdin.write(b"\n")
        process.stdin.close()
        _wait_for_sshd(process, address, own / "log")
        yield Host(name, address, home, interface)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _wait_for_sshd(process: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    deadline = time.monotonic() + 30
    while "listening" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise OSError(f"host {address} does not start: {log.read_text()}")
        time.sleep(0.05)


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise OSError(f"{' '.join(command)}: {error.stderr.strip()}") from None

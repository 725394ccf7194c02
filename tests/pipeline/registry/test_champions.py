"""The history of champions, from the tags that record it."""

from pipeline.registry import champions
from pipeline.registry.champions import PROMOTED, ROLLED_BACK


def changes(*each: tuple[str, int]) -> list[champions.ChampionChange]:
    tags = dict(champions.tag(number, how, version) for number, (how, version) in enumerate(each))
    return champions.read({"owner": "somebody", **tags})


def test_changes_are_read_in_their_order_and_other_tags_are_ignored() -> None:
    read = changes(*[(PROMOTED, version) for version in range(12)])
    assert [(change.how, change.version) for change in read] == [
        (PROMOTED, version) for version in range(12)
    ]


def test_repeated_rollbacks_go_further_back() -> None:
    history = [(PROMOTED, 1), (PROMOTED, 2), (PROMOTED, 3)]
    assert champions.previous(changes(*history), 3, {1, 2, 3}) == 2
    history.append((ROLLED_BACK, 2))
    assert champions.previous(changes(*history), 2, {1, 2, 3}) == 1
    history.append((ROLLED_BACK, 1))
    assert champions.previous(changes(*history), 1, {1, 2, 3}) is None


def test_a_deleted_version_is_skipped() -> None:
    history = changes((PROMOTED, 1), (PROMOTED, 2), (PROMOTED, 3))
    assert champions.previous(history, 3, {1, 3}) == 1

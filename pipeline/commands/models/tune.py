"""``vlae tune``: search over options of the model and its training; each trial is a ``train``.

The state of a search is stored as JSON in its folder: ``search.json`` identifies the search, and
``trials/NNNN.json`` has the point, status and results of a trial. A search resumes from these files
alone: Ray Tune runs the trials, but its own state is not read back.
"""

from typing import TYPE_CHECKING

from pipeline.commands import Command, follow_manifest
from pipeline.config.goals import QUANTITIES
from pipeline.config.search import TuneConfig
from pipeline.errors import UserError
from pipeline.values import JsonObject

if TYPE_CHECKING:
    from pipeline.registry.versions import Registry
    from pipeline.storage.base import Storage


def run(config: TuneConfig) -> JsonObject:
    """Search, then register the best models; returns the table of trials and the versions.

    A finished search is not run again; with a larger budget, it adds trials to those it has. A
    killed search resumes with the same command: finished trials are reused, and interrupted ones
    continue from their checkpoints. Raises UserError if another command works on the search.
    """
    from pipeline.search.trials import check
    from pipeline.storage import open_storage
    from pipeline.storage.claims import claimed

    storage = open_storage(_folder(config), config.storage.endpoint_url)
    check(config, storage)
    with claimed(storage, f"search {config.search_name}"):
        return _search(config, storage)


def _search(config: TuneConfig, storage: "Storage") -> JsonObject:
    from pipeline.cluster import connect
    from pipeline.registry.lineage import Data
    from pipeline.registry.tracking import TrackedRun, Tracking
    from pipeline.registry.versions import Registry
    from pipeline.search import report
    from pipeline.search.runner import search
    from pipeline.search.trial import Status
    from pipeline.search.trials import RECORD, Trials, shortfall, table

    registry = Registry(config.registry)
    trials = Trials.load(config, storage)
    reused = trials.next() is None
    parameters = {
        f"search.{key}": value for key, value in config.search_identity()["search"].items()
    }
    with Tracking(config.registry) as tracking:
        dataset = config.dataset
        data = Data(dataset.name, dataset.url, storage.read_json(RECORD)["manifest"])
        parent = TrackedRun(storage, config.search_name, dataset.name, parameters, data=data)
        tracking.follow(parent)
        if not reused:
            connect(config.cluster, config.storage)
            search(config, trials, tracking, parent)
    if not trials.rows:
        raise UserError(
            f"search.hours={config.search.hours} was over before a trial began; give the search"
            " more time"
        )
    failed = [trial for trial in trials.rows if trial.status is Status.failed]
    if len(failed) == len(trials.rows):
        raise UserError(
            f"all {len(failed)} trials of search {config.search_name} failed; the first with:"
            f" {failed[0].error}; to try them again, delete {storage.url}"
        )
    rows = table(config, trials.rows)
    result = {
        "name": config.search_name,
        "url": storage.url,
        "objectives": config.search.objectives,
        "constraints": config.search.constraints,
        "seconds": round(trials.seconds(), 1),
        "trials": rows,
        "registered": register(config, registry, rows),
        "shortfall": shortfall(config, rows),
        "report": report.write(config, storage, rows, trials.rows),
    }
    storage.write_json("result.json", result)
    return {**result, "reused": reused}


def register(config: TuneConfig, registry: "Registry", rows: list[JsonObject]) -> list[JsonObject]:
    """Register the best finished trials that satisfy all constraints.

    ``rows`` is ordered by ``table``. Returns name, version and run of each, the best first.
    """
    from pipeline.runs import Run

    candidates = [row for row in rows if row.get("feasible")]
    if not candidates:
        return []
    chosen = candidates[: config.register_best]
    # A new model's first version becomes its champion; later, the newest version becomes the
    # challenger. So the best is registered first for a new model, and last for an existing one.
    is_new = config.model_name not in {model.name for model in registry.models()}
    made = {}
    for row in chosen if is_new else chosen[::-1]:
        run = Run.at(config.storage.run_folder(row["run"]), config.storage.endpoint_url)
        number = registry.register(config.model_name, run)
        made[row["run"]] = {"name": config.model_name, "version": number, "run": row["run"]}
    return [made[row["run"]] for row in chosen]


COLUMNS = {
    "images": ",.0f",
    **{name: quantity.format for name, quantity in QUANTITIES.items()},
}
"""The columns of the printed table, each with the format of its numbers."""


def format_table(config: TuneConfig, rows: list[JsonObject]) -> str:
    """Format the trials as a table of text."""
    lines = [[*(key.partition(".")[2] for key in config.search.axes), *COLUMNS, "front", "status"]]
    for row in rows:
        shown = [format(row[name], form) if name in row else "" for name, form in COLUMNS.items()]
        lines.append(
            [
                *(str(row[key]) for key in config.search.axes),
                *shown,
                str(row.get("front", "")),
                row["status"],
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def format_result(config: TuneConfig, result: JsonObject) -> str:
    """Format the table of trials, the registered versions and the URL of the report."""
    how = " was finished already" if result["reused"] else ""
    lines = [f"search {result['name']}{how}", format_table(config, result["trials"])]
    lines += [
        f"registered: {made['name']} version {made['version']}" for made in result["registered"]
    ]
    if result["shortfall"]:
        lines.append(result["shortfall"])
    return "\n".join([*lines, f"report: {result['report']}"])


def _folder(config: TuneConfig) -> str:
    return f"{config.storage.root}/searches/{config.search_name}"


COMMAND = Command(TuneConfig, run, format_result, _folder, resumes=True, follow=follow_manifest)

"""``vlae tune``: a search over the decoder's window, the latent size, the prior's depth and others;
each trial is a ``train``.

What is known of a search is kept as JSON in its folder: ``search.json`` says what it is,
``trials/NNNN.json`` what each trial tries and what became of it. Nothing else is read back: Ray
Tune runs the trials, and what it keeps of them is not used again.
"""

from typing import TYPE_CHECKING

from pipeline.commands import Command
from pipeline.config.search import TuneConfig
from pipeline.errors import UserError
from pipeline.values import JsonObject

if TYPE_CHECKING:
    from pipeline.registry.versions import Registry


def run(config: TuneConfig) -> JsonObject:
    """Search, then register the best models. Returns the table of trials and what was registered.

    A finished search is not run again; with a larger budget it goes on from the trials that it had.
    One that was killed goes on with the same command: finished trials are taken as they are,
    interrupted ones continue from their checkpoints.
    """
    from pipeline.cluster import connect
    from pipeline.registry.tracking import TrackedRun, Tracking
    from pipeline.registry.versions import Registry
    from pipeline.search import report
    from pipeline.search.runner import search
    from pipeline.search.trial import Status
    from pipeline.search.trials import Trials, check, table
    from pipeline.storage import open_storage

    storage = open_storage(
        f"{config.storage.root}/searches/{config.search_name}", config.storage.endpoint_url
    )
    check(config, storage)
    registry = Registry(config.registry)
    trials = Trials.load(config, storage)
    reused = trials.next() is None
    parameters = {
        f"search.{key}": value for key, value in config.search_identity()["search"].items()
    }
    with Tracking(config.registry) as tracking:
        parent = TrackedRun(storage, config.search_name, config.dataset.name, parameters)
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
        "report": report.write(config, storage, rows, trials.rows),
    }
    storage.write_json("result.json", result)
    return {**result, "reused": reused}


def register(config: TuneConfig, registry: "Registry", rows: list[JsonObject]) -> list[JsonObject]:
    """Put the best finished trials that keep all constraints into the registry.

    ``rows``: as ``table`` orders them. Returns name, version and run of each, the best first.
    """
    from pipeline.runs import Run

    candidates = [row for row in rows if row.get("feasible")]
    if not candidates:
        return []
    chosen = candidates[: config.register_best]
    # The first version of all becomes the champion, of others the newest becomes the challenger:
    # this is to be the best.
    is_new = config.model_name not in {model.name for model in registry.models()}
    made = {}
    for row in chosen if is_new else chosen[::-1]:
        run = Run.at(f"{config.storage.root}/runs/{row['run']}", config.storage.endpoint_url)
        number = registry.register(config.model_name, run)
        made[row["run"]] = {"name": config.model_name, "version": number, "run": row["run"]}
    return [made[row["run"]] for row in chosen]


COLUMNS = {
    "images": ",.0f",
    "nll": ".2f",
    "rate_bits": ".1f",
    "distortion_nats": ".2f",
    "probe_accuracy": ".1%",
    "images_per_s": ",.0f",
}


def format_table(config: TuneConfig, rows: list[JsonObject]) -> str:
    """The trials as text."""
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
    """The table of trials, what was registered, and where the report is."""
    how = " was finished already" if result["reused"] else ""
    lines = [f"search {result['name']}{how}", format_table(config, result["trials"])]
    lines += [
        f"registered: {made['name']} version {made['version']}" for made in result["registered"]
    ]
    if not result["registered"]:
        wanted = " and ".join(config.search.constraints)
        reason = f"no finished trial keeps {wanted}" if wanted else "no trial ran to its end"
        lines.append(f"{reason}: nothing is registered")
    return "\n".join([*lines, f"report: {result['report']}"])


def _folder(config: TuneConfig) -> str:
    return f"{config.storage.root}/searches/{config.search_name}"


COMMAND = Command(TuneConfig, run, format_result, _folder)

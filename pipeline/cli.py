"""The command line: ``vlae COMMAND key=value ...``. It reads the configuration, calls the command, and says what came of it."""

import functools
import inspect
import os
import sys
import textwrap
from collections.abc import Callable
from enum import Enum
from typing import Any, NoReturn

from pipeline.config import COMMANDS, choices, compose, describe, load, options_of
from pipeline.errors import Interrupted, UserError

ACTIONS = {"registry": ("list", "show", "register", "compare", "promote", "rollback"), "data": ("inspect", "verify")}
"""What commands with several uses can do: the first word after the command."""


def console() -> NoReturn:
    """The ``vlae`` command."""
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        main(sys.argv[1], sys.argv[2:])
    if len(sys.argv) > 1 and sys.argv[1] not in ("-h", "--help", "help"):
        _fail(f"there is no command {sys.argv[1]!r}; use one of {', '.join(COMMANDS)}")
    try:
        print(overview(), flush=True)
    except BrokenPipeError:
        _stop_printing()
    sys.exit(0)


def main(command: str, arguments: list[str] | None = None) -> NoReturn:
    """Run one command, with the process's own arguments by default, and exit: 0 if all went well, 2 on a user's mistake."""
    arguments = sys.argv[1:] if arguments is None else arguments
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    try:
        if "-h" in own or "--help" in own:
            print(help_page(command), flush=True)
            sys.exit(0)
        sys.exit(HANDLERS[command](arguments) or 0)
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:  # whoever read what we print has seen enough
        _stop_printing()
        sys.exit(0)
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(interruption.code)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def _stop_printing() -> None:
    """Let nothing more be printed, not even what is still buffered, since nobody reads it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def _shard(arguments: list[str]) -> None:
    config = _load("shard", arguments)
    from pipeline import shard
    from pipeline.storage import open_storage

    result = shard.run(config)
    counts = ", ".join(f"{split['images']:,} {name}" for name, split in result["splits"].items())
    print(f"data set {config.dataset.name}{' was there already' if result['reused'] else ' written'}: {counts} images")
    if result["unreadable"] or result["duplicates"]:
        print(
            f"{result['unreadable']:,} unreadable, {result['duplicates']:,} duplicates: see {result['url']}/{shard.REPORT_KEY}"
        )
    open_storage(result["url"]).write_json("result.json", result)
    _name_result(result["url"])


def _index(arguments: list[str]) -> None:
    config = _load("index", arguments)
    from pipeline import index
    from pipeline.storage import open_storage

    result = index.run(config)
    counts = ", ".join(f"{split['images']:,} {name}" for name, split in result["splits"].items())
    print(f"data set {config.dataset.name}{' was there already' if result['reused'] else ' indexed'}: {counts} images")
    open_storage(result["url"], config.storage.endpoint_url).write_json("result.json", result)
    _name_result(result["url"])


def _data(arguments: list[str]) -> None:
    action = _action("data", arguments)
    config = _load("data", arguments[1:])
    from pipeline import data
    from pipeline.storage import open_storage

    result = data.run(action, config)
    open_storage(config.output).write_json("result.json", result)
    print(data.format_report(action, result))
    _name_result(config.output)
    if result.get("damaged"):
        raise UserError(f"{len(result['damaged'])} shards of {config.dataset.url} are damaged: see {config.output}/result.json")


def _plan(arguments: list[str]) -> None:
    config = load("plan", arguments)
    from pipeline import plan

    print(plan.format_table(plan.run(config)))
    _name_result(config.output)


def _train(arguments: list[str]) -> None:
    config = _load("train", arguments)
    from pipeline import train
    from pipeline.measure import with_error

    result = train.run(config)
    valid = result["valid"]
    print(
        f"run {result['name']}{' was finished already' if result['reused'] else ' finished'}: {valid['images']:,} images seen; "
        f"valid code length {with_error(valid, 'elbo_nats')} nats, rate {valid['rate_bits']:.1f} bits, "
        f"on {valid['num_images']:,} images"
    )
    print(f"next: vlae evaluate model={result['url']}")
    _name_result(result["url"])


def _tune(arguments: list[str]) -> None:
    config = _load("tune", arguments)
    from pipeline import tune

    result = tune.run(config)
    print(f"search {result['name']}{' was finished already' if result['reused'] else ''}")
    print(tune.format_table(config, result["trials"]))
    for made in result["registered"]:
        print(f"registered: {made['name']} version {made['version']}")
    print(f"report: {result['report']}")
    _name_result(result["url"])


def _evaluate(arguments: list[str]) -> None:
    config = _load("evaluate", arguments)
    from pipeline import evaluate

    result = evaluate.run(config)
    print(evaluate.format_report(result, config.split))
    print("\n".join(f"picture: {url}" for url in result["pictures"]))
    _name_result(config.output)


def _encode(arguments: list[str]) -> None:
    config = _load("encode", arguments)
    from pipeline import encode

    result = encode.run(config)
    print(
        f"codes of {result['images']:,} {config.split} images{' were there already' if result['reused'] else ' written'}: "
        f"{len(result['parts'])} Parquet files in {result['url']}/codes"
    )
    _name_result(config.output)


def _reconstruct(arguments: list[str]) -> None:
    config = _load("reconstruct", arguments)
    from pipeline import reconstruct

    print("\n".join(f"picture: {url}" for url in reconstruct.run(config)["pictures"]))
    _name_result(config.output)


def _sample(arguments: list[str]) -> None:
    config = _load("sample", arguments)
    from pipeline import sample

    print("\n".join(f"picture: {url}" for url in sample.run(config)["pictures"]))
    _name_result(config.output)


def _registry(arguments: list[str]) -> None:
    action = _action("registry", arguments)
    config = _load("registry", ["yes=true" if word == "--yes" else word for word in arguments[1:]])
    from pipeline import registry
    from pipeline.storage import open_storage

    open_storage(config.output).write_json("result.json", registry.run(action, config))
    _name_result(config.output)


def _theory(arguments: list[str]) -> None:
    config = load("theory", arguments)
    from pipeline import theory

    result = theory.run(config)
    print(theory.format_report(result))
    print(f"figure{' (made before)' if result['reused'] else ''}: {result['figure']}")
    _name_result(config.output)


def _serve_store(arguments: list[str]) -> int:
    divider = arguments.index("--") if "--" in arguments else len(arguments)
    config = load("serve-store", arguments[:divider])
    from pipeline import store

    return store.run(config, arguments[divider + 1 :])


def _demo(arguments: list[str]) -> None:
    config = load("demo", arguments)
    from pipeline import demo

    result = demo.run(config)
    print(demo.format_summary(result))
    _name_result(config.folder)


HANDLERS: dict[str, Callable[[list[str]], int | None]] = {
    "shard": _shard,
    "index": _index,
    "data": _data,
    "plan": _plan,
    "train": _train,
    "tune": _tune,
    "evaluate": _evaluate,
    "encode": _encode,
    "reconstruct": _reconstruct,
    "sample": _sample,
    "registry": _registry,
    "theory": _theory,
    "serve-store": _serve_store,
    "demo": _demo,
}


def _action(command: str, arguments: list[str]) -> str:
    if not arguments or arguments[0] not in ACTIONS[command]:
        raise UserError(f"vlae {command} needs one of {', '.join(ACTIONS[command])} as its first word")
    return arguments[0]


def _load(command: str, arguments: list[str]) -> Any:
    config = load(command, arguments)
    if config.storage.endpoint_url:
        # The one setting that every S3 client in here honours: boto3's, Arrow's and MLflow's.
        os.environ["AWS_ENDPOINT_URL"] = config.storage.endpoint_url
    return config


def _name_result(folder: str) -> None:
    print(f"result: {folder.rstrip('/')}/result.json")


# --- help --------------------------------------------------------------------------------------------------------------


def overview() -> str:
    """The text of ``vlae --help``."""
    lines = ["Variational Lossy Autoencoders: from images in object storage to models in a registry.", ""]
    lines += ["usage: vlae COMMAND [key=value ...]      vlae COMMAND --help lists a command's options", ""]
    for command, schema in COMMANDS.items():
        lines.append(f"  {command:<13}{inspect.getdoc(schema)}")
    return "\n".join([*lines, "", EXAMPLE])


EXAMPLE = """a first session:
  vlae demo                                 everything below at once, in ./demo
  vlae shard dataset=mnist                  images -> shards
  vlae train model.window=7x4               one model
  vlae tune search.num_trials=12            many models, the best into the registry
  vlae evaluate model=models:/vlae-mnist@champion"""

USAGE = {
    "data": "vlae data inspect | verify [key=value ...]",
    "registry": "vlae registry list | show name=NAME [version=N] | register name=NAME runs=[FOLDER,...]\n"
    "       vlae registry compare name=NAME [version=N] [against=VERSION]\n"
    "       vlae registry promote name=NAME [version=N] [alias=ALIAS] [--yes] | rollback name=NAME",
    "serve-store": "vlae serve-store [key=value ...] [-- COMMAND ...]\n"
    "       with a COMMAND: run it with the store's address and credentials in its environment, and stop with it",
}


def help_page(command: str) -> str:
    """The text of ``vlae COMMAND --help``."""
    schema = COMMANDS[command]
    doc = inspect.getdoc(schema)
    lines = [f"usage: {USAGE.get(command, f'vlae {command} [key=value ...]')}", "", str(doc), ""]
    groups = choices(command)
    if groups:
        lines.append("ready-made groups of options:")
        for group, default in groups.items():
            names = [f"{name} (default)" if name == default else name for name in options_of(group)]
            lines.append(f"  {group + '=':<12}{', '.join(names)}")
        lines.append("")
    lines.append("options:")
    values = _defaults(command)
    for key, item in describe(schema):
        value = values.get(key)
        head = f"  {key}={_show(value)}" if value is not None else f"  {key}="
        text = textwrap.fill(item.metadata["help"], 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines += [head, text]
    return "\n".join(lines)


def _defaults(command: str) -> dict[str, Any]:
    """The values that the options have if none is given; what must be given is left out."""
    from omegaconf import OmegaConf

    composed = OmegaConf.merge(OmegaConf.structured(COMMANDS[command]), compose(command)[0])
    plain = OmegaConf.to_container(composed, resolve=False)
    keys = [key for key, _ in describe(COMMANDS[command])]
    values = {key: functools.reduce(lambda part, name: part[name], key.split("."), plain) for key in keys}
    return {key: value for key, value in values.items() if value != "???"}


def _show(value: Any) -> str:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list):
        return "[" + ",".join(map(_show, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_show(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and " " in value:
        return f"'{value}'"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    console()

"""The command line, ``vlae COMMAND key=value ...``: load the options, run the command, tell its
result.
"""

import dataclasses
import os
import sys
from typing import NoReturn

from pipeline.commands import NAMES, find, load
from pipeline.errors import Interrupted, UserError, lack_of_memory
from pipeline.help import help_page, overview

RESULT = "result.json"


def console() -> NoReturn:
    """The ``vlae`` command."""
    main(sys.argv[1:])


def main(words: list[str]) -> NoReturn:
    """Run the command that ``words`` begin with on the others, and exit.

    Exit codes: 0 if all went well, 2 on a user's mistake, 128 + N after signal N, 130 after Ctrl-C.
    """
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(overview(), flush=True)
            sys.exit(0)
        if words[0] not in NAMES:
            raise UserError(f"there is no command {words[0]!r}; use one of {', '.join(NAMES)}")
        sys.exit(_run(words[0], words[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        reason = lack_of_memory(error)
        if reason is None:
            raise
        print(
            f"error: there is not enough memory ({reason}); use smaller images, batches or models,"
            " or a machine with more",
            file=sys.stderr,
        )
        sys.exit(2)
    except BrokenPipeError:
        # The reader closed the pipe, as `head` does. What is still buffered must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(interruption.code)
    except KeyboardInterrupt:
        resumes = words[0] in NAMES and find(words[0]).resumes
        continued = "; the same command continues from here" if resumes else ""
        print(f"interrupted{continued}", file=sys.stderr)
        sys.exit(130)


def _run(name: str, words: list[str]) -> int:
    """Run one command with its arguments; returns the exit code. Raises UserError."""
    divider = words.index("--") if "--" in words else len(words)
    own, rest = words[:divider], words[divider + 1 :]
    if "-h" in own or "--help" in own:
        print(help_page(name), flush=True)
        return 0
    command = find(name)
    if command.actions:
        if not own or own[0] not in command.actions:
            choices = ", ".join(command.actions)
            raise UserError(f"vlae {name} needs one of {choices} as its first word")
        own = [f"action={own[0]}", *own[1:]]
    config = load(name, [command.flags.get(word, word) for word in own])
    if rest:
        if not hasattr(config, "command"):
            raise UserError(f"vlae {name} takes no words after --")
        config = dataclasses.replace(config, command=rest)
    if hasattr(config, "storage"):
        config.storage.export()
    result = command.run(config)
    if isinstance(result, int):
        return result
    from pipeline.storage import open_storage

    folder = open_storage(command.folder(config))
    folder.write_json(RESULT, result)
    print(command.format(config, result))
    print(f"result: {folder.url}/{RESULT}")
    if problem := command.problem(result):
        raise UserError(problem)
    return 0

"""The errors that a command shows without a traceback."""


class UserError(Exception):
    """A mistake or problem that the user can solve.

    Its message is one sentence that names the file, key or object and says what to do. The command
    line prints it and exits with code 2.
    """


ALLOCATORS = ("out of memory", "allocate memory", "not enough memory", "Storage size")
"""What the messages of PyTorch's allocators say, whose errors have no type of their own."""


def lack_of_memory(error: BaseException) -> str | None:
    """What an error says about memory that could not be had; None if it is about another thing."""
    reason = str(error).partition("\n")[0].rstrip(".")
    if isinstance(error, MemoryError):
        return reason or "no more could be allocated"
    is_allocator = isinstance(error, RuntimeError) and any(word in reason for word in ALLOCATORS)
    return reason if is_allocator else None


def last_line(error: BaseException) -> str:
    """The last line of an error's message, which names the cause in one that quotes a traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


class DamagedData(UserError):
    """Stored data is missing, altered or unreadable; reading it again would not help."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped a command, which has saved its work so that it can resume.

    The command line prints the sentence and exits with 128 + the signal's number, as shells do.
    """

    def __init__(self, sentence: str, signal_number: int) -> None:
        super().__init__(sentence)
        self.code = 128 + signal_number

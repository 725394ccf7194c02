"""The one kind of error that a command shows without a traceback."""


class UserError(Exception):
    """Something the user can mend: one sentence that names the file, key or object, and says what
    to do.

    The command line prints it and exits with code 2.
    """


class DamagedData(UserError):
    """Stored data is missing, altered or cannot be understood, however often it is read."""


class Interrupted(KeyboardInterrupt):
    """A command was told to stop by a signal, and has put its work where it can go on from: one
    sentence, and the signal's number.

    The command line prints it and exits with 128 + that number, as shells do.
    """

    def __init__(self, sentence: str, signal_number: int) -> None:
        super().__init__(sentence)
        self.code = 128 + signal_number

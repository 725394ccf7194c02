"""The errors that a command shows without a traceback."""


class UserError(Exception):
    """A mistake or problem that the user can solve.

    Its message is one sentence that names the file, key or object and says what to do. The command
    line prints it and exits with code 2.
    """


class DamagedData(UserError):
    """Stored data is missing, altered or unreadable; reading it again would not help."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped a command, which has saved its work so that it can resume.

    The command line prints the sentence and exits with 128 + the signal's number, as shells do.
    """

    def __init__(self, sentence: str, signal_number: int) -> None:
        super().__init__(sentence)
        self.code = 128 + signal_number

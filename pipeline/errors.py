"""The one kind of error that a command shows without a traceback."""


class UserError(Exception):
    """Something the user can mend: one sentence that names the file, key or object, and says what to do.

    The command line prints it and exits with code 2.
    """


class DamagedData(UserError):
    """Stored data is missing, altered or cannot be understood, however often it is read."""

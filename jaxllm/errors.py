"""What can go wrong in a run, and the exit code each kind ends the process with.

A script catches `RunError`, prints its one line and exits with its code; anything else is a bug
and keeps its traceback.
"""


class RunError(Exception):
    """A failure the user can mend; the message is one line that names the field and the mend."""

    exit_code = 1


class ConfigError(RunError):
    """A bad flag, field or combination of fields."""

    exit_code = 78


class DataError(RunError):
    """A file, row, token or tokenizer that cannot be used."""

    exit_code = 78


class CheckpointError(RunError):
    """A checkpoint that is missing, damaged, of another run, or could not be written."""


class NumericsError(RunError):
    """Too many steps in a row whose loss or gradient was not finite."""

    exit_code = 70


class Stopped(RunError):
    """A signal asked for the end; everything is saved."""

    exit_code = 75

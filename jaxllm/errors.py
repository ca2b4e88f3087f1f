"""The errors of a run, and the exit code of the process for each.

A script catches `RunError`, prints its one line and exits with its code; any other exception is a bug
and keeps its traceback.
"""


class RunError(Exception):
    """A failure that the user can fix; the message is one line that names the field and the fix."""

    exit_code = 1


class ConfigError(RunError):
    """A bad flag, field or combination of fields."""

    exit_code = 78


class DataError(RunError):
    """A file, row, token or tokenizer that cannot be used."""

    exit_code = 78


class CheckpointError(RunError):
    """A checkpoint that is missing, damaged, of another run, or cannot be written."""


class NoCheckpoint(CheckpointError):
    """A path to a checkpoint that leads to none."""

    exit_code = 78


class NumericsError(RunError):
    """Numbers that training cannot continue with, such as a loss that stays not finite."""

    exit_code = 70


class Stopped(RunError):
    """The run stopped because of a signal; everything is saved."""

    exit_code = 75


class ProcessLost(RunError):
    """Another process of the run does not respond."""

    exit_code = 71

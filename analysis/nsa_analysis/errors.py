"""Errors that a user can correct. Functions raise them; the command line prints them and exits."""

USAGE, FILE = 2, 6  # exit codes, the same as those of `nsa`


class AnalysisError(Exception):
    """Input that cannot be analysed. Message: `<problem> (<reason>); <what to do>`."""

    code = USAGE


class FileError(AnalysisError):
    """A file that is not a readable result of nsa. The message names the file."""

    code = FILE


class LeftOut(UserWarning):
    """Points that a table does not show or compare. The command line prints these warnings on stderr."""

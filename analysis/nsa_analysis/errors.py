"""What a user can mend. The command line prints it and exits; functions raise it."""

USAGE, FILE = 2, 6  # exit codes, as those of `nsa`


class AnalysisError(Exception):
    """Input that cannot be analysed: `<what> (<why>); <what to do>`."""

    code = USAGE


class FileError(AnalysisError):
    """A file that is no readable result of nsa; the message names it."""

    code = FILE

"""Files that a command writes: none of them is a file that it reads, another one that it writes, or HDF5."""

import contextlib
import itertools
import os
import shutil

from .errors import FileError

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
OPTIONS = ("csv", "json", "figure", "output", "machine")


def check_outputs(options):
    """Raises FileError before anything is read if an output of the command line would replace one of those."""
    if "" in options.files:
        raise FileError("a name of FILES is empty; name a file")
    written = [(f"--{name}", path) for name in OPTIONS if (path := getattr(options, name, None)) is not None]
    tables = ("--csv", "--json") if options.name != "export" else ("--csv", "--json", "--output")
    written = [(option, path) for option, path in written if path != "-" or option not in tables]
    for option, path in written:
        if not path:
            raise FileError(f"{option} is empty; name a file")
        if path == "-":
            raise FileError(f"{option} - (no standard output here); name a file, ./- if it is called so")
        if any(same_file(path, read) for read in options.files):
            raise FileError(f"cannot write {path} (it is an input); choose another {option}")
        if os.path.isfile(path):
            with open(path, "rb") as file:
                if file.read(len(HDF5_SIGNATURE)) == HDF5_SIGNATURE:
                    raise FileError(f"cannot write {path} (it is an HDF5 file); choose another {option}")
    for (option, path), (other, second) in itertools.combinations(written, 2):
        if same_file(path, second):
            raise FileError(f"{option} and {other} name one file ({path}); choose another {other}")


@contextlib.contextmanager
def replacing(path):
    """A text file to write in UTF-8, which names of files in it may not be. When it is whole it takes the place of the
    one that is there: a full disk loses nothing. An OSError names the path."""
    target = os.path.realpath(path)
    plain = os.path.isfile(target) or not os.path.exists(target)
    partial = f"{target}.{os.getpid()}.tmp" if plain else target
    try:
        with open(partial, "w", encoding="utf-8", errors="replace", newline="") as file:
            yield file
        if plain:
            if os.path.exists(target):
                shutil.copymode(target, partial)
            os.replace(partial, target)
    except BaseException as error:
        if plain:
            with contextlib.suppress(OSError):
                os.unlink(partial)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def same_file(a, b):
    """Whether both paths name one file, also one that is not there yet."""
    if os.path.exists(a) and os.path.exists(b):
        return os.path.samefile(a, b)
    return os.path.realpath(a) == os.path.realpath(b)

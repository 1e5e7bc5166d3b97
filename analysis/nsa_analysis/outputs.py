"""Files that a command writes: none of them is a file that it reads, another one that it writes, or HDF5."""

import itertools
import os

from .errors import FileError

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
OPTIONS = ("csv", "json", "figure", "output", "machine")


def check_outputs(options):
    """Raises FileError before anything is read if an output of the command line would replace one of those."""
    written = [(f"--{name}", path) for name in OPTIONS if (path := getattr(options, name, None)) not in (None, "-")]
    for option, path in written:
        if not path:
            raise FileError(f"{option} is empty; name a file")
        if any(same_file(path, read) for read in options.files):
            raise FileError(f"cannot write {path} (it is an input); choose another {option}")
        if os.path.isfile(path):
            with open(path, "rb") as file:
                if file.read(len(HDF5_SIGNATURE)) == HDF5_SIGNATURE:
                    raise FileError(f"cannot write {path} (it is an HDF5 file); choose another {option}")
    for (option, path), (other, second) in itertools.combinations(written, 2):
        if same_file(path, second):
            raise FileError(f"{option} and {other} name one file ({path}); choose another {other}")


def same_file(a, b):
    """Whether both paths name one file, also one that is not there yet."""
    if os.path.exists(a) and os.path.exists(b):
        return os.path.samefile(a, b)
    return os.path.realpath(a) == os.path.realpath(b)

"""Independent calls on all cores."""

import concurrent.futures
import multiprocessing
import os
import sys
import threading
import warnings

from ..errors import LeftOut

MOST = 8  # processes
_work = None  # (function, calls) that a forked process finds


def parallel(function, calls):
    """[function(*arguments) for arguments in calls], on all cores where processes can be forked.

    A process with other threads, such as a notebook, is not forked, since a lock that a thread holds would stay closed.
    Fork hands the arguments over without copying them; results are pickled. LeftOut warnings of the calls are repeated
    here. Raises the first error.
    """
    global _work
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    busy = _work is not None or threading.active_count() > 1  # the first: inside a call, whose process has one core
    if busy or cores < 2 or len(calls) < 2 or not sys.platform.startswith("linux"):
        return [function(*arguments) for arguments in calls]
    _work = function, calls
    try:
        context = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(min(cores, len(calls), MOST), context) as pool:
            answers = list(pool.map(_run, range(len(calls))))
    finally:
        _work = None
    for _, lines in answers:
        for line in lines:
            warnings.warn(line, LeftOut, stacklevel=2)
    return [answer for answer, _ in answers]


def _run(i):
    """(result, texts of the LeftOut warnings) of call number i."""
    function, calls = _work
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*calls[i])
    return result, [str(w.message) for w in caught if issubclass(w.category, LeftOut)]

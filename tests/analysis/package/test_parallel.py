"""Calls on several cores: results in order, warnings and errors as if there were one."""

import os
import threading
import warnings

import nsa_analysis
import pytest
import synthetic
from nsa_analysis.data import parallel, reading
from nsa_analysis.errors import FileError, LeftOut


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: {0, 1})


def work(i):
    if i == 3:
        raise FileError("third.h5: cannot be read")
    warnings.warn(f"left out by {i}", LeftOut, stacklevel=1)
    return i * i, os.getpid()


def test_results_and_warnings(two_cores):
    with pytest.warns(LeftOut) as caught:
        found = parallel.parallel(work, [(0,), (1,), (2,)])
    assert [value for value, _ in found] == [0, 1, 4] and os.getpid() not in {pid for _, pid in found}
    assert [str(w.message) for w in caught] == ["left out by 0", "left out by 1", "left out by 2"]


@pytest.mark.filterwarnings("ignore::nsa_analysis.errors.LeftOut")
def test_the_first_error_is_raised(two_cores):
    with pytest.raises(FileError, match="third.h5") as raised:
        parallel.parallel(work, [(i,) for i in range(5)])
    assert raised.value.code == 6
    assert [value for value, _ in parallel.parallel(work, [(1,), (2,)])] == [1, 4]  # and the next call works


@pytest.mark.filterwarnings("ignore::nsa_analysis.errors.LeftOut")
def test_a_process_with_threads_is_not_forked(two_cores):
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert {pid for _, pid in parallel.parallel(work, [(0,), (1,)])} == {os.getpid()}
    finally:
        stop.set()
        thread.join()


def test_a_file_in_parts_is_the_file(two_cores, tmp_path, monkeypatch):
    points = [synthetic.point(synthetic.times(1, 8, 1e-4), run_context=64 * (i + 1)) for i in range(7)]
    path = synthetic.write(tmp_path / "a.h5", points)
    whole = reading.read_file(path)
    monkeypatch.setattr(reading, "LARGE", os.path.getsize(path) // 4)
    parts = nsa_analysis.read(path)
    assert [p.parameters for p in parts] == [p.parameters for p in whole] and len(parts) == 7
    assert [p.index for p in parts] == list(range(7))

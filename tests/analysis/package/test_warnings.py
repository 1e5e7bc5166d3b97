"""Warnings of the report. Each test changes a file so that exactly one warning applies."""

import h5py
import numpy as np
import pytest
import synthetic
from nsa_analysis.data.reading import read
from nsa_analysis.report.report_warnings import common_folder, warnings


def warnings_of_two_ranks(path, attributes=(), **columns):
    synthetic.write(path, [synthetic.point(synthetic.times(2, 11, 50e-6), 2, 1)])
    with h5py.File(path, "r+") as file:
        file.attrs.update(dict(attributes))
        for name, values in columns.items():
            if name in file["system"]:
                del file["system"][name]
            file["system"][name] = np.array(values)
            file["system"][name].dims[0].attach_scale(file["system"]["rank"])
    return "\n".join(warnings(read([path])))


def test_no_warning(tmp_path):
    assert warnings_of_two_ranks(tmp_path / "a.h5", threads=[1, 1], sharers=[2, 2], cores=[2, 2]) == ""


@pytest.mark.parametrize(
    ("attributes", "columns", "text"),
    [
        ({"backend": "host"}, dict(threads=[1, 1], sharers=[4, 4], cores=[2, 2]), "(4 ranks of 1 on 2)"),
        ({"git_commit": "c0ffee-dirty"}, {}, "commit c0ffee-dirty"),
        ({"status": "interrupted"}, {}, "status interrupted"),
        ({"resumed": 2}, {}, "was resumed 2 times"),
        ({}, dict(clock_mhz_before=[1980.0, 1980.0], clock_mhz_after=[1980.0, 1500.0]), "clocks changed by 24%"),
        ({}, dict(ecc_after=[0, 3]), "uncorrected memory errors (ECC), up to 3"),
    ],
)
def test_warning(tmp_path, attributes, columns, text):
    assert text in warnings_of_two_ranks(tmp_path / "a.h5", attributes, **columns)


def test_a_noisy_point_is_named(tmp_path):
    path = synthetic.write(tmp_path / "a.h5", [synthetic.point(synthetic.times(1, 11, 50e-6))])
    with h5py.File(path, "r+") as file:
        file["points/0000"].attrs["noisy"] = "total: steal of 12%"
    (text,) = warnings(read([path]))
    assert "point 0 (context 64K, batch 1, 1x1): NOISY: total: steal of 12%" in text


@pytest.mark.parametrize(
    ("paths", "folder"),
    [
        (["r/h100/a.h5", "r/h200/a.h5"], "r/"),
        (["/r/h100/a.h5", "/r/h200/a.h5"], "/r/"),
        (["/r/a.h5", "r/a.h5"], ""),
        (["/a.h5", "/b/a.h5"], ""),
        (["a.h5", "a1.h5"], ""),
        (["r/a.h5"], ""),
    ],
)
def test_files_are_named_within_the_folder_that_holds_them(paths, folder):
    assert common_folder(paths) == folder


def test_warnings_name_files_within_their_folder(tmp_path):
    paths = synthetic.sweep(tmp_path, layouts=[(1, 1), (2, 1)], status="running")
    (text,) = warnings(read(paths))
    status = "status running: the run did not complete; the points that it wrote are included"
    assert text == f"2 times (h1k1.h5, …): {status}"

"""Every file of docs/results is read, by the package and by xarray. Earlier versions of the program wrote them."""

import pathlib

import h5py
import nsa_analysis
import numpy as np
import pytest
import xarray
from nsa_analysis.data.reading import COMPUTE_STAGES, STAGES

RESULTS = pathlib.Path(__file__).resolve().parents[3] / "docs/results"
FILES = sorted(RESULTS.rglob("*.h5"))


@pytest.fixture(scope="module", params=FILES, ids=lambda f: f.relative_to(RESULTS).as_posix())
def file(request):
    """(path, points) of one file."""
    return request.param, nsa_analysis.read(request.param)


def test_there_are_files_of_every_backend():
    assert {f.parent.name for f in FILES} == {"h100", "h200", "host"}


def test_tables(file):
    """Every point has its row in each table that its task fills."""
    path, points = file
    with h5py.File(path) as raw:
        assert len(points) == len(raw["points"])
    table = nsa_analysis.points_table(points)
    assert len(table) == len(points) and set(table.validity) == {"VALID"}
    kernels = [p for p in points if p.kernels]
    assert len(nsa_analysis.kernels(kernels)) == sum(len(p.kernels) for p in kernels)
    timed = [p for p in points if p.modes]
    assert len(timed) + len(kernels) == len(points)
    if not timed:
        return
    assert (table.loc[[p.modes != {} for p in points], "median"] > 0).all()
    for make in nsa_analysis.branches, nsa_analysis.ranks, nsa_analysis.roofline, nsa_analysis.scaling:
        frame = make(timed)
        assert frame.groupby(["file", "point"], observed=True).ngroups == len(timed), make.__name__
    reads = nsa_analysis.reads(timed)
    assert (reads.counted == reads.expected).all() and len(reads) == 4 * len(timed)
    assert set(nsa_analysis.stages_table(timed).stage) <= set(STAGES)


def test_xarray(file):
    """xarray opens the first point with named dimensions and gives the medians of the tables."""
    path, points = file
    group = "points/0000/kernels" if points[0].kernels else "points/0000"
    data = xarray.open_dataset(path, group=group, engine="h5netcdf")
    if points[0].kernels:
        assert data.time.dims == ("implementation", "rank", "rep")
        assert set(data.implementation.values) == set(points[0].kernels)
        return
    assert data.time.dims == ("mode", "stage", "rank", "rep") and data.attrs["validity"] == "VALID"
    measured = data.time.isel(rep=slice(data.attrs["warmup_reps"], None)).sel(
        mode="branches", stage=list(COMPUTE_STAGES)
    )
    medians = measured.max("rank").median("rep").values
    frame = nsa_analysis.branches(points[:1]).set_index("stage")["median"].reindex(COMPUTE_STAGES)
    np.testing.assert_allclose(medians, frame, rtol=1e-12)

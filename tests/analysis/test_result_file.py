"""The result file opens in h5py, xarray (both engines) and pandas with named dimensions and units. All of them can read
its types, and docs/SCHEMA.md names everything in it.

Environment: NSA, the program; MPIEXEC, which launches it; NSA_WRITE_SAMPLE, which writes a file with every field
set.
"""

import os
import pathlib
import re
import resource
import shutil
import subprocess
import tempfile
import unittest
import warnings

import h5py
import numpy as np
import pandas as pd
import xarray as xr

ROOT = pathlib.Path(__file__).resolve().parents[2]
INPUT = """
[task]
kind = "decode"
[model]
dim = 64
d_k = 16
d_v = 16
precision = "fp32"
[run]
backend = "host"
context = [96, 128]
steps = 8
warmup = 2
[output]
tensors = true
"""
STAGES = "project append compress attend_cmp rank attend_sel attend_win combine output comm step".split()


def make_files(folder):
    """The sample with every field set, a real run on four ranks, and a needle run."""
    files = {kind: folder / f"{kind}.h5" for kind in ("sample", "real", "needle")}
    subprocess.run([os.environ["NSA_WRITE_SAMPLE"], files["sample"]], check=True)
    (folder / "input.toml").write_text(INPUT)
    run = [os.environ["NSA"], "run", folder / "input.toml", "--output"]
    subprocess.run([os.environ["MPIEXEC"], "-n", "4", *run, files["real"]], check=True, stdout=subprocess.DEVNULL)
    needle = ["--set", "task.kind='needle'", "--set", "run.context=4096", "--set", "output.tensors=false"]
    subprocess.run([*run, files["needle"], *needle], check=True, stdout=subprocess.DEVNULL)
    return files


def groups_of(path):
    """Every group with datasets."""
    found = set()
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.add(item.parent.name) if isinstance(item, h5py.Dataset) else None)
    return sorted(found)


def items_of(file):
    """The root group and everything below it."""
    items = [file]
    file.visititems(lambda name, item: items.append(item))
    return items


def is_readable(dtype):
    return h5py.check_string_dtype(dtype) is not None or (
        dtype.kind in "if" and h5py.check_enum_dtype(dtype) is None and dtype.names is None)


class ResultFile(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = pathlib.Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.files = make_files(cls.folder)

    def for_each_item(self, check):
        for kind, path in self.files.items():
            with h5py.File(path) as file:
                for item in items_of(file):
                    with self.subTest(file=kind, item=item.name):
                        check(item)

    def test_types_are_plain(self):
        def check(item):
            if isinstance(item, h5py.Dataset):
                self.assertTrue(is_readable(item.dtype), item.dtype)
            for name in item.attrs:
                if name not in ("DIMENSION_LIST", "REFERENCE_LIST"):  # references of dimension scales, written by HDF5
                    self.assertTrue(is_readable(item.attrs.get_id(name).dtype), name)
        self.for_each_item(check)

    def test_datasets_have_units_long_name_and_named_dimensions(self):
        def check(item):
            if not isinstance(item, h5py.Dataset):
                return
            self.assertTrue(item.attrs["units"])
            self.assertTrue(item.attrs["long_name"])
            if item.is_scale:
                self.assertEqual(item.attrs["NAME"].decode(), item.name.rsplit("/", 1)[1])
                return
            for length, dimension in zip(item.shape, item.dims):
                self.assertEqual(len(dimension), 1)
                self.assertEqual(dimension[0].shape, (length,))
                self.assertEqual(dimension[0].parent, item.parent)  # xarray opens a group at a time
        self.for_each_item(check)

    def test_xarray_engines_agree_with_h5py(self):
        for kind, path in self.files.items():
            for group in groups_of(path):
                with self.subTest(file=kind, group=group), warnings.catch_warnings():
                    warnings.simplefilter("error")
                    by = {e: xr.open_dataset(path, group=group, engine=e).load() for e in ("h5netcdf", "netcdf4")}
                    xr.testing.assert_identical(by["h5netcdf"], by["netcdf4"])
                    data = by["netcdf4"]
                    self.assertFalse([d for d in data.dims if "phony" in d])
                    self.assertEqual(set(data.dims), set(data.coords))
                    with h5py.File(path) as file:
                        datasets = {name for name, item in file[group].items() if isinstance(item, h5py.Dataset)}
                        self.assertEqual(set(data.variables), datasets)
                        for name, variable in data.variables.items():
                            raw = file[group][name]
                            raw = raw.asstr()[()].astype(str) if h5py.check_string_dtype(raw.dtype) else raw[()]
                            np.testing.assert_array_equal(variable.values, raw)

    def test_labels(self):
        for kind in ("sample", "real"):
            for engine in ("h5netcdf", "netcdf4"):
                with self.subTest(file=kind, engine=engine):
                    point = xr.open_dataset(self.files[kind], group="points/0000", engine=engine)
                    self.assertEqual(point.time.dims, ("mode", "stage", "rank", "rep"))
                    self.assertEqual(list(point.stage.values), STAGES)
                    self.assertEqual(list(point["mode"].values), ["branches", "total"])
                    self.assertEqual(list(point.branch.values), ["cmp", "sel", "win"])
                    self.assertEqual(point.time.attrs["units"], "s")
                    self.assertTrue((point.time.sel(mode="total", stage="step") > 0).all())
                    self.assertEqual(point.attrs["validity"], "VALID")

    def test_sample_values(self):
        point = xr.open_dataset(self.files["sample"], group="points/0001", engine="h5netcdf")
        self.assertEqual(point.attrs["run.context"], 256)
        self.assertEqual(point.attrs["validity"], "INVALID")
        self.assertEqual(list(point.attrs["routes"]), ["sdpa", "fused", "flash"])
        self.assertEqual(point.attrs["fallbacks"].split("\n")[1], "win: flash -> sdpa: failed (1)")
        self.assertAlmostEqual(float(point.time.sel(mode="total", stage="append", rank=1, rep=2)), 77.001)
        self.assertTrue(np.isnan(point.time.values.flat[5]))
        self.assertEqual(int(point.reads.sel(branch="win", rank=0, step=1)), 117)
        with h5py.File(self.files["sample"]) as file:
            self.assertEqual(file.attrs["status"], "complete")
            self.assertEqual(len(file.attrs["input_toml"].encode()), 70029)
            self.assertEqual(file["points/0000/tensors"].attrs["first_position"], 128)

    def test_needle(self):
        table = xr.open_dataset(self.files["needle"], group="points/0000/needle", engine="netcdf4").to_dataframe()
        self.assertEqual(list(table.index), [0.0, 0.25, 0.5, 0.75, 1.0])
        self.assertTrue((table.found == 1).all())

    def test_ranks(self):
        point = xr.open_dataset(self.files["real"], group="points/0000", engine="netcdf4")
        self.assertEqual(point.attrs["heads"] * point.attrs["kv"], 4)
        self.assertEqual(list(point["rank"].values), [0, 1, 2, 3])
        np.testing.assert_array_equal(point.reads, point.reads_expected)
        # The last step is at position 96 + 8 - 1: two eligible blocks; one sequence, two groups.
        self.assertEqual(list(point.reads.isel(step=-1).sum("rank")), [2 * 5, 2 * 104, 2 * 104])

    def test_pandas(self):
        for kind in ("sample", "real"):
            path = self.files[kind]
            with self.subTest(file=kind), h5py.File(path) as file:
                points = pd.DataFrame([dict(p.attrs) for p in file["points"].values()])
                self.assertEqual(len(points), 2)
                self.assertEqual(points["run.context"].dtype, np.int64)
                self.assertEqual(points["model.rope_base"].iloc[0], 10000.0)
                system = xr.open_dataset(path, group="system", engine="h5netcdf").to_dataframe()
                self.assertEqual(system.index.name, "rank")
                frame = xr.open_dataset(path, group="points/0000", engine="h5netcdf").time.to_dataframe()
                self.assertEqual(frame.index.names, ["mode", "stage", "rank", "rep"])
                self.assertTrue(frame.loc["total"].loc["step"].time.notna().all())

    def test_schema_document_names_everything(self):
        text = (ROOT / "docs" / "SCHEMA.md").read_text()
        named = {part for code in re.findall(r"`([^`\s]+)`", text) for part in code.split("/")}

        def check(item):
            name = item.name.rsplit("/", 1)[1]
            scales = isinstance(item, h5py.Dataset) and item.is_scale
            if not re.fullmatch(r"\d{4,}|", name) and not (scales and "/tensors" in item.name):
                self.assertTrue(name in named, name)
            for attribute in item.attrs:
                if "." not in attribute and not (isinstance(item, h5py.Dataset) and attribute.isupper()):
                    self.assertTrue(attribute in named, attribute)
        self.for_each_item(check)


class Malformed(unittest.TestCase):
    """`nsa diff` refuses a broken file with one message that names it, exit code 6, and little memory."""

    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.path = self.folder / "bad.h5"
        subprocess.run([os.environ["NSA_WRITE_SAMPLE"], self.path], check=True)

    def refused(self, part):
        def limit():
            resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))

        run = subprocess.run([os.environ["NSA"], "diff", self.path, self.path], capture_output=True, text=True,
                             timeout=60, preexec_fn=limit)
        self.assertEqual(run.returncode, 6, run.stderr)
        self.assertEqual(run.stderr.count(str(self.path)), 1, run.stderr)
        self.assertIn(part, run.stderr)

    def replace(self, name, **dataset):
        with h5py.File(self.path, "r+") as file:
            del file[name]
            file.create_dataset(name, **dataset)

    def test_shape_larger_than_the_file(self):
        self.replace("points/0000/time", shape=(2, 11, 2**30, 2**20), dtype="f8")
        self.refused("dataset 'time' says it is larger than its file")

    def test_labels_larger_than_the_file(self):
        for shape, layout in ((2**44,), None), ((2**60,), (1024,)):
            self.replace("points/0000/rep", shape=shape, dtype="i8", chunks=layout)
            self.refused("larger than its file")

    def test_numbers_out_of_the_range_of_a_table(self):
        with h5py.File(self.path, "r+") as file:
            file["points/0000"].attrs["warmup_reps"] = -(10**9)
        self.refused("attribute 'warmup_reps' is -1000000000")

    def test_a_missing_table_of_two(self):
        with h5py.File(self.path, "r+") as file:
            del file["points/0000/reads_expected"]
        self.refused("of 'reads' and 'reads_expected' it has only one")

    def test_other_types(self):
        self.replace("points/0000/mode", data=np.zeros(2))
        self.refused("no string")
        self.replace("points/0000/mode", data=np.array([(1, 2.0)] * 2, dtype=[("a", "i4"), ("b", "f8")]))
        self.refused("no string")

    def test_other_attributes(self):
        for name, value in ("heads", "two"), ("heads", np.arange(3)), ("routes", 1), ("validity", h5py.Empty("i4")):
            with h5py.File(self.path, "r+") as file:
                file["points/0000"].attrs[name] = value
            self.refused(f"attribute '{name}'")
            with h5py.File(self.path, "r+") as file:
                del file["points/0000"].attrs[name]
            self.refused(f"attribute '{name}' is missing")
            subprocess.run(["rm", self.path], check=True)
            subprocess.run([os.environ["NSA_WRITE_SAMPLE"], self.path], check=True)

    def test_foreign_file(self):
        with h5py.File(self.path, "w") as file:
            file["x"] = np.zeros(3)
        self.refused("no result of nsa")

    def test_dangling_and_looping_links(self):
        with h5py.File(self.path, "r+") as file:
            file["points/0002"] = h5py.SoftLink("/nowhere")
        self.refused("0002")
        with h5py.File(self.path, "r+") as file:
            del file["points/0002"]
            file["points/0002"] = h5py.SoftLink("/points/0002")
        self.refused("0002")


if __name__ == "__main__":
    unittest.main()

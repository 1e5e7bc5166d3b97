"""`[input] file`: a run that dumps its tensors and a run that loads them give the same result; a file that
examples/make_input.py wrote loads; a file that does not fit is refused.

Environment: NSA, the program; MPIEXEC, which launches it.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

import h5py
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
CASES = {  # overrides of the program's defaults, which are the shape of examples/make_input.py
    "bf16": [],
    "fp32, learned phi, two layers": ["model.precision='fp32'", "nsa.phi='mlp'", "model.layers=2", "run.batch=2"],
    "fp16, shared": ["model.precision='fp16'", "model.shared_kv=true", "model.gate='sigmoid'"],
    "prefill": ["task.kind='prefill'", "run.steps=2", "run.warmup=1"],
    "attention": ["run.scope='attention'", "model.precision='fp32'"],
}


class InputFile(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.toml = self.folder / "input.toml"
        self.toml.write_text('[task]\nkind = "decode"\n[run]\nbackend = "host"\ncontext = 128\nmodes = ["total"]\n')

    def nsa(self, *arguments, code=0, ranks=1):
        launch = [os.environ["MPIEXEC"], "-n", str(ranks)] if ranks > 1 else []
        command = [*launch, os.environ["NSA"], *map(str, arguments)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        self.assertEqual(run.returncode, code, run.stdout + run.stderr)
        return run

    def run_nsa(self, output, *settings, **how):
        flags = [flag for setting in settings for flag in ("--set", setting)]
        return self.nsa("run", self.toml, "--output", output, *flags, **how)

    def test_dumped_tensors_give_the_same_result(self):
        for number, (name, settings) in enumerate(CASES.items()):
            with self.subTest(name):
                dumped, loaded = self.folder / f"dumped{number}.h5", self.folder / f"loaded{number}.h5"
                self.run_nsa(dumped, "output.tensors=true", *settings)
                # Another seed: what the file does not give would differ.
                self.run_nsa(loaded, "output.tensors=true", f"input.file='{dumped}'", "run.seed=2", *settings)
                with h5py.File(dumped) as a, h5py.File(loaded) as b:
                    names = []
                    a.visit(names.append)
                    names = [name for name in names if "/tensors/" in name and isinstance(a[name], h5py.Dataset)]
                    self.assertIn("points/0000/tensors/selected", names)
                    for name in names:
                        np.testing.assert_array_equal(a[name][()], b[name][()], err_msg=name)
                    result = a["points/0000/tensors/" + ("o" if "attention" in str(settings) else "y")][()]
                    self.assertGreater(np.abs(result).max(), 0)

    def test_diff_agrees(self):
        dumped, loaded = self.folder / "dumped.h5", self.folder / "loaded.h5"
        self.run_nsa(dumped, "output.tensors=true")
        self.run_nsa(loaded, f"input.file='{dumped}'")
        self.nsa("diff", dumped, loaded)

    def test_diff_sees_another_output(self):
        dumped, edited = self.folder / "dumped.h5", self.folder / "edited.h5"
        self.run_nsa(dumped, "output.tensors=true")
        shutil.copy(dumped, edited)
        with h5py.File(edited, "r+") as file:
            y = file["points/0000/tensors/y"]
            y[...] = y[()] * 1.1
        said = self.nsa("diff", dumped, edited, code=3).stdout
        difference, rounding = re.search(r"y: mean difference (\S+) \(rounding: (\S+)\)", said).groups()
        with h5py.File(dumped) as file:
            mean = np.abs(file["points/0000/tensors/y"][()]).mean()
        np.testing.assert_allclose(float(difference), 0.1 * mean, rtol=0.01)
        self.assertLess(float(rounding), 0.05 * mean)

    def test_an_output_that_is_not_finite_is_invalid(self):
        made = self.folder / "x.h5"
        self.run_nsa(made, "output.tensors=true", "model.precision='fp16'")
        with h5py.File(made, "r+") as file:
            w_v = file["points/0000/tensors/weights/w_v_cmp"]
            w_v[:, 0] = w_v[:, 0] * 1e6  # v_cmp overflows in fp16
        run = self.run_nsa(self.folder / "r.h5", f"input.file='{made}'", "model.precision='fp16'", code=3)
        self.assertIn("RESULT: INVALID (context_128: rank 0: the output is not finite)", run.stdout)

    def test_example_loads(self):
        made = self.folder / "x.h5"
        subprocess.run([sys.executable, ROOT / "examples" / "make_input.py", made], check=True)
        self.run_nsa(self.folder / "r.h5", f"input.file='{made}'", "output.tensors=true", "model.precision='fp32'")
        with h5py.File(made) as a, h5py.File(self.folder / "r.h5") as b:
            np.testing.assert_array_equal(a["x"][()], b["points/0000/tensors/x"][()])
            np.testing.assert_array_equal(a["weights/w_o"][()], b["points/0000/tensors/weights/w_o"][()])

    def test_wider_and_narrower_floats_load(self):
        made = self.folder / "x.h5"
        subprocess.run([sys.executable, ROOT / "examples" / "make_input.py", made], check=True)
        with h5py.File(made, "r+") as file:
            for name, dtype in ("x", "f2"), ("weights/w_q", "f8"):
                values = file[name][()].astype(dtype)
                del file[name]
                file[name] = values
        self.run_nsa(self.folder / "r.h5", f"input.file='{made}'", "output.tensors=true", "model.precision='fp32'")
        with h5py.File(made) as a, h5py.File(self.folder / "r.h5") as b:
            np.testing.assert_array_equal(a["x"][()].astype("f4"), b["points/0000/tensors/x"][()])
            np.testing.assert_array_equal(a["weights/w_q"][()].astype("f4"), b["points/0000/tensors/weights/w_q"][()])

    def test_what_does_not_fit_is_refused(self):
        made, output = self.folder / "x.h5", self.folder / "r.h5"

        def refused(*parts, ranks=1):
            run = self.run_nsa(output, f"input.file='{made}'", code=6, ranks=ranks)
            self.assertEqual(run.stderr.count(str(made)), 1, run.stderr)
            for part in parts:
                self.assertIn(part, run.stderr)
            self.assertFalse(output.exists())
            self.assertEqual(list(self.folder.glob("*.tmp")), [])

        refused("no such file")
        made.write_text("not HDF5")
        refused("file signature not found")
        made.unlink()
        subprocess.run([sys.executable, ROOT / "examples" / "make_input.py", made], check=True)

        def edit(name, values):
            with h5py.File(made, "r+") as file:
                if name in file:
                    del file[name]
                if values is not None:
                    file[name] = values

        with h5py.File(made) as file:
            x, w_o = file["x"][()], file["weights/w_o"][()]
        edit("weights/w_o", w_o[:-1])
        refused("'weights/w_o'", "[255, 256]", "[256, 256]")
        edit("weights/w_o", None)
        refused("no tensor 'weights/w_o'")
        edit("weights/w_o", np.ones(w_o.shape, "i4"))
        refused("'weights/w_o' is not floating point")
        w_o[3, 5] = np.inf
        edit("weights/w_o", w_o)
        refused("'weights/w_o' is inf at [3, 5]")
        refused("'weights/w_o' is inf at [3, 5]", ranks=2)  # row 3 belongs to one of them
        edit("weights/w_o", np.ones_like(w_o))
        x[0, 130, 7] = np.nan
        edit("x", x)
        refused("'x' is nan at [0, 130, 7]")


if __name__ == "__main__":
    unittest.main()

"""Result files that earlier versions of the program wrote are read by report, diff and gate; resume reads them too and
refuses to go on, because it accepts no other commit. tests/app/test_resume.py resumes one with h5py."""

import os
import pathlib
import re
import shutil
import unittest

from harness import AppTest, nsa

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "docs" / "results").rglob("*.h5"))
DATA = pathlib.Path(__file__).resolve().parent / "data"
USAGE, INTERRUPTED_RUN = 2, "stopped_run"  # of commit 082e9f80b750: one of two points


class EarlierFiles(AppTest):
    def test_there_are_some(self):
        self.assertGreater(len(RESULTS), 40)

    def test_report(self):
        for path in RESULTS:
            with self.subTest(file=path.name):
                out = self.assert_ok(self.nsa("report", str(path))).out
                self.assertIn("\nFOM ", out)
                self.assertEqual(out.splitlines()[-1], "RESULT: VALID")

    def test_diff(self):
        for path in RESULTS:
            with self.subTest(file=path.name):
                out = self.assert_ok(self.nsa("diff", str(path), str(path))).out
                self.assertRegex(out.splitlines()[-1], r"^DIFF: SAME \(\d+ points compared\)$")

    def test_gate(self):
        for path in RESULTS:
            with self.subTest(file=path.name):
                self.assertIn("\nVERDICT: ", self.assert_ok(self.nsa("gate", str(path))).out)

    def test_gate_prints_the_recorded_evidence(self):
        """docs/adr/*.md name their files and hold the page that `nsa gate` printed."""
        records = sorted((ROOT / "docs" / "adr").glob("h*.md"))
        self.assertEqual(len(records), 3)
        for record in records:
            with self.subTest(record=record.name):
                text = record.read_text()
                files = re.findall(r"^- `(\S+\.h5)`: `", text, re.MULTILINE)
                files += re.findall(r"\((\S+\.h5)\)", re.search("^- Baselines: .*", text, re.MULTILINE)[0])
                page = self.assert_ok(nsa("gate", *files, cwd=ROOT)).out
                self.assertIn("```\n" + page + "```\n", text)

    def test_an_interrupted_run_is_read_and_its_resume_refused(self):
        for name in (INTERRUPTED_RUN + ".h5", INTERRUPTED_RUN + ".toml"):
            shutil.copy(DATA / name, self.folder)
        done = self.assert_ok(self.nsa("report", INTERRUPTED_RUN + ".h5"))
        self.assertIn("FOM decode_time_context_64 = ", done.out)
        self.assertEqual(done.out.splitlines()[-1], "RESULT: INTERRUPTED (1 points are finished; status interrupted)")
        done = self.nsa("run", INTERRUPTED_RUN + ".toml", "--resume")
        self.assertEqual(done.code, USAGE, done.out + done.err)
        self.assertIn("cannot resume stopped_run.h5 (commit: 082e9f80b750 there, ", done.err)
        kept = (DATA / (INTERRUPTED_RUN + ".h5")).read_bytes()
        self.assertEqual(pathlib.Path(self.folder, INTERRUPTED_RUN + ".h5").read_bytes(), kept)
        self.assertEqual(sorted(os.listdir(self.folder)), [INTERRUPTED_RUN + ".h5", INTERRUPTED_RUN + ".toml"])


if __name__ == "__main__":
    unittest.main(verbosity=2)

"""docs/INPUT.md is the output of `nsa info --keys`, and its table of environment variables is complete."""

import pathlib
import re
import subprocess
import unittest

from harness import AppTest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "INPUT.md"
FOLDERS = ("app", "lib", "tests", "scripts", "analysis", "jobscripts", "contrib")
# Names in C++ strings, in Python's os.environ and in shell. Others that begin with NSA_ are macros and CMake options.
READS = {"*.cpp *.cu *.hpp *.cuh *.c": [r'getenv\("(\w+)"\)', r'"(NSA_\w+)"'],
         "*.py": [r"""environ(?:\.get\(|\[)\s*['"](NSA\w*)['"]""", r"""environ\.pop,\s*['"](NSA\w*)['"]"""],
         "*.sh": [r"\$\{?(NSA(?:_\w+)?)\b", r"\bexport (NSA(?:_\w+)?)="],
         "*.xml": [r"\bprintenv (\w+)"]}
NOT_OF_USERS = {"FILE_FAULT", "FILE_FAULT_LOG"}  # between a test and its library


def documented():
    return set(re.findall(r"^\| `([A-Z]\w+)` \|", PAGE.read_text().split("## Environment variables")[1], re.MULTILINE))


def read_in_sources():
    found = {}
    for folder in FOLDERS:
        for patterns, expressions in READS.items():
            for path in (path for pattern in patterns.split() for path in (ROOT / folder).rglob(pattern)):
                text = path.read_text()
                for expression in expressions:
                    for name in re.findall(expression, text):
                        found.setdefault(name, path.relative_to(ROOT))
    return {name: path for name, path in found.items() if name not in NOT_OF_USERS}


class InputPage(AppTest):
    def test_the_page_is_what_the_program_prints(self):
        printed = self.assert_ok(self.nsa("info", "--keys")).out
        self.assertEqual(PAGE.read_text(), printed, "docs/INPUT.md is old; run: nsa info --keys > docs/INPUT.md")

    def test_every_key_of_the_inputs_is_on_the_page(self):
        page = PAGE.read_text()
        sections = dict(re.findall(r"^## \[(\w+)\]\n(.*?)(?=^## )", page, re.MULTILINE | re.DOTALL))
        for path in sorted((ROOT / "inputs").rglob("*.toml")):
            section = None
            for line in path.read_text().splitlines():
                if match := re.match(r"\[(\w+)\]", line):
                    section = match[1]
                elif match := re.match(r"(\w+) *=", line):
                    self.assertIn(f"| `{match[1]}` |", sections[section], path)

    def test_the_variables_that_sources_read_are_on_the_page(self):
        sources, page = read_in_sources(), documented()
        self.assertIn("NSA_ROUTE_SEL", sources)
        missing = {name: str(path) for name, path in sources.items() if name not in page}
        self.assertEqual(missing, {}, "add them to lib/nsa/config/reference.cpp")

    def test_the_variables_on_the_page_are_in_the_sources(self):
        for name in documented():
            if name.startswith("NSA"):
                folders = [str(ROOT / folder) for folder in FOLDERS]
                done = subprocess.run(["grep", "-rwlI", "--exclude-dir=docs", "--exclude=reference.cpp",
                                       "--exclude=test_input_page.py", name, *folders], capture_output=True)
                self.assertEqual(done.returncode, 0, f"nothing reads {name}")


if __name__ == "__main__":
    unittest.main(verbosity=2)

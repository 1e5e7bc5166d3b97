"""ReFrame: nsa runs on a few rank counts, its result is VALID, and its figures are ReFrame's performance variables.

  reframe -C contrib/reframe/settings.py -c contrib/reframe/nsa_check.py -r
  reframe ... -S NsaCheck.nsa=/path/to/nsa -S NsaCheck.input=/path/to/in.toml -S NsaCheck.options="--set run.batch=4"

Figures come from `nsa run --json`; docs/METRICS.md defines them. Those of the last point have names without its context
too, which stay the same when the input changes. For regression limits give `reference` in a subclass, e.g.
{"mysystem:gpu": {"decode_time": (42.1, None, 0.05, "us")}}.
"""

import json
import os
import pathlib
import re

import reframe as rfm
import reframe.utility.sanity as sn
from reframe.core.builtins import parameter, run_before, sanity_function, variable

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


@rfm.simple_test
class NsaCheck(rfm.RunOnlyRegressionTest):
    descr = "Native Sparse Attention, decode or prefill"
    valid_systems = ["*"]
    valid_prog_environs = ["*"]
    sourcesdir = None
    ranks = parameter([1, 2, 4])
    nsa = variable(str, value=str(ROOT / "build" / "host" / "nsa"))
    input = variable(str, value=str(ROOT / "inputs" / "scaling" / "scaling.toml"))
    options = variable(str, value="")
    env_vars = {  # more ranks than cores: Open MPI 4, 5
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }

    @run_before("run")
    def set_command(self):
        self.num_tasks = self.ranks
        self.executable = self.nsa
        self.executable_opts = ["run", self.input, "--output", "run.h5", "--json", "run.json", self.options]
        self.keep_files = ["run.h5", "run.json"]

    @sanity_function
    def is_valid(self):
        return sn.assert_found(r"^RESULT: VALID$", self.stdout)

    @run_before("performance")
    def set_figures(self):
        with open(os.path.join(self.stagedir, "run.json")) as file:
            figures = json.load(file)["figures"]
        stable = {re.sub(r"_context_\d+.*", "", name): figure for name, figure in figures.items()}
        self.perf_variables = {
            name: sn.make_performance_function(sn.defer(figure["value"]), figure["unit"])
            for name, figure in {**figures, **stable}.items()
        }

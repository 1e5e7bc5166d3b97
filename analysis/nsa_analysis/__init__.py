"""Tables, figures and one self-contained report from the result files of nsa.

    import nsa_analysis
    points = nsa_analysis.read(["results/"])          # every point of every file
    nsa_analysis.scaling(points)                      # a DataFrame; also branches, reads, ranks, roofline

Times are in seconds, sizes in bytes. docs/METRICS.md defines the numbers, docs/SCHEMA.md the files.

Modules depend on those before them: data (files and tables), models (scaling, balance, bandwidth, cost model, gate),
figures (panels), report (the page), cli.
"""

__version__ = "0.1.0"

from .data.export import export
from .data.reading import Point, Run, read, read_file, read_samples
from .data.tables import kernels, points_table, stages_table
from .errors import AnalysisError, FileError
from .models.balance import phases, ranks, stragglers, waiting
from .models.compare import compare
from .models.cost_model import CostModel, Network, check, fit, held_out
from .models.gate import call_gate, gate_table, verdicts
from .models.linearity import linearity
from .models.prediction import extrapolate
from .models.roofline import roofline
from .models.scaling import karp_flatt, scaling
from .models.stages import branches, reads

carry = extrapolate  # earlier name


def __getattr__(name):
    """`nsa_analysis.plots` is imported on first use, because matplotlib takes long to import."""
    if name == "plots":
        from .figures import plots

        return plots
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

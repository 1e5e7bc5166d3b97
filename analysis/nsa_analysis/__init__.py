"""Tables, figures and one self-contained report from the result files of nsa.

    import nsa_analysis
    points = nsa_analysis.read(["results/"])          # every point of every file
    nsa_analysis.scaling(points)                      # a DataFrame; so do branches, reads, ranks, roofline

Times are in seconds, bytes in bytes. What the numbers mean: docs/METRICS.md; the file: docs/SCHEMA.md.
"""

__version__ = "0.1.0"

from .balance import ranks, stragglers
from .bandwidth import roofline
from .cost_model import CostModel, Network, carry, check, fit
from .curves import karp_flatt, scaling
from .errors import AnalysisError, FileError
from .reading import Point, Run, read, read_file
from .stages import branches, reads
from .tables import kernels, points_table, stages_table
from .verdict import call_gate, gate_table, verdicts

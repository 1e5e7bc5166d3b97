"""Panels from the tables of this package: each function takes a DataFrame and returns a list of Panel."""

from .plots_gate import gate_panels, kernel_panels
from .plots_model import carry_panels, check_panels
from .plots_scaling import scaling_panels
from .plots_stages import branch_panels, rank_panels, reads_panels, roofline_panels

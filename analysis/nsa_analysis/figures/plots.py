"""All panels. Each function takes a table of this package (DataFrame) and returns a list of Panel."""

from .plots_gate import gate_panels, kernel_panels
from .plots_linearity import linearity_panels
from .plots_model import check_panels, prediction_panels
from .plots_scaling import scaling_panels
from .plots_stages import (
    branch_panels,
    context_panel,
    distribution_panel,
    rank_panels,
    reads_panels,
    roofline_panels,
)

carry_panels = prediction_panels  # earlier name

__all__ = [
    "branch_panels",
    "carry_panels",
    "check_panels",
    "context_panel",
    "distribution_panel",
    "gate_panels",
    "kernel_panels",
    "linearity_panels",
    "prediction_panels",
    "rank_panels",
    "reads_panels",
    "roofline_panels",
    "scaling_panels",
]

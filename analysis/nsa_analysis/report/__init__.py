"""The report: one self-contained HTML page."""

from .report import make_report

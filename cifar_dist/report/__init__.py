"""Reports from saved files alone: of one run, and of several runs compared."""

from cifar_dist.report.one_run import Report, report_folder, saved_scores, write_report
from cifar_dist.report.study import Comparison, check_fingerprints, check_runs, make_room, write_comparison

__all__ = [
    "Comparison",
    "Report",
    "check_fingerprints",
    "check_runs",
    "make_room",
    "report_folder",
    "saved_scores",
    "write_comparison",
    "write_report",
]

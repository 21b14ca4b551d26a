"""Reports from saved files alone: of one run, and of several runs compared."""

from cifar_dist.report.comparison import check_fingerprints, check_runs, left_out, make_room, write_comparison
from cifar_dist.report.one_run import Report, report_folder, saved_scores, write_report

__all__ = [
    "Report",
    "check_fingerprints",
    "check_runs",
    "left_out",
    "make_room",
    "report_folder",
    "saved_scores",
    "write_comparison",
    "write_report",
]

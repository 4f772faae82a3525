"""The report: run directories and a summary become one HTML page that needs nothing but a browser."""

from trimtab.report.page import write_report
from trimtab.report.read import RunRecord, read_run
from trimtab.report.words import verdict

__all__ = ["RunRecord", "read_run", "verdict", "write_report"]

"""The result of a run for readers: the text table that commands print, and the offline page `report.html`."""

from moerec.eval.report.page import write_report
from moerec.eval.report.probes import format_forced
from moerec.eval.report.table import format_table

__all__ = ["format_forced", "format_table", "write_report"]

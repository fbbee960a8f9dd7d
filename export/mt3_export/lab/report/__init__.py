"""The report of the precision lab as HTML."""

from __future__ import annotations

from mt3_export.lab.report.page import write_report

__all__ = ["write_report"]

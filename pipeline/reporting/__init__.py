"""The report of a run: tables, pictures and one page, made from the files the stages committed."""

from pipeline.reporting.build import Report, build_report

__all__ = ["Report", "build_report"]

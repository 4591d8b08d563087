"""The memory plan: the bytes that training needs, by optimizer, computed from shapes; nothing is measured.

Importing it needs torch only. transformers, rich and matplotlib are imported where they are used.
"""

from lion8bit.planner.formulas import GIB, Plan, Row, estimate, methods, piece_of
from lion8bit.planner.models import SAVED, Model, PlanError, Weight, Widths, model_of, parse_count, typical_model
from lion8bit.planner.report import check_suffix, plan_bars, plan_table, plot_plan

__all__ = [
    "GIB",
    "SAVED",
    "Model",
    "Plan",
    "PlanError",
    "Row",
    "Weight",
    "Widths",
    "check_suffix",
    "estimate",
    "methods",
    "model_of",
    "parse_count",
    "piece_of",
    "plan_bars",
    "plan_table",
    "plot_plan",
    "typical_model",
]

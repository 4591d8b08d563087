"""The memory plan: the bytes that training needs, by optimizer, computed from shapes; nothing is measured.

Importing it needs torch only. transformers, rich and matplotlib are imported where they are used.
"""

from lion8bit.planner.formulas import GIB, Plan, estimate, methods
from lion8bit.planner.shapes import PlanError

__all__ = ["GIB", "Plan", "PlanError", "estimate", "methods"]

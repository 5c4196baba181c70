"""What models learn from: records of pure functions."""

from jaxptm.objectives.objective import Objective

__all__ = ["Objective"]

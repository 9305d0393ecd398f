"""What a run would do and take, from its recipe and the model's config alone: ``bitdistill run RECIPE --dry-run``."""

from .plan import Machine, plan_run

__all__ = ["Machine", "plan_run"]

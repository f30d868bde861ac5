"""`dpo train`: a recipe in, a run folder out; the same command again continues what was not finished."""

from dpo_studio.workflows.training.run import check_recipe, run_training, train_recipe

__all__ = ["check_recipe", "run_training", "train_recipe"]

"""`dpo eval`: answers, verdicts and held-out numbers of a run."""

"""`dpo rounds`: answers, judgement, pairs, training, evaluation, and again."""

"""`dpo data ...`: pairs looked at, converted and split."""

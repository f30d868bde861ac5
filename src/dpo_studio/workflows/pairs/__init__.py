"""`dpo data ...`: pairs are checked, converted and split."""

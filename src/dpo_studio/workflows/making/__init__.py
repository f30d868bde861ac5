"""`dpo data make`: prompts are answered, the answers judged, and pairs chosen among them."""

"""Pairs of chats as token ids: the model's own template, which ids are the answer, how long, and in which packs."""

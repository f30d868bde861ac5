"""The processes that train together, one for each GPU: what they have to agree on goes through here."""

from dpo_studio.ranks.group import ALONE, Ranks

__all__ = ["ALONE", "Ranks"]

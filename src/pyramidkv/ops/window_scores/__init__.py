"""How much attention a set of queries pays to each key."""

from pyramidkv.ops.window_scores.naive import window_scores

__all__ = ["window_scores"]

"""How much attention each key gets from the queries of the tokens around it, asked again from behind the sequence."""

from pyramidkv.ops.band_scores.naive import band_scores

__all__ = ["band_scores"]

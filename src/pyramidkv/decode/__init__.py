"""Decoding in a CUDA graph: one forward of one token a row, captured once and replayed for every token."""

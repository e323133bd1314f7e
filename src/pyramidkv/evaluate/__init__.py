"""Measurements: perplexity, recall and speed, each written as typed records (`schema.py`)."""

"""What `kernels_gpu.py` checks and measures: a file an op, or for ops that only make sense together.

Each has inputs as a model would give them, `check` against the plain definition, `row` of times at one size, and where
there are tiles to choose from `sweep` over them. Sizes are arguments, so that small ones run in Triton's interpreter.
"""

"""What each number of a report means and how it was taken: the small print of every report."""

DEFINITIONS: tuple[tuple[str, str], ...] = (
    (
        "Perplexity (PPL)",
        "exp of the mean negative log likelihood of continuation tokens. The context is read first and the cache is "
        "compressed before the first scored token, so every scored token attends to the compressed cache. The change "
        "is paired with the full cache over the same chunks; the brackets hold its 95% confidence interval (Student's "
        "t on the log ratios). The corpus named is the corpus read, with its SHA-256; nothing is put in its place.",
    ),
    (
        "Recall",
        "Exact-match answers to probes about facts placed far back in the context, with the 95% Wilson interval. "
        "Unless a task says that the question was seen, the cache was compressed before the question was known.",
    ),
    (
        "KV cache memory",
        "Bytes of the storages that the cache holds after compression, beside the bytes of the same tokens' keys and "
        "values uncompressed in the same dtype. Neither views nor allocator differences are counted.",
    ),
    (
        "Max memory",
        "Peak over prompt and decoding, weights included: memory allocated on a GPU, the resident set on a CPU.",
    ),
    ("TTFT", "Time to the first token: prompt in, first token out, compression included, device synchronised."),
    ("TPOT", "Time per output token after the first; the prompt is excluded."),
    ("Throughput", "Batch / TPOT: generated tokens per second of all sequences together."),
    (
        "Serving",
        "Requests of different lengths in left-padded batches, each row with its own end. The batch is the largest "
        "whose cache, every row as long as the longest, fits the memory named. Tokens/s: tokens of all requests up to "
        "their ends over the time from the first start to the last end, prompts included. Mean TTFT includes the wait "
        "for earlier batches.",
    ),
    (
        "Floor",
        "The time in which a decode step's bytes (weights and KV cache) can be read at the rate at which the device "
        "sums up random numbers, measured in the same run: no decode step that reads them can be faster.",
    ),
    (
        "Baseline",
        "The full cache, nothing evicted, on every engine measured; each line of the table takes the engine that does "
        "best on that line, and names it. Repeats of baseline and method alternate; times are medians with the "
        "smallest and largest repeat.",
    ),
    ("Equal bytes", "Methods are to be compared at the same KV bytes, never at the same nominal setting."),
)

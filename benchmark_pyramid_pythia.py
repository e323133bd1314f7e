"""The report's benchmark: Pythia-2.8B, a prompt of 6144 tokens of which a quarter is kept, WikiText-2 and PG-19.

    python benchmark_pyramid_pythia.py [any option of `pyramidkv bench`]

It is `pyramidkv bench` with the report's settings; what you add on the command line comes after them and wins.
"""

import sys

PRESET = (
    "bench",
    *("--model", "EleutherAI/pythia-2.8b"),
    *("--corpus", "wikitext-2", "--corpus", "pg19"),
    *("--method", "pyramidkv", "--keep", "0.25"),
    *("--prompt", "6144", "--new-tokens", "128"),
)

if __name__ == "__main__":
    sys.argv[1:] = [*PRESET, *sys.argv[1:]]
    from pyramidkv.cli import main

    main()

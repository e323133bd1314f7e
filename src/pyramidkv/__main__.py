"""`python -m pyramidkv`: the command line without its script on the PATH."""

from pyramidkv.cli import main

main()

"""KV-cache compression for `transformers`: PyramidKV and its peers as one cache.

with pyramidkv.compress(model, keep=0.25) as session:
    model.generate(**inputs, max_new_tokens=128)
print(session.report())
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


def _is_the_command() -> bool:
    """Whether this process is `pyramidkv ...` or `python -m pyramidkv ...`."""
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    if program == "-m":  # as it stands while the package of `python -m PACKAGE` is being imported
        return sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == ["pyramidkv"]
    return Path(program).stem == "pyramidkv"


if TYPE_CHECKING or not _is_the_command():
    from pyramidkv.public import *  # noqa: F403
else:  # help comes at once: torch and transformers, seconds of importing, wait until a command runs

    def __getattr__(name: str) -> Any:
        public = import_module("pyramidkv.public")
        if name not in public.__all__:
            raise AttributeError(f"module 'pyramidkv' has no attribute {name!r}")
        return getattr(public, name)

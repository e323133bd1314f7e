"""Our cache in EleutherAI's lm-evaluation-harness: importing this registers the model `pyramidkv` with it.

`pyramidkv-lm-eval` is the harness's own command line, with the model and our tasks; extra `lm-eval`.
"""

try:
    import lm_eval as _harness  # noqa: F401
except ImportError as error:
    raise ImportError("pyramidkv.lm_eval needs lm-evaluation-harness: pip install 'pyramidkv[lm-eval]'") from error

from pyramidkv.lm_eval.model import CompressedLM

__all__ = ["CompressedLM"]

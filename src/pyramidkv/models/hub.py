"""Is the Hugging Face hub there? Asked once, with a short wait, before a client starts its half minute of retries."""

from __future__ import annotations

import functools
import os
import urllib.error
import urllib.request


@functools.cache
def hub_problem(timeout: float = 3.0) -> str | None:
    """Why the hub can't be used, in a few words; None if it answers. The answer is kept for the process."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    request = urllib.request.Request(endpoint, method="HEAD", headers={"User-Agent": "pyramidkv"})
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return None
    except urllib.error.HTTPError:
        return None  # an answer, even if not the one hoped for
    except (OSError, ValueError) as error:
        return f"{endpoint} does not answer ({getattr(error, 'reason', error)})"

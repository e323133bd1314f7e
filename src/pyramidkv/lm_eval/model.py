"""`CompressedLM`: the model `pyramidkv` of lm-evaluation-harness; its requests go through a compressed cache."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from pyramidkv.cache import PyramidKVCache
from pyramidkv.config import CompressionConfig, unknown
from pyramidkv.errors import CompressionWarning, ConfigError, DataError, UnsupportedError
from pyramidkv.layer import PyramidKVLayer
from pyramidkv.models.source import load_model
from pyramidkv.packed import PackedStorage
from pyramidkv.session import Session, compress

logger = logging.getLogger("lm_eval.models.pyramidkv")  # among those that the harness shows

_OWN = ("pretrained", "device", "dtype", "batch_size", "unseen_lines")
_HARNESS = ("max_length", "truncation", "add_bos_token", "prefix_token_id", "think_end_token", "enable_thinking",
            "chat_template_args", "max_batch_size")  # fmt: skip


@register_model("pyramidkv")
class CompressedLM(HFLM):  # type: ignore[misc]
    """A model under compression, for `lm_eval.simple_evaluate(model="pyramidkv", ...)` and `pyramidkv-lm-eval`.

    - `generate_until` is plain `generate()` in a session.
    - `loglikelihood` compresses the context but for its last token, then feeds that token and the continuation on top:
      every scored token attends to the compressed cache, also where a continuation has one token only. Requests of one
      context share its compression; they run one after the other, whatever the batch size.
    - `loglikelihood_rolling` has no context that could be compressed, and is refused but for `method=full`.

    A context that fits its budget is scored as it is. How many were compressed is logged after every kind of request,
    and stands in the results as `requests_compressed` of `requests`.

    Args:
        pretrained: "neox-16m", a folder, a .gguf file, a hub id: all that `pyramidkv bench --model` takes but random
            weights, which have no tokenizer.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        dtype: "auto" (float32 on a CPU, elsewhere the checkpoint's own), "float32", "float16" or "bfloat16".
        batch_size: prompts that generate together; a whole number.
        unseen_lines: last lines of a prompt that are fed after the compression, so that the question is not known
            when compressing; 0 compresses the whole prompt. Needs batch_size=1.
        options: the fields of `CompressionConfig`, and of the harness's `HFLM`: max_length, truncation, add_bos_token,
            prefix_token_id, think_end_token, enable_thinking, chat_template_args.

    Raises:
        ConfigError: an argument is unknown or outside what is allowed; nothing has been loaded then.
        DataError: a model that can't be had or read, or has no tokenizer.
        UnsupportedError: an architecture that can't be compressed.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        unseen_lines: int = 0,
        **options: Any,
    ) -> None:
        settings = [field.name for field in dataclasses.fields(CompressionConfig)]
        for name, value in options.items():
            if name not in settings and name not in _HARNESS:
                raise ConfigError(f"{name}={value!r}: {unknown(name, [*_OWN, *settings, *_HARNESS])}")
        self.compression = CompressionConfig.make(**{n: v for n, v in options.items() if n in settings})
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(f"batch_size={batch_size!r}: must be a whole number, at least 1")
        if not isinstance(unseen_lines, int) or unseen_lines < 0:
            raise ConfigError(f"unseen_lines={unseen_lines!r}: must be a whole number, at least 0")
        if unseen_lines and int(batch_size) > 1:
            raise ConfigError(f"unseen_lines={unseen_lines}: needs batch_size=1; got batch_size={batch_size}")
        self.unseen_lines = unseen_lines
        self.requests = self.requests_compressed = 0
        loaded = load_model(pretrained, device=device, dtype=dtype)
        if loaded.tokenizer is None:
            raise DataError(f"pretrained={pretrained!r}: has no tokenizer, and the harness's requests are texts")
        kept = {name: value for name, value in options.items() if name in _HARNESS}
        super().__init__(loaded.model, tokenizer=loaded.tokenizer, batch_size=int(batch_size), **kept)
        self.pretrained = pretrained
        self._session: Session | None = None

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Plain `generate()` in a session; arguments and result are the harness's."""
        with self._compressing(self.compression):
            texts: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        return texts

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The harness's own for `method=full`; raises `UnsupportedError` for all others."""
        if self.compression.method != "full":
            raise UnsupportedError(
                f"loglikelihood_rolling with method={self.compression.method!r}: whole texts are scored, and there is "
                "no context that could be compressed first; use pyramidkv bench --metric perplexity, or method=full"
            )
        scores: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        return scores

    def get_model_info(self) -> dict[str, Any]:
        """What goes into the results file beside the scores."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": self.model.dtype,
            "compression": dataclasses.asdict(self.compression),
            "unseen_lines": self.unseen_lines,
            "requests": self.requests,
            "requests_compressed": self.requests_compressed,
        }

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        session = self._session
        assert session is not None
        if self.unseen_lines:
            seen = self._seen(context[0].tolist())
            with torch.no_grad():
                self.model(context[:, :seen], use_cache=True, logits_to_keep=1)
            options["past_key_values"] = session.cache
        out: Tensor = super()._model_generate(context, max_length, stop, **options)
        self._count(len(context), compressed_share(session.cache) * len(context))
        return out

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        cut = [self._cut(context, continuation) for _, context, continuation in requests]
        # Requests of one context one after the other, the longest first: what does not fit fails at once.
        order = sorted(range(len(cut)), key=lambda i: (-len(cut[i][0]), cut[i][0]))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(cut)
        bar = tqdm(total=len(cut), disable=disable_tqdm, desc="Running loglikelihood requests")
        # A continuation of one token must not go to a graph that was captured for another cache.
        with self._compressing(dataclasses.replace(self.compression, decode="eager")) as session, torch.no_grad(), bar:
            for seen, group in groupby(order, key=lambda i: cut[i][0]):
                cache = self._filled(session, seen)
                for i in group:
                    _, unseen, continuation = cut[i]
                    answers[i] = self._score(cache, unseen, continuation)
                    self._count(1, 0 if cache is None else compressed_share(cache))
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                    bar.update()
        return answers

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int], list[int]]:
        """What is compressed, what of the context comes after that (at least a token), and what is scored."""
        if len(continuation) > self.max_length:
            raise ConfigError(
                f"max_length={self.max_length}: a continuation has {len(continuation)} tokens and can't be scored"
            )
        room = self.max_length + 1 - len(continuation)  # the last token of the continuation is not fed
        if len(context) > room:
            logger.warning("A context of %d tokens is cut on the left to %d", len(context), room)
            context = context[-room:]
        seen = min(self._seen(context), len(context) - 1)
        return context[:seen], context[seen:], continuation

    def _seen(self, tokens: list[int]) -> int:
        """How many tokens of a prompt come before its unseen lines."""
        if self.unseen_lines == 0:
            return len(tokens)
        for seen in range(len(tokens), 0, -1):
            if self.tok_decode(tokens[seen - 1 :]).count("\n") >= self.unseen_lines:
                return seen
        raise ConfigError(f"unseen_lines={self.unseen_lines}: a prompt has no line before those")

    def _filled(self, session: Session, tokens: list[int]) -> PyramidKVCache | None:
        if not tokens:
            return None
        self.model(torch.tensor([tokens], device=self.device), use_cache=True, logits_to_keep=1)
        return session.cache

    def _score(self, cache: PyramidKVCache | None, unseen: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Sum of the log probabilities of `continuation`, and whether each of its tokens is the most likely one."""
        fed = torch.tensor([unseen + continuation[:-1]], device=self.device)
        past = {"use_cache": False} if cache is None else {"past_key_values": cache.fork(), "use_cache": True}
        logits = self.model(fed, logits_to_keep=len(continuation), **past).logits[0].float()
        target = torch.tensor(continuation, device=self.device)
        scores = logits.log_softmax(-1).gather(-1, target[:, None])
        return float(scores.sum()), bool((logits.argmax(-1) == target).all())

    @contextmanager
    def _compressing(self, config: CompressionConfig) -> Iterator[Session]:
        """A session; at its end, the log says how many of its requests were compressed."""
        requests, compressed = self.requests, self.requests_compressed
        with warnings.catch_warnings():
            # The count below says it better: a session judges its last cache, and here are many.
            warnings.simplefilter("ignore", CompressionWarning)
            with compress(self.model, config) as session:
                self._session = session
                try:
                    yield session
                finally:
                    self._session = None
        requests, compressed = self.requests - requests, self.requests_compressed - compressed
        logger.info("pyramidkv: %d of %d requests were compressed", compressed, requests)
        if requests and not compressed and config.method != "full":
            warnings.warn(f"{config.describe()}: none of {requests} requests was compressed", CompressionWarning, 3)

    def _count(self, requests: int, compressed: float) -> None:
        self.requests += requests
        self.requests_compressed += round(compressed)


def compressed_share(cache: PyramidKVCache) -> float:
    """Share of a cache's rows of which any layer has dropped or packed anything."""
    ours = [layer for layer in cache.layers if isinstance(layer, PyramidKVLayer)]
    rows = len(ours[0].counts)
    shrunk = [
        any(x.held[row] < x.counts[row] or isinstance(x.storage, PackedStorage) for x in ours) for row in range(rows)
    ]
    return sum(shrunk) / rows

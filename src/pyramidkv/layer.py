"""`PyramidKVLayer`: the cache of one full-attention layer; what `cache.py` makes one of for each.

A model's attention module calls `update` with its new keys and values and gets back what to attend to; the attention
function calls `attend` with the same tensors. That computes the attention and, after a forward with more than one
query, evicts (`eviction.py`): the layer then holds no more than its budget.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from pyramidkv.errors import ConfigError, UnsupportedError
from pyramidkv.eviction import EvictingLayer
from pyramidkv.new_tokens import NewTokens
from pyramidkv.ops.attention import attention
from pyramidkv.ops.decode_attention import decode_attention, why_naive
from pyramidkv.ops.packed_attention import packed_attention
from pyramidkv.ops.valid import joined
from pyramidkv.packed import PackedStorage
from pyramidkv.recovery import remember
from pyramidkv.shape import cache_shape
from pyramidkv.usage import LayerUsage


class PyramidKVLayer(EvictingLayer, CacheLayerMixin):  # type: ignore[misc]
    """The cache of one full-attention layer."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    # What transformers asks of a layer.

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take (B, H, T, D) keys and values; return those to attend to, (B, H, K, D), the new ones last."""
        if self.record_past and self.drafts is None and key_states.shape[2] > 1:
            raise UnsupportedError(
                "assisted decoding (assistant_model, prompt_lookup_num_tokens) drafts tokens that it may take back, "
                "and only a session knows which: call generate() inside `with pyramidkv.compress(model, ...):`"
            )
        if self.storage is None:
            self.before = remember(self)
            self.start(key_states.shape[0])
            keys, values = key_states, value_states
        elif self._appends(key_states.shape[2]):
            self._check(key_states)
            self.make_room(key_states.shape[2])
            self.before = remember(self)
            one = key_states.shape[2] == 1 and self.offset is None
            columns = self.seen if one else self._columns(key_states.shape[2], key_states.device)
            self.storage.append(key_states, value_states, columns, self.plan.config.room)
            if isinstance(self.storage, PackedStorage):
                keys, values = key_states, value_states  # `attend` reads the codes, or unpacks them
            else:
                keys, values = self.storage.view(key_states.dtype)
        else:
            self._check(key_states)
            self.before = remember(self)
            keys, values = self.storage.followed_by(key_states, value_states)
        keys.pyramidkv_layer = self  # type: ignore[attr-defined]
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones and padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical: all columns seen and the new ones, from column 0."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No maximum: storage grows with generated tokens."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: storage is sized by the first eviction."""

    def reset(self) -> None:
        """Forget everything; the layer can be used for another prompt."""
        self.storage, self.offset, self.lasting, self.seen, self.settled = None, None, None, 0, 0
        self.ring, self.full_at, self.before = None, 0, None
        self.counts, self.held, self.prompts, self.expected = [], [], [], []
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows from other rows (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        if self.storage is None:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self.before = None
        self.storage = self.storage.rows(indices)
        self.lasting = None if self.lasting is None else self.lasting.index_select(0, indices.to(self.lasting.device))
        self.ring = None if self.ring is None else self.ring.rows(indices)
        # Where all rows are alike there is no need to read the indices back from the device.
        rows = [0] * len(indices) if self.offset is None else indices.tolist()
        self.counts, self.held, self.prompts = (
            [numbers[r] for r in rows] for numbers in (self.counts, self.held, self.prompts)
        )
        self.expected = []
        if self.offset is not None:
            self.offset = self.offset[indices.to(self.offset.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.batch_select_indices(torch.arange(len(self.counts)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest columns; 0 or negative. `PyramidKVCache.crop` has checked that they are still whole."""
        if tokens_to_remove == 0 or self.storage is None:
            return
        if self.seen + tokens_to_remove == 0:
            drafts, recording = self.drafts, self.record_past
            self.reset()
            self.drafts, self.record_past = drafts, recording
            return
        dropped = [-tokens_to_remove] * len(self.counts)
        if self.offset is not None:
            end = self.storage.length
            pads = (self.storage.positions[:, 0, end + tokens_to_remove : end] < 0).sum(1)
            self.offset = self.offset + pads.int()[:, None, None]
            dropped = [n - pad for n, pad in zip(dropped, pads.tolist(), strict=True)]
        self.storage.crop(-tokens_to_remove)
        if self.ring is not None:
            self.ring.drop(-tokens_to_remove)
        self.full_at, self.before, self.lasting = 0, None, None
        self.seen += tokens_to_remove
        self.counts = [n - m for n, m in zip(self.counts, dropped, strict=True)]
        self.held = [n - m for n, m in zip(self.held, dropped, strict=True)]

    def activate_past_recording(self) -> None:
        """Assisted decoding begins: `update` waits to be told which tokens are drafts."""
        self.record_past = True

    def offload(self) -> None:
        raise UnsupportedError(
            "cache offloading does not work with compression; leave out cache_implementation='offloaded'"
        )

    prefetch = offload

    # What the attention function asks of a layer.

    def check(self, model_config: Any) -> None:
        """Raise if the module that attends belongs to a model of another shape."""
        if self.rank == 0 and self.storage is None and cache_shape(model_config) != self.plan.shape:
            raise ConfigError(
                "past_key_values: this PyramidKVCache was made for a model of another shape "
                f"({self.plan.shape.model_type}, {len(self.plan.shape.layers)} layers); give it this model's config: "
                "pyramidkv.PyramidKVCache(model.config, ...)"
            )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, new: NewTokens, scaling: float, dropout: float
    ) -> Tensor:
        """Attention of (B, Hq, Q, D) queries over what `update` returned, then the eviction. Returns (B, Hq, Q, D)."""
        new = new.to(key.device)
        if self.storage is None and self.drafts:
            return self._attend_apart(query, key, value, new, scaling, dropout)
        valid = None
        if self._appends(query.shape[2]):
            self._hide(new)
            out = self._over_stored(query, key, value, scaling, dropout)
        else:
            valid = self.visible(new, query.shape[2], key.shape[2])
            holes = self._leaves_holes(new, query.shape[2])
            out = query if self.unread else attention(query, key, value, scaling, valid, dropout, holes=holes)
        self.absorb(query, key, value, valid, new, scaling)
        return out

    def _attend_apart(
        self, query: Tensor, key: Tensor, value: Tensor, new: NewTokens, scaling: float, dropout: float
    ) -> Tensor:
        """A prompt with drafts behind it, as two forwards: the drafts see what the eviction has left of the prompt."""
        (drafts, self.drafts), before = (self.drafts, 0), self.before
        assert drafts is not None
        end = query.shape[2] - drafts
        old = new.without_last(drafts)
        first = self.attend(query[:, :, :end], key[:, :, :end], value[:, :, :end], old, scaling, dropout)
        self.drafts = drafts
        keys, values = self.update(key[:, :, end:], value[:, :, end:])
        self.before = before  # both parts are of one forward
        second = self.attend(query[:, :, end:], keys, values, NewTokens(), scaling, dropout)
        return torch.cat([first, second], dim=2)

    def absorb(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, new: NewTokens, scaling: float
    ) -> None:
        """Take note of the new tokens of a forward; after more than one query, evict."""
        queries = query.shape[2]
        fresh = new.counts or [queries] * len(self.counts)
        self.counts = [n + m for n, m in zip(self.counts, fresh, strict=True)]
        self.held = [n + m for n, m in zip(self.held, fresh, strict=True)]
        self.scaling = scaling
        if not self._appends(queries):
            self._evict(query, key, value, valid, new, scaling)
            self._open_ring(query)
        elif self.ring is not None:
            assert self.storage is not None
            self.ring.push(query, self.storage.newest.length - queries)
        self.seen += queries

    def to_come(self, tokens: int) -> Tensor:
        """Positions of that many tokens to come, (1 or B, 1, tokens) int32, as if all of them were real."""
        assert self.storage is not None
        return self._columns(tokens, self.storage.newest.keys.device)

    def advance(self) -> None:
        """Take note of one more token in every row, whose key, value and position are in the next free slot."""
        assert self.storage is not None
        self.storage.newest.length += 1
        self.storage.newest.appended += 1
        if self.ring is not None:
            self.ring.pushed(1)
        self.counts = [n + 1 for n in self.counts]
        self.held = [n + 1 for n in self.held]
        self.seen += 1

    def start(self, batch: int) -> None:
        """Make ready for the first tokens of `batch` rows."""
        self.counts = self.held = [0] * batch
        self.is_initialized = True

    def usage(self) -> LayerUsage:
        """What this layer holds."""
        full = 0 if self.storage is None else self.storage.spec.token_bytes * self.seen
        return LayerUsage(
            layer=self.layer,
            compressed=True,
            seen_tokens=max(self.counts, default=0),
            kept_tokens=max(self.held, default=0),
            packed=isinstance(self.storage, PackedStorage),
            kv_bytes=sum(held.nbytes for held in (self.storage, self.ring, self.lasting) if held is not None),
            full_kv_bytes=full,
        )

    def _check(self, key_states: Tensor) -> None:
        """Raise if the new keys do not go with those stored."""
        assert self.storage is not None
        stored, shape = self.storage.newest.keys, key_states.shape
        alike = stored.shape[:2] == shape[:2] and stored.shape[3] == shape[3]
        if alike and stored.dtype == self._stored_as(key_states):
            return
        old, (rows, heads, _, width) = self.storage.spec, shape
        for what, had, has in (
            ("rows", old.rows, rows),
            ("KV heads", old.heads, heads),
            ("channels a head", old.key_width, width),
            ("as dtype", self.storage.dtype, self._stored_as(key_states)),
        ):
            if had != has:
                repeats, rest = divmod(rows, old.rows)
                instead = "use another PyramidKVCache or reset() it"
                if what == "rows" and rest == 0:
                    instead = f"its batch_repeat_interleave({repeats}) repeats each row, as beams want it"
                raise ConfigError(
                    f"past_key_values was filled with {had} {what}; the new tokens have {has}: a cache goes on with "
                    f"the model, the batch and the dtype that it began with; {instead}"
                )

    def _columns(self, new: int, device: torch.device) -> Tensor:
        """Positions of the next `new` columns, (1 or B, 1, new) int32, were all of them real."""
        columns = torch.arange(self.seen, self.seen + new, dtype=torch.int32, device=device)[None, None]
        return columns if self.offset is None else columns + self.offset

    def _appends(self, queries: int) -> bool:
        """Whether a forward of that many tokens writes straight into the buffer: decoding, after a first forward."""
        return self.storage is not None and queries in (1, self.drafts)

    def _over_stored(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """Attention over all that is stored, the new tokens included: by a kernel that reads it as it lies, or by SDPA.

        Without empty slots SDPA's flash kernel is as fast on the device and cheaper to launch; a mask would end that.
        """
        storage = self.storage
        assert storage is not None
        new = storage.newest
        as_it_lies = query.shape[2] == 1 and new.dtype == query.dtype and dropout == 0 and not new.holes
        if isinstance(storage, PackedStorage):
            if as_it_lies and (query.device.type == "cpu" or why_naive(query) is None):
                return packed_attention(query, storage.pages, new.keys, new.values, new.length, new.start, scaling)
            key, value = storage.view(query.dtype)
        elif as_it_lies and new.padded and why_naive(query) is None:
            return decode_attention(query, new.keys, new.values, new.length, new.start, scaling)
        return attention(query, key, value, scaling, storage.valid(), dropout, holes=new.holes)

    def _hide(self, new: NewTokens) -> None:
        """Make the newest slot empty in the rows whose new token is padding."""
        if new.valid is not None:
            assert self.storage is not None
            self.storage.hide_newest(~new.valid[:, 0])
            pad = -(~new.valid).int()[:, None]
            self.offset = pad if self.offset is None else self.offset + pad

    def visible(self, new: NewTokens, queries: int, slots: int) -> Tensor | None:
        """(B, K) or (B, H, K) bool: which of the slots attended to hold a real token; None for all of them."""
        past = None if self.storage is None else self.storage.valid()
        if past is None and new.valid is None:
            return None
        if past is None:
            assert new.valid is not None
            past = torch.ones(len(self.counts), slots - queries, dtype=torch.bool, device=new.valid.device)
        fresh = past.new_ones(len(self.counts), queries) if new.valid is None else new.valid
        return joined(past, fresh)

    def _leaves_holes(self, new: NewTokens, queries: int) -> bool:
        """Whether padding among the new tokens comes to lie behind real ones, as it does in front of a further turn."""
        behind = self.storage is not None and self.storage.newest.holes
        padded = zip(new.counts or (), self.held, strict=False)
        return behind or any(n < queries and held > 0 for n, held in padded)

"""`PyramidKVLayer`: the cache of one full-attention layer; what `cache.py` makes one of for each.

A model's attention module calls `update` with its new keys and values and gets back what to attend to; the attention
function calls `attend` with the same tensors. That computes the attention and, after a forward with more than one
query, evicts: the layer then holds no more than its budget. Scores, budgets and buffers live in files of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from pyramidkv.decode.pool import Pool
from pyramidkv.errors import ConfigError, UnsupportedError
from pyramidkv.ops.attention import attention
from pyramidkv.ops.compact import Slots
from pyramidkv.ops.decode_attention import decode_attention, why_naive
from pyramidkv.ops.heads import head_limits
from pyramidkv.ops.packed_attention import packed_attention
from pyramidkv.ops.select import select
from pyramidkv.ops.valid import joined
from pyramidkv.packed import PackedStorage
from pyramidkv.parallel import first_head
from pyramidkv.plan import Plan, decoding_limits, limits, ring_size, shared_pages
from pyramidkv.recovery import Before, remember
from pyramidkv.ring import QueryRing
from pyramidkv.rotary import Rotary
from pyramidkv.scorers import Observation, Scorer
from pyramidkv.shape import cache_shape
from pyramidkv.storage import Storage
from pyramidkv.usage import LayerUsage


@dataclass(frozen=True)
class NewTokens:
    """Which of the tokens of one forward are real; what the mask function hands to every layer in place of a mask."""

    valid: Tensor | None  # (B, Q) bool, False for padding; None: all real
    counts: tuple[int, ...] | None  # real tokens of each row; None with `valid`

    def to(self, device: torch.device) -> NewTokens:
        """On the device of a layer; layers of one model may lie on several."""
        if self.valid is None or self.valid.device == device:
            return self
        return NewTokens(self.valid.to(device), self.counts)

    def without_last(self, tokens: int) -> NewTokens:
        """All but the last `tokens`, which must be real."""
        if self.valid is None or self.counts is None:
            return self
        return NewTokens(self.valid[:, :-tokens], tuple(n - tokens for n in self.counts))


ALL_REAL = NewTokens(None, None)


class PyramidKVLayer(CacheLayerMixin):  # type: ignore[misc]
    """The cache of one full-attention layer."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, layer: int, rank: int, plan: Plan, scorer: Scorer | None) -> None:
        super().__init__()
        self.layer = layer  # index in the model
        self.rank = rank  # index among the compressed layers
        self.plan = plan
        self.scorer = scorer
        self.storage: Storage | PackedStorage | None = None
        self.seen = 0  # columns seen, padding included: what transformers means by length
        self.counts: list[int] = []  # real tokens seen of each row
        self.held: list[int] = []  # real tokens stored of each row
        self.offset: Tensor | None = None  # (B, 1, 1) int32: what to add to a column for a row's position
        self.rotary: Rotary | None = None  # for a scorer that moves queries
        self.pool: Pool | None = None  # where buffers come from; None: from torch
        self.expected: list[int] = []  # real tokens that each row's prompt will have, if that was told
        self.among: tuple[list[int], int] | None = None  # tokens of all rows of a batch to join, first of these rows
        self.lasting: Tensor | None = None  # (B, Hkv, *) float16, of the newest slots: what the scorer said of new keys
        self.prompts: list[int] = []  # real tokens seen of each row after the last forward of several
        self.ring: QueryRing | None = None  # queries of decoded tokens, if a bound is set and the scorer looks at them
        self.full_at = 0  # slots at which to think of evicting while decoding; 0: not known yet
        self.scaling = 1.0  # of the logits, as the model last gave it
        self.settled = 0  # columns seen when something was last dropped or packed: `crop` goes back no further
        self.record_past = False  # transformers' word for assisted decoding
        self.before: Before | None = None  # where this layer was when the newest forward reached it
        self.drafts: int | None = None  # newest tokens of a forward that may be taken back: see `expect_drafts`

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
            columns = self._columns(key_states.shape[2], key_states.device)
            self.storage.append(key_states, value_states, columns, self._room)
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
            out = attention(query, key, value, scaling, valid, dropout, holes=self._leaves_holes(new, query.shape[2]))
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
        second = self.attend(query[:, :, end:], keys, values, ALL_REAL, scaling, dropout)
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
        old, (rows, heads, _, width) = self.storage.spec, key_states.shape
        for what, had, has in (
            ("rows", old.rows, rows),
            ("KV heads", old.heads, heads),
            ("channels a head", old.key_width, width),
            ("as dtype", self.storage.dtype, self._stored_as(key_states)),
        ):
            if had != has:
                raise ConfigError(
                    f"past_key_values was filled with {had} {what}; the new tokens have {has}: a cache goes on with "
                    "the model, the batch and the dtype that it began with; use another PyramidKVCache or reset() it"
                )

    @property
    def _room(self) -> int:
        return self.plan.config.room

    def _columns(self, new: int, device: torch.device) -> Tensor:
        """Positions of the next `new` columns, (1 or B, 1, new) int32, were all of them real."""
        columns = torch.arange(self.seen, self.seen + new, dtype=torch.int32, device=device)[None, None]
        return columns if self.offset is None else columns + self.offset

    def _positions(self, new: NewTokens, queries: int, heads: int, device: torch.device) -> Tensor:
        """Positions of the new tokens among the real tokens of their row, (B, H, Q) int32; -1 for padding."""
        columns = self._columns(queries, device)
        if new.valid is not None:
            pads = (~new.valid).cumsum(-1, dtype=torch.int32)[:, None]
            columns = (columns - pads).masked_fill(~new.valid[:, None], -1)
            total = -pads[..., -1:]
            self.offset = total if self.offset is None else self.offset + total
        return columns.expand(len(self.counts), heads, queries)

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
        if as_it_lies and why_naive(query) is None:
            if isinstance(storage, PackedStorage):
                return packed_attention(query, storage.pages, new.keys, new.values, new.length, new.start, scaling)
            if new.padded:
                return decode_attention(query, new.keys, new.values, new.length, new.start, scaling)
        if isinstance(storage, PackedStorage):
            key, value = storage.view(query.dtype)
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

    @torch.no_grad()
    def _evict(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, new: NewTokens, scaling: float
    ) -> None:
        """Bring the layer to its budget: score every key, keep the best, write them into a new buffer."""
        heads, slots = key.shape[1], key.shape[2]
        positions = self._positions(new, query.shape[2], heads, key.device)
        if self.storage is not None:
            positions = torch.cat([self.storage.positions[:, :, : self.storage.length], positions], dim=2)
        final = [max(pair) for pair in zip(self.counts, self.expected or self.counts, strict=True)]
        everyone, at = self.among or (final, 0)
        allowed = limits(self.plan, self.rank, everyone, itemsize=self._stored_as(key).itemsize)
        available = self.held
        self.held = [min(pair) for pair in zip(available, allowed[at:], strict=False)]
        width = max(self.held) if self.among is None else max(min(pair) for pair in zip(everyone, allowed, strict=True))
        padded = min(self.held) < width
        lasting = self._lasting(positions, query.shape[2])
        if width == slots and not padded and not isinstance(self.storage, PackedStorage):
            if self.plan.config.packs:
                self.settled = self.seen + query.shape[2]
            if lasting is not None:
                self._score(query, key, value, valid, positions, scaling, lasting)
            self._keep(key, value, positions, None, self.held, padded, available)
            self.lasting = lasting
            return
        self.settled = self.seen + query.shape[2]
        chosen = self._choose(query, key, value, valid, positions, scaling, self.held, available, width, lasting)
        self._keep(key, value, positions, *chosen, padded, available)
        self.lasting = None
        if lasting is not None and self._unfinished:
            index = chosen[0]
            self.lasting = lasting.gather(2, index.clamp(min=0)).masked_fill_(index < 0, 0.0)

    @property
    def _unfinished(self) -> bool:
        """Whether more of the prompt was announced than has come."""
        return any(n < m for n, m in zip(self.counts, self.expected, strict=False))

    def _lasting(self, positions: Tensor, new: int) -> Tensor | None:
        """(B, Hkv, K) float16: what the scorer said of the stored keys when they were new, 0 for the `new` ones."""
        if not getattr(self.scorer, "lasts", False) or not (self._unfinished or self.lasting is not None):
            return None
        empty = torch.zeros(positions.shape, dtype=torch.float16, device=positions.device)
        # Tokens that came one by one in between would lie at its end: then all begins anew.
        if self.lasting is not None and self.storage is not None and not self.storage.newest.appended:
            both = min(self.lasting.shape[2], positions.shape[2] - new)  # those in front are empty slots
            end = positions.shape[2] - new
            empty[:, :, end - both : end] = self.lasting[:, :, self.lasting.shape[2] - both :]
        return empty

    def make_room(self, new: int) -> None:
        """Before `new` tokens are added while decoding: evict, if that many would be too many for `slack`."""
        held = self.overfull(new)
        if held is not None:
            self.evict_decoded(held)

    def overfull(self, new: int) -> list[int] | None:
        """Tokens that each row must be brought down to before `new` more come while decoding; None: there is room."""
        storage, slack = self.storage, self.plan.config.slack
        if slack is None or storage is None or storage.length + new <= self.full_at:
            return None
        itemsize = storage.spec.itemsize
        allowed = decoding_limits(self.plan, self.rank, self.counts, self.prompts, itemsize=itemsize, ahead=slack)
        # Packing leaves slots that no row uses.
        empty = storage.length - max(self.held) if isinstance(storage, PackedStorage) else 0
        self.full_at = max(allowed) + slack + empty
        above = any(n > limit for n, limit in zip(self.held, allowed, strict=True))
        asked = self.ring is None or self.ring.count > 0  # with no query to choose by, it waits for one
        if not (above and asked and storage.length + new > self.full_at):
            return None
        return [min(n, limit) for n, limit in zip(self.held, allowed, strict=True)]

    @property
    def crowded(self) -> bool:
        """Whether `make_room` for the next token might evict."""
        return self.plan.config.slack is not None and (self.storage is None or self.storage.length >= self.full_at)

    @torch.no_grad()
    def evict_decoded(self, held: list[int]) -> None:
        """Keep `held` tokens of each row in the middle of decoding, in the buffers that it has."""
        storage, padded = self.storage, min(held) < max(held)
        assert storage is not None
        slots = self.slots()
        index, each = self.survivors(slots, held)
        if isinstance(storage, PackedStorage):
            available, self.held = self.held, held
            del storage  # what is kept is to lie where the old pages were: `slots` are copies
            self._keep(*slots, index, each, padded, available)
        else:
            storage.keep(index, padded)
        self.evicted(held)

    def slots(self) -> Slots:
        """Keys, values and positions in use; those of a packed layer are unpacked."""
        assert self.storage is not None
        return *self.storage.view(), self.storage.positions[:, :, : self.storage.length]

    def survivors(self, slots: Slots, held: list[int]) -> tuple[Tensor, Sequence[int] | Tensor]:
        """Which of `slots()` an eviction of decoded tokens keeps, and how many, as `_choose` gives them."""
        key, value, positions = slots
        assert self.storage is not None
        query = key[:, :, :0] if self.ring is None else self.ring.newest(self.storage.newest.length)
        valid = self.storage.valid()
        return self._choose(query, key, value, valid, positions, self.scaling, held, self.held, max(held))

    def evicted(self, held: list[int]) -> None:
        """Take note of an eviction of decoded tokens."""
        self.held = held
        if self.ring is not None:
            self.ring.drop(self.ring.count)
        self.settled, self.full_at = self.seen, 0

    def _open_ring(self, query: Tensor) -> None:
        """Make ready for decoding after a forward of several tokens."""
        self.prompts, self.full_at = list(self.counts), 0
        size = ring_size(self.plan.config)
        if size is None:
            return
        if self.ring is None:
            self.ring = QueryRing.allocate(query, size, self._stored_as(query))
        self.ring.drop(self.ring.count)

    def _choose(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        positions: Tensor,
        scaling: float,
        held: list[int],
        available: list[int],
        width: int,
        lasting: Tensor | None = None,
    ) -> tuple[Tensor, Sequence[int] | Tensor]:
        """The slots to keep, (B, H, width) as `select` gives them, `held` of each row; and how many, as it was told."""
        scores = self._score(query, key, value, valid, positions, scaling, lasting)
        recent = self.plan.config.recent
        each: Sequence[int] | Tensor = held
        if self.plan.config.heads == "adaptive":
            each, width = head_limits(scores, held, available, recent, valid), scores.shape[2]
        return select(scores, each, width, recent=recent, valid=valid, finite=True), each

    def _score(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        positions: Tensor,
        scaling: float,
        lasting: Tensor | None,
    ) -> Tensor:
        """(B, H, K): the method's word on every slot."""
        if self.scorer is None:
            return positions.float()  # nothing is dropped but padding: any finite score will do
        first = first_head(self.plan.shape.layers[self.layer].kv_heads, key.shape[1])
        seen = Observation(
            query, key, value, scaling, valid, positions, self.counts, self.layer, first, self.rotary, lasting
        )
        scores = self.scorer.score(seen)
        if scores.shape != positions.shape:
            raise ConfigError(
                f"method={self.plan.config.method!r}: score() returned {tuple(scores.shape)}; "
                f"it must be (B, Hkv, K), here {tuple(positions.shape)}"
            )
        return scores

    def _stored_as(self, like: Tensor) -> torch.dtype:
        name = self.plan.config.kv_dtype
        dtype: torch.dtype = like.dtype if name == "auto" else getattr(torch, name)
        return dtype

    def _keep(
        self,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        index: Tensor | None,
        each: Sequence[int] | Tensor,
        padded: bool,
        available: list[int],
    ) -> None:
        """Store the slots `index`, `each` of a row or head, or all."""
        config, dtype = self.plan.config, self._stored_as(key)
        even = not isinstance(self.storage, PackedStorage)
        self.storage = None  # the old buffers may go before the new ones are made
        if config.packs:
            if index is None:
                index = torch.arange(key.shape[2], device=key.device).expand(positions.shape)
            self.storage = PackedStorage.gather(
                key,
                value,
                positions,
                index,
                each,
                config.bits,
                shared_pages(config, key.shape[1], self.held, available, even),
                recent=config.recent,
                tokens=max(self.counts),
                room=config.free,
                padded=padded,
                dtype=dtype,
                pool=self.pool,
            )
        elif index is None:
            self.storage = Storage.whole(key, value, positions, config.free, dtype, self.pool)
        else:
            self.storage = Storage.gather(key, value, positions, index, config.free, padded, dtype, self.pool)

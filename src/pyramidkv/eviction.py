"""What a layer holds, and how it comes back to its budget: the half of `layer.py` that knows nothing of a model.

Scores, budgets and buffers live in files of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyramidkv.errors import ConfigError
from pyramidkv.new_tokens import NewTokens
from pyramidkv.ops.compact import Slots
from pyramidkv.ops.heads import head_limits
from pyramidkv.ops.read_back import ReadBack
from pyramidkv.ops.select import select
from pyramidkv.packed import PackedStorage
from pyramidkv.parallel import first_head
from pyramidkv.plan import Plan, decoding_limits, limits, ring_size, shared_pages
from pyramidkv.pool import Pool
from pyramidkv.recovery import Before
from pyramidkv.ring import QueryRing
from pyramidkv.rotary import Rotary, Turn
from pyramidkv.scorers import Observation, Scorer
from pyramidkv.storage import Storage


class EvictingLayer:
    """What one layer holds. It evicts after each forward of several tokens and, if it has a bound, while decoding."""

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
        self.full_at = 0  # newest slots at which to think of evicting while decoding; 0: not known yet
        self.scaling = 1.0  # of the logits, as the model last gave it
        self.settled = 0  # columns seen when something was last dropped or packed: `crop` goes back no further
        self.record_past = False  # transformers' word for assisted decoding
        self.unread = False  # nobody reads what the layer gives to this forward: see `unread.py`
        self.before: Before | None = None  # where this layer was when the newest forward reached it
        self.drafts: int | None = None  # newest tokens of a forward that may be taken back: see `expect_drafts`

    # After a forward of several tokens.

    @torch.no_grad()
    def _evict(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, new: NewTokens, scaling: float
    ) -> None:
        """Bring the layer to its budget: score every key, keep the best, write them into a new buffer."""
        queries, slots = query.shape[2], key.shape[2]
        columns, self.offset = new.positions(self.seen, queries, self.offset, key.device)
        positions = columns.expand(*key.shape[:2], queries)
        if self.storage is not None:
            positions = torch.cat([self.storage.positions[:, :, : self.storage.length], positions], dim=2)
        lasting = self._lasting(positions, queries)
        seen = self._observation(query, (key, value, positions), scaling, valid, self._back(key.device), lasting)
        available = self.held
        self.held, width = self._budget(key)
        padded = min(self.held) < width
        if width == slots and not padded and not isinstance(self.storage, PackedStorage):
            if self.plan.config.packs(self.rank):
                self.settled = self.seen + queries
            if lasting is not None:
                self._score(seen)
            self._keep(seen, None, self.held, padded, available)
            self.lasting = lasting
            return
        self.settled = self.seen + queries
        index, each = self._choose(seen, self.held, available, width)
        self._keep(seen, index, each, padded, available)
        self.lasting = None
        if lasting is not None and self._unfinished:
            self.lasting = lasting.gather(2, index.clamp(min=0)).masked_fill_(index < 0, 0.0)

    def _budget(self, key: Tensor) -> tuple[list[int], int]:
        """Tokens that may be held of each row, and the most of any row of its batch."""
        final = [max(pair) for pair in zip(self.counts, self.expected or self.counts, strict=True)]
        everyone, at = self.among or (final, 0)
        allowed = limits(self.plan, self.rank, everyone, itemsize=self._stored_as(key).itemsize)
        held = [min(pair) for pair in zip(self.held, allowed[at:], strict=False)]
        width = max(held) if self.among is None else max(min(pair) for pair in zip(everyone, allowed, strict=True))
        return held, width

    def _observation(
        self,
        query: Tensor,
        slots: Slots,
        scaling: float,
        valid: Tensor | None,
        back: Turn | None,
        lasting: Tensor | None = None,
    ) -> Observation:
        """What this layer shows its scorer."""
        key, value, positions = slots
        whole = self.plan.shape.layers[self.layer].kv_heads
        first = 0 if self.scorer is None else first_head(whole, key.shape[1])
        return Observation(query, key, value, scaling, valid, positions, self.counts, self.layer, first, back, lasting)

    def _back(self, device: torch.device) -> Turn | None:
        """What turns the keys of a row back by as many tokens as it has, for a scorer that moves."""
        return None if self.rotary is None else self.rotary.angles([-n for n in self.counts], device)

    def _choose(
        self, seen: Observation, held: list[int], available: list[int], width: int
    ) -> tuple[Tensor, Sequence[int] | Tensor]:
        """The slots to keep, (B, H, width) as `select` gives them, `held` of each row; and how many, as it was told."""
        scores = self._score(seen)
        recent = self.plan.config.recent
        each: Sequence[int] | Tensor = held
        if self.plan.config.heads == "adaptive":
            each, width = head_limits(scores, held, available, recent, seen.valid), scores.shape[2]
        return select(scores, each, width, recent=recent, valid=seen.valid, finite=True), each

    def _score(self, seen: Observation) -> Tensor:
        """(B, H, K): the method's word on every slot."""
        if self.scorer is None:
            return seen.positions.float()  # nothing is dropped but padding: any finite score will do
        scores = self.scorer.score(seen)
        if scores.shape != seen.positions.shape:
            raise ConfigError(
                f"method={self.plan.config.method!r}: score() returned {tuple(scores.shape)}; "
                f"it must be (B, Hkv, K), here {tuple(seen.positions.shape)}"
            )
        return scores

    def _keep(
        self,
        seen: Observation,
        index: Tensor | None,
        each: Sequence[int] | Tensor,
        padded: bool,
        available: list[int],
    ) -> None:
        """Store the slots `index`, `each` of a row or head, or all."""
        key, value, positions = seen.key, seen.value, seen.positions
        config, dtype = self.plan.config, self._stored_as(key)
        even = not isinstance(self.storage, PackedStorage)
        self.storage = None  # the old buffers may go before the new ones are made
        if config.packs(self.rank):
            if index is None:
                index = torch.arange(key.shape[2], device=key.device).expand(positions.shape)
            self.storage = PackedStorage.gather(
                key,
                value,
                positions,
                index,
                each,
                config.bits_of(self.rank),
                shared_pages(config, key.shape[1], self.held, available, even),
                recent=config.recent,
                tokens=max(self.counts),
                room=config.free,
                padded=padded,
                dtype=dtype,
                pool=self.pool,
                again=self._unfinished or config.slack is not None,
            )
        elif index is None:
            self.storage = Storage.whole(key, value, positions, config.free, dtype, self.pool)
        else:
            self.storage = Storage.gather(key, value, positions, index, config.free, padded, dtype, self.pool)

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

    def _stored_as(self, like: Tensor) -> torch.dtype:
        name = self.plan.config.kv_dtype
        dtype: torch.dtype = like.dtype if name == "auto" else getattr(torch, name)
        return dtype

    # While decoding.

    def make_room(self, new: int) -> None:
        """Before `new` tokens are added while decoding: evict, if that many would be too many for `slack`."""
        held = self.overfull(new)
        if held is not None:
            self.evict_decoded(held)

    def overfull(self, new: int) -> list[int] | None:
        """Tokens that each row must be brought down to before `new` more come while decoding; None: there is room."""
        storage, slack = self.storage, self.plan.config.slack
        if slack is None or storage is None or storage.newest.length + new <= self.full_at:
            return None
        itemsize, length = storage.spec.itemsize, storage.newest.length
        allowed = decoding_limits(self.plan, self.rank, self.counts, self.prompts, itemsize=itemsize, ahead=slack)
        packed = max(self.held) - length if isinstance(storage, PackedStorage) else 0
        self.full_at = max(allowed) + slack - packed
        above = any(n > limit for n, limit in zip(self.held, allowed, strict=True))
        asked = self.ring is None or self.ring.count > 0  # with no query to choose by, it waits for one
        if not (above and asked and length + new > self.full_at):
            return None
        return [min(n, limit) for n, limit in zip(self.held, allowed, strict=True)]

    @property
    def crowded(self) -> bool:
        """Whether `make_room` for the next token might evict."""
        slack, storage = self.plan.config.slack, self.storage
        return slack is not None and (storage is None or storage.newest.length >= self.full_at)

    @torch.no_grad()
    def evict_decoded(self, held: list[int]) -> None:
        """Keep `held` tokens of each row in the middle of decoding, in the buffers that it has if they serve."""
        self.widen()
        if self.stays(held):
            self.evicted(held, self.thin(held, self.back()))
            return
        seen, available = self._observed(self.back()), self.held
        index, each = self._choose(seen, held, available, max(held))
        self.held = held
        self._keep(seen, index, each, min(held) < max(held), available)
        self._asked_anew()

    def widen(self) -> None:
        """Have room for what evictions while decoding leave: of a packed layer, slots and bits."""
        if isinstance(self.storage, PackedStorage):
            self.storage.widen(max(self.counts))

    def stays(self, held: list[int]) -> bool:
        """Whether what an eviction while decoding leaves has room where the layer lies, once that is wide enough."""
        storage = self.storage
        if not isinstance(storage, PackedStorage):
            return not self.plan.config.packs(self.rank)  # there was nothing to pack yet
        recent = self.plan.config.recent
        kept = max(held) if self.plan.config.heads == "uniform" else storage.length
        return storage.has_room(kept, self._pages(held), recent)

    def thin(self, held: list[int], back: Turn | None) -> Tensor:
        """Write what an eviction while decoding keeps to where the layer lies, and give it, (B, H, *) as `select` does.

        This is work on the device alone: the host takes note of it in `evicted`. Where rows are alike nothing is copied
        to the device, and launches are the same as long as slots, buffers and the numbers of tokens held are; `back` is
        what changes with the tokens seen.
        """
        storage, seen = self.storage, self._observed(back)
        index, each = self._choose(seen, held, self.held, max(held))
        if isinstance(storage, PackedStorage):
            slots = seen.key, seen.value, seen.positions
            storage.compact(slots, index, each, self._pages(held), self.plan.config.recent)
        else:
            assert storage is not None
            storage.compact(index)
        return index

    def evicted(self, held: list[int], index: Tensor | None = None, asked: ReadBack | None = None) -> None:
        """Take note of what `thin` has kept; without the slots that it gave, all rows have kept as many.

        For `asked` see `Pages.written_over`.
        """
        storage, padded = self.storage, min(held) < max(held)
        assert storage is not None
        if isinstance(storage, PackedStorage):
            length = self.plan.config.recent
            storage.cut(length, padded, asked)
        else:
            length = max(held)
            storage.cut(length, padded)
        if padded:
            assert index is not None
            storage.newest.start = (index[:, :, index.shape[2] - length :] < 0).sum(-1, dtype=torch.int32)
        self.held = held
        self._asked_anew()

    def back(self) -> Turn | None:
        """`_back` while decoding."""
        assert self.storage is not None
        return self._back(self.storage.newest.keys.device)

    def _observed(self, back: Turn | None) -> Observation:
        """What the layer shows its scorer while decoding: all slots in use; those of a packed layer are unpacked."""
        storage = self.storage
        assert storage is not None
        key, value = storage.view()
        slots = key, value, storage.positions[:, :, : storage.length]
        query = key[:, :, :0] if self.ring is None else self.ring.newest(storage.newest.length)
        return self._observation(query, slots, self.scaling, storage.valid(), back)

    def _pages(self, held: list[int]) -> int | None:
        """Pages of a row after an eviction while decoding, as `shared_pages` gives them."""
        storage = self.storage
        assert storage is not None
        return shared_pages(self.plan.config, storage.spec.heads, held, self.held, even=False)

    def _asked_anew(self) -> None:
        """Count queries from here on, and columns that can be taken back."""
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

"""What a cache holds, layer by layer: the proof that compression ran."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerUsage:
    """One layer of a cache. Token counts are of the longest row."""

    layer: int
    compressed: bool  # False: a sliding-window layer, which stays as the model has it
    seen_tokens: int  # padding not counted
    kept_tokens: int  # with the tokens generated since the last eviction
    packed: bool  # some of them in fewer bits
    kv_bytes: int  # bytes of the storages: keys, values, positions, room for new tokens
    full_kv_bytes: int  # keys and values of every column seen, as an uncompressed cache holds them


@dataclass(frozen=True)
class CacheUsage:
    """A whole cache."""

    method: str
    layers: tuple[LayerUsage, ...]

    @property
    def kv_bytes(self) -> int:
        return sum(layer.kv_bytes for layer in self.layers)

    @property
    def full_kv_bytes(self) -> int:
        return sum(layer.full_kv_bytes for layer in self.layers)

    @property
    def keep(self) -> float:
        """Kept tokens over seen tokens, averaged over the compressed layers; 1.0 for an empty cache."""
        seen = sum(layer.seen_tokens for layer in self.layers if layer.compressed)
        kept = sum(layer.kept_tokens for layer in self.layers if layer.compressed)
        return kept / seen if seen else 1.0

    @property
    def evicted(self) -> bool:
        """Whether any token was dropped anywhere."""
        return any(layer.kept_tokens < layer.seen_tokens for layer in self.layers if layer.compressed)

    @property
    def shrunk(self) -> bool:
        """Whether anything was dropped or packed: False means that compression did not take place."""
        return self.evicted or any(layer.packed for layer in self.layers)

    def __str__(self) -> str:
        head = f"{'layer':>5} {'seen':>7} {'kept':>7} {'bytes':>13} {'full bytes':>13}"
        rows = [
            f"{u.layer:>5} {u.seen_tokens:>7} {u.kept_tokens:>7} {u.kv_bytes:>13,} {u.full_kv_bytes:>13,}"
            + ("" if u.compressed else "  sliding window, not compressed")
            for u in self.layers
        ]
        share = f" ({self.kv_bytes / self.full_kv_bytes:.1%})" if self.full_kv_bytes else ""
        total = (
            f"{self.method}: {self.keep:.1%} of the tokens, {self.kv_bytes:,} of {self.full_kv_bytes:,} bytes{share}"
        )
        return "\n".join([head, *rows, total])

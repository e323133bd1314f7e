"""An independent definition of the method, for one unpadded row: everything is kept, and evicted keys are masked.

Plain loops in float64, written from the papers and sharing no code with the package. It runs inside the plain model, on
a plain `DynamicCache`, as an attention function of its own.
"""

import math

import torch
from transformers import AttentionInterface

NAME = "masked_reference"


class Reference:
    """Evicts like PyramidKV (or SnapKV, with `pyramid=False`) after every forward of more than one query.

    With `slack`, also before a single token that would be one more than budget + slack.
    """

    def __init__(
        self, layers, budget=None, keep=None, window=8, recent=None, kernel=5, beta=20.0, pyramid=True, slack=None
    ):
        self.layers = layers  # model indices of the compressed layers
        self.budget, self.keep = budget, keep
        self.window, self.kernel, self.beta, self.pyramid = window, kernel, beta, pyramid
        self.recent = window if recent is None else recent
        self.slack = slack
        self.decoded = {}  # layer -> (column, query) of the tokens decoded since the last eviction
        self.alive = {}  # layer -> [KV head] -> set of columns still there
        AttentionInterface.register(NAME, self)

    def budgets(self, seen):
        """Rounded budgets: only for settings in which the paper's formula is whole-numbered or checked elsewhere."""
        m = len(self.layers)
        average = self.budget if self.keep is None else self.keep * seen
        average = max(average, self.recent + 1)
        if average >= seen:
            return [seen] * m
        if not self.pyramid:
            return [math.floor(average)] * m
        x = average - self.recent
        top = x / self.beta
        bottom = 2 * x - top
        exact = [self.recent + bottom - (bottom - top) * i / (m - 1) for i in range(m)]
        assert all(abs(e - round(e)) < 1e-9 for e in exact), exact
        assert all(self.recent < e <= seen for e in exact), exact
        return [round(e) for e in exact]

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        layer = module.layer_idx
        kv_heads, keys = key.shape[1], key.shape[2]
        heads, queries = query.shape[1], query.shape[2]
        groups = heads // kv_heads
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        q, k, v = query[0].double(), key[0].double(), value[0].double()
        sliding = getattr(module, "sliding_window", None) if layer not in self.layers else None
        alive = self.alive.setdefault(layer, [set() for _ in range(kv_heads)])
        start = keys - queries
        if sliding is None:
            if queries == 1 and self.slack is not None:
                self.make_room(layer, alive, k, scaling, start)
                self.decoded[layer].append((start, q[:, 0]))
            for kept in alive:
                kept.update(range(start, keys))
        out = torch.zeros(heads, queries, v.shape[-1], dtype=torch.float64)
        probability = torch.zeros(heads, queries, keys, dtype=torch.float64)
        for h in range(heads):
            for i in range(queries):
                columns = [
                    c
                    for c in range(start + i + 1)
                    if (c in alive[h // groups] if sliding is None else c > start + i - sliding)
                ]
                logits = (k[h // groups, columns] @ q[h, i]) * scaling
                p = torch.softmax(logits, 0)
                probability[h, i, columns] = p
                out[h, i] = p @ v[h // groups, columns]
        if queries > 1 and layer in self.layers:
            self.decoded[layer] = []
            limit = self.budgets(keys)[self.layers.index(layer)]
            for g in range(kv_heads):
                self.evict(alive, g, probability[g * groups : (g + 1) * groups], keys, limit)
        return out.to(query.dtype).transpose(0, 1)[None], None

    def make_room(self, layer, alive, k, scaling, seen):
        limit = self.budgets(seen)[self.layers.index(layer)]
        if len(alive[0]) + 1 <= limit + self.slack:
            return
        asking = self.decoded[layer][-self.slack :]
        groups = asking[0][1].shape[0] // len(alive)
        for g, kept in enumerate(alive):
            probability = torch.zeros(groups, len(asking), seen, dtype=torch.float64)
            for i, (column, q) in enumerate(asking):
                columns = [c for c in kept if c <= column]
                for h in range(groups):
                    logits = (k[g, columns] @ q[g * groups + h]) * scaling
                    probability[h, i, columns] = torch.softmax(logits, 0)
            self.evict(alive, g, probability, seen, limit)
        self.decoded[layer] = []

    def evict(self, alive, g, probability, keys, limit):
        columns = sorted(alive[g])
        if len(columns) <= limit:
            return
        window = min(self.window, probability.shape[1])
        score = probability[:, -window:].mean(0).mean(0)[columns]
        newest = set(columns[-self.recent :]) if self.recent else set()
        old = [c for c in columns if c not in newest]
        half = self.kernel // 2
        raw = {c: score[i].item() for i, c in enumerate(columns)}
        pooled = {}
        for i, c in enumerate(old):
            near = [raw[old[j]] for j in range(max(0, i - half), min(len(old), i + half + 1))]
            pooled[c] = sum(near) / len(near)
        best = sorted(old, key=lambda c: -pooled[c])[: limit - len(newest)]
        alive[g] = newest | set(best)

"""What the tests of evictions between captured steps share."""

import copy

import torch

import pyramidkv
from pyramidkv.methods import METHODS, register
from pyramidkv.scorers import EchoScorer


class Swinging(EchoScorer):
    """As echo, but which heads score high changes with the tokens seen: as the angles do that turn keys back."""

    replays = True

    def score(self, seen):
        return super().score(seen) * (1.2 + seen.back[0][:, : seen.key.shape[1], None])


SWINGING = {"method": "swinging", "heads": "adaptive", "bits": 4}


def swinging():
    """The method above, for a fixture."""
    register("swinging", window=8, recent=8, kernel=1)(Swinging)
    yield
    del METHODS["swinging"]


def held_by(layer):
    """All that a layer holds, the number of slots that its heads have unpacked, and pages of each head."""
    storage, new = layer.storage, layer.storage.newest
    found = [t[:, :, : new.length] for t in new.buffers()]
    if storage is new:
        return found, 0, []
    found += [storage.positions, *storage.view(), *storage.pages.tensors().values()]
    return found, storage.pages.slots, storage.pages.count.flatten().tolist()


@torch.no_grad()
def after_evictions(plain, prompts, new, options, between=lambda evictions, layers: None):
    """What the layers hold after each eviction while the tokens `new` are fed, and what evicted.

    `between` is told how many evictions there have been, after each of them.
    """
    found = []
    with pyramidkv.compress(plain, **options) as session:
        for prompt in prompts:
            cache = plain(prompt).past_key_values
            for i in range(new.shape[1]):
                plain(new[:, i : i + 1], past_key_values=cache)
                if i and cache.layers[0].settled == cache.layers[0].seen - 1:
                    found.append([held_by(layer) for layer in copy.deepcopy(cache.layers)])
                    between(len(found), cache.layers)
            del cache
    return found, session._graph.evictions


def alike(got, expected):
    """Whether layers hold the same, to the last bit."""
    pairs = [pair for layers in zip(got, expected, strict=True) for pair in zip(*layers, strict=True)]
    return all(all(map(torch.equal, a[0], b[0])) and a[1:] == b[1:] for a, b in pairs)

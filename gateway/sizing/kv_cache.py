"""How many tokens a KV cache holds, counted as vLLM 0.32 does: in blocks, by groups of layers of one kind."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.sizing.architecture import CHUNKED, FULL, RECURRENT, SLIDING, Architecture

# Tokens of a block on CUDA.
BLOCK = 16


@dataclass(frozen=True)
class Cache:
    """The cache of one GPU. A block holds `block_bytes` of the pool; a request of `length` takes `blocks` of them."""

    length: int
    block_bytes: int
    blocks: int

    @property
    def request_bytes(self) -> int:
        """What one request of the whole length needs, with the one block that vLLM keeps back."""
        return (self.blocks + 1) * self.block_bytes

    def concurrency(self, size: float) -> float:
        """How many requests of the whole length `size` bytes hold."""
        return max(0, int(size) // self.block_bytes) / self.blocks

    def tokens(self, size: float) -> int:
        """What vLLM logs as the cache's size, in tokens, for `size` bytes."""
        return int(self.concurrency(size) * self.length)


def bytes_per_token(model: Architecture, tp: int, width: int) -> int:
    """Of one layer on one of `tp` GPUs, for a cache of `width` bytes a number. MLA's latent is on each of them."""
    if model.latent:
        return model.latent * width
    return 2 * max(1, model.kv_heads // tp) * model.head_dim * width


def cache_of(model: Architecture, tp: int, width: int, length: int, in_flight: int) -> Cache:
    """The cache of one of `tp` GPUs, for requests of `length` tokens.

    `in_flight` are the tokens of steps that run: a window's blocks are free again only after them. Recurrent layers'
    states are left out.
    """
    counts = {kind: count for kind, count in model.layers.items() if count and kind != RECURRENT}
    fewest, most = min(counts.values()), max(counts.values())
    # All kinds share one pool, so that each is split into groups of one size; what is over is padding.
    size = most if most < 1.5 * fewest else fewest
    request = {
        FULL: _blocks(length),
        SLIDING: _blocks(min(model.window - 1 + in_flight, length)) + 1,
        CHUNKED: _blocks(min(model.window + in_flight, length)),
    }
    blocks = sum(-(-count // size) * request[kind] for kind, count in counts.items())
    return Cache(length, BLOCK * bytes_per_token(model, tp, width) * size, blocks)


def longest(model: Architecture, tp: int, width: int, in_flight: int, size: float, most: int) -> int:
    """The longest request, of at most `most` tokens and in whole blocks, that `size` bytes hold; 0 if not a block."""
    low, high = 0, most // BLOCK
    while low < high:
        middle = (low + high + 1) // 2
        if cache_of(model, tp, width, middle * BLOCK, in_flight).request_bytes <= size:
            low = middle
        else:
            high = middle - 1
    return low * BLOCK


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)

"""Counts the tokens that a KV cache holds, as vLLM 0.32 does: in blocks, by groups of layers of one kind."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.sizing.architecture import CHUNKED, FULL, RECURRENT, SLIDING, Architecture

# Tokens per block on CUDA.
BLOCK = 16


@dataclass(frozen=True)
class Cache:
    """The cache of one GPU. A block holds `block_bytes` of the pool; a request of `length` takes `blocks` of them."""

    length: int
    block_bytes: int
    blocks: int

    @property
    def request_bytes(self) -> int:
        """Bytes for one request of the full length, with the one block that vLLM keeps back."""
        return (self.blocks + 1) * self.block_bytes

    def concurrency(self, size: float) -> float:
        """The number of requests of the full length that `size` bytes hold."""
        return max(0, int(size) // self.block_bytes) / self.blocks

    def tokens(self, size: float) -> int:
        """The cache's size in tokens that vLLM logs for `size` bytes."""
        return int(self.concurrency(size) * self.length)


def bytes_per_token(model: Architecture, tp: int, width: int) -> int:
    """Bytes per token of one layer on one of `tp` GPUs, with `width` bytes per number; MLA's latent is on each GPU."""
    if model.latent:
        return model.latent * width
    return 2 * max(1, model.kv_heads // tp) * model.head_dim * width


def cache_of(model: Architecture, tp: int, width: int, length: int, in_flight: int) -> Cache:
    """The cache of one of `tp` GPUs, for requests of `length` tokens.

    `in_flight` are the tokens of the running steps: only after these steps are the blocks of a window free again. The
    states of recurrent layers are not counted.
    """
    counts = {kind: count for kind, count in model.layers.items() if count and kind != RECURRENT}
    fewest, most = min(counts.values()), max(counts.values())
    # All kinds of layers share one pool, so each kind is split into groups of one size, with padding in the last group.
    size = most if most < 1.5 * fewest else fewest
    request = {
        FULL: _blocks(length),
        SLIDING: _blocks(min(model.window - 1 + in_flight, length)) + 1,
        CHUNKED: _blocks(min(model.window + in_flight, length)),
    }
    blocks = sum(-(-count // size) * request[kind] for kind, count in counts.items())
    return Cache(length, BLOCK * bytes_per_token(model, tp, width) * size, blocks)


def longest(model: Architecture, tp: int, width: int, in_flight: int, size: float, most: int) -> int:
    """The longest request that `size` bytes hold, of at most `most` tokens, in whole blocks; 0 if not one block."""
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

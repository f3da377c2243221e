"""A body as the pieces that it came in, where many small ones take no more memory than what they hold."""

from __future__ import annotations

from typing import Final

# A piece of fewer bytes is held together with its neighbours, as each object has a cost of some 60 bytes.
_SMALL: Final = 1024


def add_piece(pieces: list[bytes | bytearray], piece: bytes) -> None:
    """Add a piece; a small one becomes part of the last before it, if that is made of small ones, too."""
    if not pieces or len(piece) >= _SMALL:
        pieces.append(piece)
    elif type(last := pieces[-1]) is bytearray:
        last += piece
    else:
        pieces.append(bytearray(piece))

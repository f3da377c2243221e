"""A body as a list of the received pieces, in which many small pieces take little more memory than their bytes."""

from __future__ import annotations

from typing import Final

# A piece of fewer bytes is merged with its neighbours, as each object costs some 60 bytes.
_SMALL: Final = 1024


def add_piece(pieces: list[bytes | bytearray], piece: bytes) -> None:
    """Add a piece; a small piece is appended to the last one if that one consists of small pieces, too."""
    if not pieces or len(piece) >= _SMALL:
        pieces.append(piece)
    elif type(last := pieces[-1]) is bytearray:
        last += piece
    else:
        pieces.append(bytearray(piece))

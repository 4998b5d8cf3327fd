"""What is written in parts is put together here, as a file has it."""

from __future__ import annotations

from qcompress.coding.spool import Spool
from qcompress.coding.stored import Stored
from qcompress.coding.unbounded.streams import encode_streams
from qcompress.coding.unbounded.tables import Pool, Source


def bytes_of(stored: Stored) -> bytes:
    return b"".join(map(bytes, stored.pieces()))


def streams_of(source: Source, pool: Pool) -> bytes:
    """The payload of the only matrix of a pool."""
    body = Spool()
    index = encode_streams(source, pool.levels[0], pool.tables, body)
    return bytes_of(body.stored(index))

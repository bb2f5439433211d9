"""A stable hash of text, over whole Arrow arrays at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_OFFSET_BASIS = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x100000001B3)
#: The group of rows that have none: the hash of missing texts.
NO_GROUP = int(_OFFSET_BASIS.astype(np.int64))


def fnv1a(texts: pa.LargeStringArray) -> npt.NDArray[np.uint64]:
    """FNV-1a with 64 bits of the UTF-8 bytes of each text; missing texts hash like empty ones.

    The hash is the same on every machine and in every version (draft-eastlake-fnv).

    Args:
        texts (pa.LargeStringArray): n texts.

    Returns:
        npt.NDArray[np.uint64]: n hashes.

    Example:
        >>> [hex(h) for h in fnv1a(pa.array(["", "a", "foobar"], pa.large_string()))]
        ['0xcbf29ce484222325', '0xaf63dc4c8601ec8c', '0x85944171f73967e8']
    """
    hashes = np.full(len(texts), _OFFSET_BASIS)
    _, offset_buffer, byte_buffer = texts.buffers()
    if not len(texts) or byte_buffer is None:
        return hashes
    window = slice(texts.offset, texts.offset + len(texts) + 1)
    offsets = np.frombuffer(offset_buffer, np.int64)[window]
    octets = np.frombuffer(byte_buffer, np.uint8)
    starts, lengths = offsets[:-1], np.diff(offsets)
    if texts.null_count:
        lengths = np.where(texts.is_valid().to_numpy(zero_copy_only=False), lengths, 0)
    # One step per byte position, over all texts that are long enough.
    alive = np.flatnonzero(lengths)
    position = 0
    while alive.size:
        hashes[alive] = (hashes[alive] ^ octets[starts[alive] + position]) * _PRIME
        position += 1
        alive = alive[lengths[alive] > position]
    return hashes


def hash_to_rows(texts: pa.LargeStringArray, size: int) -> npt.NDArray[np.int32]:
    """Table rows 1..size by hash, and row 0 for missing texts.

    The two halves of the hash are folded first, since the low bits of FNV-1a depend on the low
    bits of the text alone.

    Args:
        texts (pa.LargeStringArray): n texts.
        size (int): rows to spread over, below 2**31.

    Returns:
        npt.NDArray[np.int32]: n rows.

    Example:
        >>> hash_to_rows(pa.array(["u1", "u2", None], pa.large_string()), 1000).tolist()
        [381, 282, 0]
    """
    hashes = fnv1a(texts)
    rows = ((hashes ^ (hashes >> np.uint64(32))) % np.uint64(size)).astype(np.int32) + 1
    if texts.null_count:
        rows[texts.is_null().to_numpy(zero_copy_only=False)] = 0
    return rows

"""Size of an artifact of codebooks were its codes Huffman-coded, a code a tensor, as JSON: huffman.py ARTIFACT.

Deep Compression's pipeline (Han, Mao, Dally 2016) without pruning. A code's table is its lengths, half a byte an entry.
"""

from __future__ import annotations

import heapq
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from qcompress.artifact.reader import read_artifact
from qcompress.coding.packing import count_codes


def merges(counts: Sequence[int]) -> Iterator[int]:
    """The weight of every inner node of a Huffman tree; they sum to the bits of all codes."""
    heap = list(counts)
    heapq.heapify(heap)
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        heapq.heappush(heap, joined)
        yield joined


def main() -> None:
    path = Path(sys.argv[1])
    n_bytes, coded_bytes, weights = path.stat().st_size, 0, 0
    for file in read_artifact(path).files:
        for name, entry in file.manifest.tensors.items():
            tiles = file.tensor(name).packed_tiles()
            counts = sum(count_codes(packed, entry.bits, wide.stop - wide.start) for _, wide, packed in tiles)
            coded = -(-sum(merges([int(count) for count in counts if count])) // 8) + 2**entry.bits // 2
            parts = {part: place.n_bytes for part, place in file.parts_of(name).items()}
            n_bytes += coded - parts["codes"]
            coded_bytes += coded + sum(parts.values()) - parts["codes"]
            weights += int(counts.sum()) * entry.dim
    print(json.dumps({"bytes": n_bytes, "bits_per_weight": 8 * coded_bytes / weights}))


if __name__ == "__main__":
    main()

"""How fast codes become bits, and how small: pack and unpack against memory speed, entropy coding against the entropy.

    python benchmarks/coding.py [--codes 16777216] [--repeats 7] [--json FILE|-]

One thread, process CPU time, the median of the repeats. GB/s are of one-byte codes.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray
from timing import render, seconds_of, show

from qcompress.coding.packing import count_codes, pack, unpack
from qcompress.coding.payload import decode_payload, encode_payload, entropy_bits
from qcompress.types.config import CodingChoice

Codes = NDArray[np.uint8]


def bell_codes(rows: int, columns: int, bits: int) -> Codes:
    """Codes of Gaussian weights whose range is 3.5 deviations either way; at 1 bit, one in ten is set."""
    draw = np.random.default_rng(bits)
    if bits == 1:
        return (draw.random((rows, columns), np.float32) < 0.1).astype(np.uint8)
    levels = 1 << bits
    normal = draw.standard_normal((rows, columns), np.float32)
    return np.clip(np.round(normal * (levels / 7) + (levels - 1) / 2), 0, levels - 1).astype(np.uint8)


def numpy_pack(codes: Codes, bits: int) -> Codes:
    planes = np.unpackbits(codes.reshape(-1, 1), axis=1, count=bits, bitorder="little")
    return np.packbits(planes.reshape(len(codes), -1), axis=1, bitorder="little")


def measure_packing(count: int, columns: int, repeats: int) -> list[dict[str, Any]]:
    """One row per width: GB/s of pack, unpack and count_codes, and of numpy's packbits."""
    rows = count // columns
    measured = []
    for bits in range(1, 9):
        codes = np.random.default_rng(bits).integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
        packed = pack(codes, bits)
        few = codes[: max(1, rows // 8)]
        speeds = {
            name: size / seconds_of(call, repeats, warm=True) / 1e9
            for name, size, call in (
                ("pack", codes.size, lambda c=codes, b=bits: pack(c, b)),
                ("unpack", codes.size, lambda p=packed, b=bits: unpack(p, b, columns)),
                ("count", codes.size, lambda p=packed, b=bits: count_codes(p, b, columns)),
                ("np_packbits", few.size, lambda c=few, b=bits: numpy_pack(c, b)),
            )
        }
        measured.append({"name": f"{bits} bits, rows of {columns}", **speeds})
    return measured


def measure_payloads(count: int, repeats: int) -> list[dict[str, Any]]:
    """One row per width and coding: bits per code, percent over the order-0 entropy, million codes a second."""
    rows, columns = count // 4096, 4096
    choices: tuple[CodingChoice, ...] = ("zstd", "ans")
    measured = []
    for bits in range(1, 9):
        packed = pack(bell_codes(rows, columns, bits), bits)
        entropy = entropy_bits(count_codes(packed, bits, columns))
        size = rows * columns
        for choice in choices:
            coding, data = encode_payload(packed, bits, columns, choice)
            encode = seconds_of(lambda p=packed, b=bits, c=choice: encode_payload(p, b, columns, c), repeats, warm=True)
            decode = seconds_of(
                lambda d=data, b=bits, c=coding: decode_payload(d, c, b, rows, columns),
                repeats,
                warm=True,
            )
            measured.append(
                {
                    "name": f"{bits} bits, {choice}",
                    "coding": coding,
                    "bits_per_code": 8 * len(data) / size,
                    "entropy": entropy,
                    "over_percent": 100 * (8 * len(data) / size / entropy - 1),
                    "encode_mcodes": size / encode / 1e6,
                    "decode_mcodes": size / decode / 1e6,
                }
            )
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=1 << 24, help="codes per matrix")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures as JSON; - for stdout, in place of the tables"
    )
    arguments = parser.parse_args()

    source = np.ones(arguments.codes, np.uint8)
    target = np.empty_like(source)
    memcpy = source.size / seconds_of(lambda: np.copyto(target, source), arguments.repeats, warm=True) / 1e9
    document = {
        "codes": arguments.codes,
        "repeats": arguments.repeats,
        "memcpy_gb_per_second": memcpy,
        "packing": [
            row for columns in (4096, 27) for row in measure_packing(arguments.codes, columns, arguments.repeats)
        ],
        "payloads": measure_payloads(arguments.codes // 2, arguments.repeats),
    }
    text = f"memcpy {memcpy:.1f} GB/s\n\nGB/s of codes\n{render(document['packing'])}\n"
    text += f"\nentropy coding, million codes a second\n{render(document['payloads'])}"
    show(document, text, arguments.json)


if __name__ == "__main__":
    main()

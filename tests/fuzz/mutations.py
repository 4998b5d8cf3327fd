"""Seeded mutations of bytes and of JSON: what bad disks, cut transfers and people with bad intent make of a file."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any, TypeAlias

Path: TypeAlias = tuple[str | int, ...]

NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 7, 8, 9, 63, 64, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63),
    *(2**64, 10**100, 0.0, -0.0, 0.5, 1e308, -1e308, 1e-320),
)
OTHERS: tuple[Any, ...] = (
    *(
        True,
        False,
        None,
        "",
        "x",
        "\x00",
        "../../x",
        "/dev/null",
        "a\nb",
        "\x1b[31m",
        "=1+1",
        "*",
        "packed",
        "zstd",
        "ans",
    ),
    *([], {}, [0], [1], [-1], [1, 2, 3], [2**62, 2**62], [2**40], [[]], {"a": 1}, "F16", "F32", "U8", "a" * 300),
)
RAW = (
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-0",
        '"\\ud800"',
        '"\\ud83d\\ude00"',
        "1" * 400,
        "1" * 5000,
        "tru",
        "01",
    ),
    *("[" * 400 + "]" * 400, '{"a":' * 990 + "1" + "}" * 990),
)
"""Texts that stand where a JSON value should."""
MARK = "a place for a raw text"


def mutate_bytes(data: bytes, chance: Random) -> bytes:
    """The data with one to eight changes: flipped bits, other bytes, copies, exchanges, cuts, growth."""
    raw = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 8))):
        if not raw:
            break
        place, size = chance.randrange(len(raw)), chance.choice((1, 2, 4, 8, chance.randrange(1, 64)))
        match chance.randrange(10):
            case 0 | 1 | 2 | 3:
                raw[place] ^= 1 << chance.randrange(8)
            case 4:
                raw[place] = chance.choice((0, 1, 127, 128, 255))
            case 5:
                raw[place : place + size] = chance.randbytes(len(raw[place : place + size]))
            case 6:
                other = chance.randrange(len(raw))
                raw[place : place + size] = raw[other : other + size]
            case 7:
                raw[place : place + size] = chance.choice((b"\x00", b"\xff", b"\x80")) * size
            case 8:
                del raw[place : place + chance.choice((size, len(raw)))]
            case 9:
                raw[place:place] = chance.randbytes(size)
    return bytes(raw)


def mutate_text(data: bytes, chance: Random) -> bytes:
    """Lines taken out, doubled, exchanged or joined, besides what `mutate_bytes` does."""
    lines = data.split(b"\n")
    if chance.random() < 0.5 or len(lines) < 2:
        return mutate_bytes(data, chance)
    one, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    match chance.randrange(5):
        case 0:
            del lines[one]
        case 1:
            lines.insert(one, lines[other])
        case 2:
            lines[one], lines[other] = lines[other], lines[one]
        case 3:
            lines[one] = lines[one].lstrip() if chance.random() < 0.5 else b"  " + lines[one]
        case 4:
            head, colon, _ = lines[one].partition(b":")
            lines[one] = head + colon + b" " + str(chance.choice((*NUMBERS, *OTHERS))).encode(errors="replace")
    return b"\n".join(lines)


def mutate_json(data: bytes, chance: Random) -> bytes:
    """A JSON document with values replaced, taken out, renamed or moved; now and then only its bytes are changed."""
    if chance.random() < 0.25:
        return mutate_bytes(data, chance)
    return json_of(mutate_value(json.loads(data), chance), chance)


def json_of(value: Any, chance: Random) -> bytes:
    """The JSON of a value, in which marks stand for raw texts."""
    text = json.dumps(value)
    mark = json.dumps(MARK)
    while mark in text:
        text = text.replace(mark, chance.choice(RAW), 1)
    return text.encode("utf-8", "surrogatepass")


def mutate_value(value: Any, chance: Random) -> Any:
    """A copy of what JSON holds, with one to three changes."""
    found = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = _places(found)
        place = chance.choice(places)
        match chance.randrange(8):
            case 0 | 1:
                found = _put(found, place, chance.choice(NUMBERS))
            case 2:
                found = _put(found, place, copy.deepcopy(chance.choice(OTHERS)))
            case 3:
                found = _put(found, place, copy.deepcopy(_at(found, chance.choice(places))))
            case 4 if place:
                del _at(found, place[:-1])[place[-1]]
            case 5 if place and isinstance(place[-1], str):
                holder = _at(found, place[:-1])
                holder[chance.choice(("x", "", "a" * 300, f"{place[-1]}x", "\x1b[0m"))] = holder.pop(place[-1])
            case 6:
                number = _at(found, place)
                if isinstance(number, int) and not isinstance(number, bool):
                    found = _put(found, place, number + chance.choice((1, -1, 8, number, -2 * number)))
            case _:
                found = _put(found, place, MARK)
    return found


def _places(value: Any, at: Path = ()) -> list[Path]:
    found: list[Path] = [at]
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += _places(child, (*at, key))
    return found


def _at(value: Any, place: Path) -> Any:
    for key in place:
        value = value[key]
    return value


def _put(value: Any, place: Path, new: Any) -> Any:
    if not place:
        return new
    _at(value, place[:-1])[place[-1]] = new
    return value

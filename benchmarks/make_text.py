"""Cut a running text into a part to learn and a part to measure on, and learn a tokenizer from the first.

Needs the `text` extra. FOLDER/train.txt, eval.txt and tokenizer.json; equal files give equal bytes.

python benchmarks/make_text.py FOLDER tinyshakespeare.txt --vocabulary 1024
"""

from __future__ import annotations

import argparse
from pathlib import Path

from make_tokenizer import LEAST, tokenizer_of

SHARE = 0.9
"""Of the text's lines that are learned."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--vocabulary", type=int, default=1024)
    options = parser.parse_args()
    if options.vocabulary < LEAST:
        parser.error(f"--vocabulary is at least {LEAST}: every byte and the special tokens")
    lines = options.text.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = int(SHARE * len(lines))
    options.folder.mkdir(exist_ok=True, parents=True)
    for name, part in {"train": lines[:cut], "eval": lines[cut:]}.items():
        (options.folder / f"{name}.txt").write_text("".join(part), encoding="utf-8")
    tokenizer = tokenizer_of(lines[:cut], options.vocabulary)
    tokenizer.save(str(options.folder / "tokenizer.json"))
    print(f"{options.folder}: {cut} lines to learn, {len(lines) - cut} to measure on")


if __name__ == "__main__":
    main()

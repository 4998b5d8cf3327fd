"""Write labelled sentences as arrays that `sequence-classification` reads: input_ids, attention_mask, y.

Needs the `text` extra. A line is a sentence, a tab and the number of its class. The tokenizer is learned from the first
file; each file becomes FOLDER/STEM.npz. Equal files give equal bytes.

python benchmarks/make_sentences.py FOLDER sst2_train.tsv sst2_dev.tsv --vocabulary 4000 --length 48
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from make_tokenizer import LEAST, tokenizer_of
from numpy.typing import NDArray


def read_sentences(path: Path) -> tuple[list[str], NDArray[np.int64]]:
    """Sentences and their classes. Raises ValueError for a line that has no class."""
    lines = [line.rpartition("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [sentence for sentence, _, _ in lines], np.array([int(label) for _, _, label in lines], np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.tsv")
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--length", type=int, default=48, help="pieces of a sentence, its end included; more are cut")
    options = parser.parse_args()
    if options.vocabulary < LEAST:
        parser.error(f"--vocabulary is at least {LEAST}: every byte and the special tokens")
    if absent := [str(path) for path in options.files if not path.is_file()]:
        parser.error(f"no file {', '.join(absent)}")
    tokenizer = tokenizer_of(read_sentences(options.files[0])[0], options.vocabulary)
    tokenizer.enable_truncation(options.length)
    tokenizer.enable_padding(length=options.length, pad_id=0, pad_token="<pad>")
    options.folder.mkdir(exist_ok=True, parents=True)
    for path in options.files:
        sentences, classes = read_sentences(path)
        coded = tokenizer.encode_batch(sentences)
        arrays = {"input_ids": [one.ids for one in coded], "attention_mask": [one.attention_mask for one in coded]}
        target = options.folder / f"{path.stem}.npz"
        np.savez(target, y=classes, **{name: np.array(rows, np.int64) for name, rows in arrays.items()})
        print(f"{target}: {len(sentences)} sentences of {options.length} pieces")


if __name__ == "__main__":
    main()

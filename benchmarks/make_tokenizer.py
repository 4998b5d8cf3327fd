"""Write a tokenizer.json: byte-level BPE over all given files, <pad> <s> </s> as 0 1 2, <s> and </s> around a sentence.

Needs the `text` extra. Equal files give equal bytes.

python benchmarks/make_tokenizer.py tokenizer.json multi30k_train.en.txt multi30k_train.de.txt --vocabulary 4000
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PADDING, BEGIN, END = SPECIAL = ("<pad>", "<s>", "</s>")
LEAST = len(SPECIAL) + len(pre_tokenizers.ByteLevel.alphabet())


def make_tokenizer(texts: list[Path], vocabulary: int) -> Tokenizer:
    """One tokenizer for all texts of at most `vocabulary` pieces."""
    return tokenizer_of((line for path in texts for line in path.read_text(encoding="utf-8").splitlines()), vocabulary)


def tokenizer_of(lines: Iterable[str], vocabulary: int) -> Tokenizer:
    """A tokenizer of at most `vocabulary` pieces; what it decodes is the text in composed Unicode."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    # A word is the same at the beginning of a sentence as within it; decoding takes the space away again.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[*SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)],
    )
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--vocabulary", type=int, default=4000)
    arguments = parser.parse_args()
    if arguments.vocabulary < LEAST:
        parser.error(f"--vocabulary is at least {LEAST}: every byte and the special tokens")
    absent = [str(path) for path in arguments.texts if not path.is_file()]
    if absent:
        parser.error(f"no file {', '.join(absent)}")
    tokenizer = make_tokenizer(arguments.texts, arguments.vocabulary)
    tokenizer.save(str(arguments.output))
    print(f"{arguments.output}: {tokenizer.get_vocab_size()} pieces from {len(arguments.texts)} files")


if __name__ == "__main__":
    main()

"""Translation: what a decoder is trained on, its search against slow ones, the interval of BLEU, making a tokenizer."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qcompress.data.batches import Batch, Batches, Source, run_model
from qcompress.data.measurement import Measurement
from qcompress.data.sources import read_data
from qcompress.data.tasks import measure
from qcompress.data.text import IGNORED, Sentences, read_tokenizer
from qcompress.data.translation import search
from qcompress.data.user_code import find_callable, import_package
from qcompress.errors import DataError
from qcompress.types.data_settings import TextData
from qcompress.types.settings import Translation

CPU = torch.device("cpu")
SOURCE = ["a dog runs", "two men", "the girl in the park", "a man"]
TARGET = ["ein Hund rennt", "zwei Männer", "das Mädchen im Park", "ein Mann"]


def make_tokenizer(texts: list[Path], vocabulary: int) -> Any:
    pytest.importorskip("tokenizers")
    spec = importlib.util.spec_from_file_location("make_tokenizer", ROOT / "benchmarks" / "make_tokenizer.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_tokenizer(texts, vocabulary)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pairs of sentences and their tokenizer."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "en.txt").write_text("\n".join(SOURCE) + "\n", encoding="utf-8")
    (folder / "de.txt").write_text("\n".join(TARGET) + "\n", encoding="utf-8")
    make_tokenizer([folder / "en.txt", folder / "de.txt"], 270).save(str(folder / "tokenizer.json"))
    return folder


def read(folder: Path, tokenizer: str = "tokenizer.json", length: int = 64, batch_size: int = 4) -> Batches:
    asked = TextData(text="en.txt", target="de.txt", tokenizer=tokenizer, length=length, batch_size=batch_size)
    return read_data(asked, Source(folder, "data.eval"), seed=0)


def transformer(vocabulary: int, **sizes: Any) -> nn.Module:
    make = find_callable("nets/translation_transformer.py:translation_transformer", ROOT / "recipes", True, "test")
    return make(vocabulary, **sizes)


def test_labels_are_the_target_and_its_end_and_inputs_the_same_one_later(pairs: Path) -> None:
    tokenizer = read_tokenizer(pairs / "tokenizer.json")
    assert (tokenizer.begin, tokenizer.end, tokenizer.padding) == (1, 2, 0)
    (batch,) = read(pairs)
    assert isinstance(batch, Sentences) and batch.labels is not None and batch.texts == tuple(TARGET)
    given, wanted = batch.kwargs["decoder_input_ids"], batch.labels
    assert given.shape == wanted.shape and given.dtype == wanted.dtype == torch.int64
    for row, text in enumerate(TARGET):
        answers = [one for one in wanted[row].tolist() if one != IGNORED]
        assert tokenizer.decode(answers[:-1]) == text and answers[-1] == tokenizer.end
        assert tokenizer.end not in answers[:-1] and tokenizer.begin not in answers
        places = wanted.shape[1] - len(answers)
        assert given[row].tolist() == [tokenizer.begin, *answers[:-1], *[tokenizer.padding] * places]
        assert wanted[row].tolist() == [*answers, *[IGNORED] * places]
    assert (wanted != IGNORED).all(1).any(), "no column is padding alone"


def test_a_target_that_is_cut_off_is_not_answered_with_an_end(pairs: Path) -> None:
    (whole,), (cut,) = read(pairs), read(pairs, length=5)
    assert whole.labels is not None and cut.labels is not None
    assert torch.equal(cut.labels, whole.labels[:, :5]) and bool((cut.labels[2] != 2).all())
    assert torch.equal(cut.kwargs["decoder_input_ids"], whole.kwargs["decoder_input_ids"][:, :5])


def test_a_batch_keeps_its_tokenizer_and_runs_as_it_is(pairs: Path) -> None:
    (batch,) = read(pairs)
    part = batch.to(CPU).first(2)
    assert isinstance(part, Sentences) and part.tokenizer is not None
    module = transformer(270, width=16, layers=1, hidden=16).eval()
    with torch.no_grad():
        logits = run_model(module, part)
    assert part.labels is not None and logits.shape == (*part.labels.shape, 270)


def test_padding_has_no_part_in_the_loss(pairs: Path) -> None:
    """The loss of a batch is the mean over the tokens of its sentences, each taken alone."""
    module = transformer(270, width=16, layers=1, hidden=16).eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        (batch,) = read(pairs)
        together = F.cross_entropy(run_model(module, batch).flatten(0, 1), batch.labels.flatten())
        for alone in read(pairs, batch_size=1):
            total += float(F.cross_entropy(run_model(module, alone)[0], alone.labels[0], reduction="sum"))
            tokens += alone.labels.numel()
    assert float(together) == pytest.approx(total / tokens, rel=1e-5)


def test_a_tokenizer_without_begin_gives_sources_only(pairs: Path) -> None:
    found = json.loads((pairs / "tokenizer.json").read_text(encoding="utf-8"))
    (pairs / "bare.json").write_text(json.dumps({**found, "post_processor": None}), encoding="utf-8")
    (batch,) = read(pairs, "bare.json")
    assert batch.labels is None and set(batch.kwargs) == {"input_ids", "attention_mask"}
    module = transformer(270, width=16, layers=1, hidden=16)
    with pytest.raises(DataError, match="neither TranslationTransformer nor the data's tokenizer says `begin`"):
        bleu(module, read(pairs, "bare.json"))


def bleu(module: nn.Module, batches: Batches, length: int = 64, beams: int = 1) -> Measurement:
    pytest.importorskip("sacrebleu")
    (found,) = measure(Translation(length=length, beams=beams), module, batches, CPU)
    return found


def test_bleu_is_100_where_the_translations_are_right(pairs: Path) -> None:
    tokenizer = read_tokenizer(pairs / "tokenizer.json")
    rows, labels = tokenizer.rows(SOURCE, 64), tokenizer.target_rows(TARGET, 64)
    answers = {tuple(row): label for row, label in zip(rows, labels, strict=True)}

    class Right(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
            assert bool((decoder_input_ids[:, 0] == 1).all())
            logits = torch.zeros(*decoder_input_ids.shape, 270)
            for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
                label = answers[tuple(ids[mask.bool()].tolist())]
                for place in range(decoder_input_ids.shape[1]):
                    logits[row, place, label[place]] = 9
            return logits

    for beams in (1, 3):
        assert bleu(Right(), read(pairs, batch_size=3), beams=beams).value == pytest.approx(100)
    with pytest.raises(IndexError):
        # A sentence that has ended is never asked about again.
        Right()(*(torch.tensor([one]) for one in (rows[1], [1] * len(rows[1]), [1, *labels[1], 2])))


def test_encoding_once_gives_the_same_translations(pairs: Path) -> None:
    torch.manual_seed(3)
    module = transformer(270, width=16, layers=2, hidden=16).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.texts = module, []

        def forward(self, **kwargs: Tensor) -> Tensor:
            return self.module(**kwargs)

    texts: dict[str, list[str]] = {"split": [], "whole": []}
    for name, one in (("split", module), ("whole", Whole())):
        decode = read_tokenizer(pairs / "tokenizer.json").decode
        one.decode_text = lambda ids, name=name, decode=decode: texts[name].append(decode(ids)) or texts[name][-1]
        bleu(one, read(pairs), length=12, beams=2)
    assert texts["split"] == texts["whole"] and len(set(texts["split"])) == 4


def language(vocabulary: int, seed: int) -> Tensor:
    """Log-probabilities [sample, place, last token, next token] of sentences."""
    table = 2 * torch.randn(3, 5, vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed))
    return table.log_softmax(-1)


def spoken(table: Tensor) -> Any:
    return lambda samples, prefix: table[samples, prefix.shape[1] - 1, prefix[:, -1]]


def slow_search(table: Tensor, begin: int, end: int, length: int, beams: int) -> list[int]:
    """Beam search over lists, all beams to the full length."""
    kept = [(0.0, [begin])]
    for place in range(length):
        longer = []
        for score, row in kept:
            if row[-1] == end and place:
                longer.append((score, [*row, end]))
            else:
                longer += [(score + float(table[place, row[-1], one]), [*row, one]) for one in range(table.shape[-1])]
        kept = sorted(longer, key=lambda one: -one[0])[:beams]
    return kept[0][1][1:]


@pytest.mark.parametrize("beams", [1, 2, 5])
@pytest.mark.parametrize("seed", range(8))
def test_search_is_a_slow_search(seed: int, beams: int) -> None:
    table = language(6, seed)
    found = search(spoken(table), torch.full((3, 1), 1), end=2, length=5, beams=beams)
    assert found.tolist() == [slow_search(table[row], 1, 2, 5, beams) for row in range(3)]


@pytest.mark.parametrize("seed", range(4))
def test_enough_beams_find_the_likeliest_of_all(seed: int) -> None:
    table, end, length = language(4, seed), 2, 4

    def score(row: int, tokens: tuple[int, ...]) -> float:
        total = 0.0
        for place, (last, token) in enumerate(itertools.pairwise((1, *tokens))):
            if place and last == end:
                return total if all(one == end for one in tokens[place:]) else -np.inf
            total += float(table[row, place, last, token])
        return total

    found = search(spoken(table), torch.full((3, 1), 1), end, length, beams=4**length)
    for row in range(3):
        assert tuple(found[row].tolist()) == max(
            itertools.product(range(4), repeat=length), key=lambda t: score(row, t)
        )


def test_the_interval_is_that_of_corpora_drawn_again() -> None:
    """sacrebleu scores every resampled corpus from its text."""
    sacrebleu = pytest.importorskip("sacrebleu")
    random = np.random.default_rng(5)
    texts = [" ".join(random.choice(["a", "b", "c", "d", "e"], 9)) for _ in range(40)]
    heard = [" ".join(w if random.random() < 0.8 else "x" for w in text.split()) for text in texts]

    class Hears(nn.Module):
        begin, end, answers = 0, 1, iter(heard)

        def forward(self, source: Tensor, prefix: Tensor) -> Tensor:
            return torch.eye(2)[torch.ones_like(prefix)]

        def decode_text(self, ids: list[int]) -> str:
            return next(self.answers)

    batch = Batch((torch.zeros(40, 1, dtype=torch.long),), texts=tuple(texts))
    found = bleu(Hears(), Batches(40, 40, lambda _: batch))
    assert found.value == pytest.approx(sacrebleu.corpus_bleu(heard, [texts]).score)
    generator = np.random.default_rng(9)
    scores = []
    for _ in range(400):
        chosen = generator.integers(40, size=40)
        scores.append(sacrebleu.corpus_bleu([heard[i] for i in chosen], [[texts[i] for i in chosen]]).score)
    low, high = np.quantile(scores, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.25 * (high - low))
    assert found.low < found.value < found.high


def test_transformers_shifts_labels_to_the_same_inputs(pairs: Path) -> None:
    """A model of transformers, given the labels, makes its decoder's inputs of them itself."""
    pytest.importorskip("transformers")
    transformers = import_package("transformers")
    folder = pairs / "t5"
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(pairs / "tokenizer.json"), pad_token="<pad>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    sizes = {"vocab_size": 270, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
    config.save_pretrained(folder)
    torch.manual_seed(0)
    module = transformers.T5ForConditionalGeneration(config).eval()
    (batch,) = read(pairs, "t5")
    source = {name: x for name, x in batch.kwargs.items() if name != "decoder_input_ids"}
    with torch.no_grad():
        expected = module(**source, labels=batch.labels)
        logits = run_model(module, batch)
    real = batch.labels != IGNORED
    assert torch.allclose(logits[real], expected.logits[real], atol=1e-5)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
    assert float(loss) == pytest.approx(float(expected.loss), rel=1e-5)
    with torch.no_grad():
        written = module.generate(**source, max_length=9, num_beams=1)
    scores = bleu(module, read(pairs, "t5"), length=9).per_sample
    sacrebleu = pytest.importorskip("sacrebleu").BLEU(effective_order=True)
    texts = fast.batch_decode(written, skip_special_tokens=True)
    assert scores == pytest.approx([sacrebleu.sentence_score(h, [r]).score for h, r in zip(texts, TARGET, strict=True)])


@settings(max_examples=60)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=30).filter(lambda s: not s[:1].isspace()))
def test_a_made_tokenizer_gives_any_text_back(pairs: Path, text: str) -> None:
    tokenizer = read_tokenizer(pairs / "tokenizer.json")
    (ids,) = tokenizer.rows([text], 1000)
    if "<" not in text:
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert (ids[0], ids[-1]) == (1, 2) and max(ids) < 270


def test_a_tokenizer_is_made_the_same_twice_and_no_larger_than_asked(pairs: Path) -> None:
    files = [pairs / "en.txt", pairs / "de.txt"]
    one, other = (make_tokenizer(files, 275) for _ in range(2))
    assert one.to_str() == other.to_str() and one.get_vocab_size() <= 275
    assert [one.token_to_id(name) for name in ("<pad>", "<s>", "</s>")] == [0, 1, 2]


@pytest.mark.slow
def test_a_tiny_network_learns_32_pairs_by_heart(tmp_path: Path) -> None:
    if "QCOMPRESS_DATA" not in os.environ:
        pytest.skip("QCOMPRESS_DATA names no folder with Multi30k")
    text = Path(os.environ["QCOMPRESS_DATA"]) / "text"
    for name in ("en", "de"):
        lines = (text / f"multi30k_val.{name}.txt").read_text(encoding="utf-8").splitlines()[:32]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    made = make_tokenizer([tmp_path / "en.txt", tmp_path / "de.txt"], 600)
    made.save(str(tmp_path / "tokenizer.json"))
    torch.manual_seed(0)
    module = transformer(made.get_vocab_size(), width=64, layers=2, hidden=128, dropout=0.0).train()
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    (batch,) = read(tmp_path, batch_size=32)
    for _ in range(120):
        loss = F.cross_entropy(run_model(module, batch).flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    assert bleu(module, read(tmp_path, batch_size=32)).value > 95

"""Every data source and every task keeps one contract; a new one fails here until it is whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress.data.batches import Batch, Batches, Source
from qcompress.data.measurement import Measurement
from qcompress.data.sources import read_data
from qcompress.data.tasks import measure
from qcompress.errors import DataError
from qcompress.types.data_settings import DATA_KINDS, Data, FactoryData, HubData, ImagesData, NpzData, TextData
from qcompress.types.settings import (
    TASKS,
    CausalLm,
    Classification,
    FactoryTask,
    Reconstruction,
    SequenceClassification,
    Task,
    Translation,
)

CPU = torch.device("cpu")
SAMPLES = 5
PLACE = "recipe.yaml:5: data.eval"


# --- data sources


def npz_data(folder: Path) -> NpzData:
    np.savez(
        folder / "data.npz", x=np.arange(SAMPLES * 4 * 4 * 3, dtype=np.uint8).reshape(SAMPLES, 4, 4, 3), y=range(5)
    )
    return NpzData(npz="data.npz")


def images_data(folder: Path) -> ImagesData:
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    for index in range(SAMPLES):
        (folder / "images" / str(index % 2)).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(256, size=(6, 5, 3), dtype=np.uint8)
        image.fromarray(pixels).save(folder / "images" / str(index % 2) / f"{index}.png")
    return ImagesData(images="images", crop=4)


def hub_data(folder: Path) -> HubData:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"ids": [[i, i + 1] for i in range(SAMPLES)], "label": [*range(SAMPLES)]})
    made.save_to_disk(str(folder / "set"))
    return HubData(dataset="set", inputs=("ids",))


def text_data(folder: Path) -> TextData:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "a": 1, "b": 2, "c": 3}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    (folder / "text.txt").write_text("a b c " * SAMPLES)
    return TextData(text="text.txt", tokenizer="tokenizer.json", length=3)


def factory_data(folder: Path) -> FactoryData:
    lines = "import torch\ndef pairs(n): return [(torch.full((2,), float(i)), i) for i in range(n)]\n"
    (folder / "mine.py").write_text(lines)
    return FactoryData(factory="mine.py:pairs", args={"n": SAMPLES})


SOURCES: dict[str, tuple[Callable[[Path], Data], dict[str, str]]] = {
    "npz": (npz_data, {"npz": "none.npz"}),
    "images": (images_data, {"images": "none"}),
    "dataset": (hub_data, {"dataset": "none"}),
    "text": (text_data, {"text": "none.txt"}),
    "factory": (factory_data, {"factory": "none.py:pairs"}),
}
"""Kind -> (what makes its files and settings, the change that names a file which is not there)."""


def test_every_source_and_every_task_has_its_row() -> None:
    assert set(SOURCES) == set(DATA_KINDS), "give SOURCES what makes the files of each data source"
    assert set(CASES) == set(TASKS), "give CASES a network and data for each task"


@pytest.fixture(params=DATA_KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def settings(kind: str, tmp_path: Path) -> Data:
    make, _ = SOURCES[kind]
    return make(tmp_path)


def read(folder: Path, settings: Data, seed: int = 0) -> Batches:
    return read_data(settings, Source(folder, PLACE, allow_code=True), seed)


def tensors_of(batch: Batch) -> list[Tensor]:
    return [*batch.args, *batch.kwargs.values(), *([] if batch.labels is None else [batch.labels])]


def assert_same(one: Sequence[Batch], other: Sequence[Batch]) -> None:
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        assert first.texts == second.texts and first.kwargs.keys() == second.kwargs.keys()
        for found, wanted in zip(tensors_of(first), tensors_of(second), strict=True):
            assert found.dtype == wanted.dtype and torch.equal(found, wanted)


def test_a_kind_is_told_by_its_key_alone(kind: str) -> None:
    assert kind in {one.name for one in fields(DATA_KINDS[kind])}
    others = [other for name, other in DATA_KINDS.items() if name != kind]
    assert not [other for other in others if kind in {one.name for one in fields(other)}]


def test_a_source_gives_all_its_samples_in_portions(settings: Data, tmp_path: Path) -> None:
    batches = read(tmp_path, replace(settings, batch_size=2))
    found = list(batches)
    assert batches.samples == SAMPLES and len(batches) == len(found)
    assert [batch.size for batch in found] == [2, 2, 1]
    assert all(len(tensor) == batch.size for batch in found for tensor in tensors_of(batch))
    (whole,) = read(tmp_path, settings)
    for index, tensor in enumerate(tensors_of(whole)):
        assert torch.equal(torch.cat([tensors_of(batch)[index] for batch in found]), tensor)


def test_a_source_gives_the_same_when_it_is_read_again(settings: Data, tmp_path: Path) -> None:
    batches = read(tmp_path, replace(settings, batch_size=2))
    first = list(batches)
    assert_same(list(batches), first)
    assert_same(list(read(tmp_path, replace(settings, batch_size=2))), first)


def test_a_source_gives_any_samples_in_any_order(settings: Data, tmp_path: Path) -> None:
    batches = read(tmp_path, settings)
    (whole,) = batches
    for found, wanted in zip(tensors_of(batches.read([3, 0])), tensors_of(whole), strict=True):
        assert torch.equal(found, wanted[[3, 0]])


def test_fewer_samples_are_the_first_or_drawn_by_the_seed(settings: Data, tmp_path: Path) -> None:
    (whole,) = read(tmp_path, settings)
    (first,) = read(tmp_path, replace(settings, samples=3))
    assert_same([first], [whole.first(3)])
    drawn = [next(iter(read(tmp_path, replace(settings, samples=3, shuffle=True), seed))) for seed in (0, 0, 1, 2, 3)]
    assert_same([drawn[0]], [drawn[1]])
    assert_same([*read(tmp_path, replace(settings, shuffle=True))], [whole])
    rows = [tensors_of(whole)[0][index] for index in range(SAMPLES)]
    for batch in drawn:
        assert batch.size == 3
        assert all(any(torch.equal(row, one) for one in rows) for row in tensors_of(batch)[0])
    with pytest.raises(DataError, match=f"6 samples are asked for and there are {SAMPLES}") as caught:
        read(tmp_path, replace(settings, samples=6))
    assert caught.value.where == PLACE


def test_a_missing_file_is_refused_where_the_recipe_names_it(kind: str, settings: Data, tmp_path: Path) -> None:
    _, missing = SOURCES[kind]
    with pytest.raises(DataError) as caught:
        read(tmp_path, replace(settings, **missing))
    assert caught.value.where == PLACE and caught.value.hint
    assert next(iter(missing.values())).partition(":")[0] in caught.value.what


# --- tasks


class Gives(nn.Module):
    """A network whose output is its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Bigrams(nn.Module):
    """A language model of seven words."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids % 7]


class Echo(nn.Module):
    """Translates a sentence into itself, token by token; 1 begins and 2 ends."""

    begin, end = 1, 2

    def forward(self, source: Tensor, prefix: Tensor) -> Tensor:
        logits = torch.full((*prefix.shape, 12), -5.0)
        place = prefix.shape[1] - 1
        wanted = source[:, place] if place < source.shape[1] else torch.full_like(source[:, 0], self.end)
        logits[torch.arange(len(source)), -1, wanted] = 5.0
        return logits

    def decode_text(self, ids: list[int]) -> str:
        return " ".join(f"word{one}" for one in ids)


@dataclass(frozen=True)
class Case:
    """A task that runs on a batch of samples, and batches that it refuses."""

    task: Task
    module: nn.Module
    batch: Batch
    wrong: Sequence[Batch]
    is_mean: bool = True


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classification(_: Path) -> Case:
    logits, labels = numbers(SAMPLES, 9), torch.tensor([0, 3, 8, 2, 2])
    logits[1, 3] = logits[2, 8] = 9.0
    wrong = [
        Batch((logits,)),
        Batch((logits,), labels=labels + 1),
        Batch((logits,), labels=labels - 1),
        Batch((logits,), labels=labels.view(-1, 1)),
    ]
    return Case(Classification(), Gives(), Batch((logits,), labels=labels), wrong)


def sequence_classification(folder: Path) -> Case:
    return replace(classification(folder), task=SequenceClassification())


def causal_lm(_: Path) -> Case:
    ids = torch.randint(7, (SAMPLES, 6), generator=torch.Generator().manual_seed(0))
    batch = Batch((ids,), lengths=torch.tensor([6, 2, 3, 6, 4]))
    return Case(CausalLm(), Bigrams(), batch, [Batch((ids + 7,)), Batch((ids - 7,))])


def translation(_: Path) -> Case:
    pytest.importorskip("sacrebleu")
    source = torch.tensor([[3, 4, 5, 6, 7, 2], [8, 9, 10, 11, 2, 2], *[[3, 5, 7, 9, 2, 2]] * 3])
    texts = ("word3 word4 word5 word6 word7", *["word8 word9 word10 word11"] * 2, *["word3 word5 word7 word9"] * 2)
    # Corpus BLEU is made of the sentences' summed counts: no mean of what they have by themselves.
    return Case(Translation(length=8), Echo(), Batch((source,), texts=texts), [Batch((source,))], is_mean=False)


def reconstruction(_: Path) -> Case:
    x, y = numbers(SAMPLES, 3, 2), numbers(SAMPLES, 3, 2, seed=1)
    return Case(Reconstruction(peak=2.0), Gives(), Batch((x,), labels=y), [Batch((x,)), Batch((x,), labels=y[:, :1])])


def factory(folder: Path) -> Case:
    lines = "def spread(output, batch): return output.amax(1) - output.amin(1) if output.ndim == 2 else output\n"
    (folder / "task.py").write_text(lines)
    task = FactoryTask(factory="task.py:spread", metric="spread", higher=False)
    return Case(task, Gives(), Batch((numbers(SAMPLES, 4),)), [Batch((numbers(SAMPLES, 4, 2),))])


CASES: dict[str, Callable[[Path], Case]] = {
    "classification": classification,
    "sequence-classification": sequence_classification,
    "causal-lm": causal_lm,
    "translation": translation,
    "reconstruction": reconstruction,
    "factory": factory,
}


SCALES: dict[str, Callable[[float], float]] = {
    "mean": lambda mean: mean,
    "exp": math.exp,
    "decibel": lambda mean: -10 * math.log10(mean),
}


@pytest.fixture(params=TASKS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return CASES[request.param](tmp_path)


def rows_of(batch: Batch, size: int) -> Batches:
    """The rows of a batch as samples."""

    def read(indices: Sequence[int]) -> Batch:
        chosen = [*indices]
        return Batch(
            tuple(x[chosen] for x in batch.args),
            labels=None if batch.labels is None else batch.labels[chosen],
            lengths=None if batch.lengths is None else batch.lengths[chosen],
            texts=tuple(batch.texts[index] for index in chosen) if batch.texts else (),
        )

    return Batches(batch.size, size, read)


def run(case: Case, folder: Path, batch: Batch | None = None, size: int = SAMPLES) -> list[Measurement]:
    batches = rows_of(batch or case.batch, size)
    return measure(case.task, case.module, batches, CPU, root=folder, allow_code=True)


def test_a_task_gives_what_every_sample_gave(case: Case, tmp_path: Path) -> None:
    found = run(case, tmp_path)
    assert sorted(one.metric for one in found) == sorted(case.task.metrics), "what gates are checked against"
    for one in found:
        assert one.samples == SAMPLES and one.per_sample.shape == one.weights.shape == (SAMPLES,)
        assert one.per_sample.dtype == one.weights.dtype == np.float64
        assert np.isfinite(one.per_sample).all() and (one.weights > 0).all()


def test_the_samples_make_the_value_and_the_interval_holds_it(case: Case, tmp_path: Path) -> None:
    for one in run(case, tmp_path):
        assert one.low <= one.value <= one.high
        if not case.is_mean:
            continue
        mean = one.per_sample.sum() / one.weights.sum()
        assert one.value == pytest.approx(SCALES[one.scale](mean), rel=1e-12)


def test_portions_and_repetition_change_nothing(case: Case, tmp_path: Path) -> None:
    whole = run(case, tmp_path)
    for size in (SAMPLES, 2):
        for one, other in zip(whole, run(case, tmp_path, size=size), strict=True):
            assert one.metric == other.metric and one.higher == other.higher
            np.testing.assert_allclose(other.per_sample, one.per_sample, rtol=1e-6)
            assert (other.value, other.low, other.high) == pytest.approx((one.value, one.low, one.high), rel=1e-6)


def test_the_model_is_measured_as_it_will_run_and_progress_is_told(case: Case, tmp_path: Path) -> None:
    case.module.train()
    done: list[int] = []
    measure(case.task, case.module, rows_of(case.batch, 2), CPU, done.append, root=tmp_path, allow_code=True)
    assert done == [2, 4, SAMPLES] and not case.module.training


def test_labels_that_do_not_fit_are_data_errors(case: Case, tmp_path: Path) -> None:
    assert case.wrong
    for batch in case.wrong:
        with pytest.raises(DataError) as caught:
            run(case, tmp_path, batch)
        assert caught.value.where and caught.value.hint

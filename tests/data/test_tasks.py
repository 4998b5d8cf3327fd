"""Tasks: metrics against slow obvious ones, intervals against formulas and resampling, and labels that do not fit."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.data.batches import Batch, Batches
from qcompress.data.measurement import Measurement, mean_interval, wilson
from qcompress.data.tasks import measure, paired_drop
from qcompress.errors import DataError, ModelError
from qcompress.types.settings import (
    CausalLm,
    Classification,
    FactoryTask,
    Reconstruction,
    SequenceClassification,
    Translation,
)

CPU = torch.device("cpu")


class Gives(nn.Module):
    """A network whose output is its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def batches(*parts: Batch) -> Batches:
    """Each part as one portion of the samples."""
    starts = np.cumsum([0, *(part.size for part in parts)])
    by_start = {int(start): part for start, part in zip(starts, parts, strict=False)}
    size = parts[0].size
    return Batches(int(starts[-1]), size, lambda chosen: by_start[chosen[0]])


def test_top1_and_top5_are_counted_by_hand() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 9), torch.randint(9, (40,))
    parts = [Batch((logits[:20],), labels=labels[:20]), Batch((logits[20:],), labels=labels[20:])]
    top1, top5 = measure(Classification(), Gives(), batches(*parts), CPU)
    ranks = [
        sorted(range(9), key=lambda c, row=row: -float(row[c])).index(int(y))
        for row, y in zip(logits, labels, strict=True)
    ]
    assert (top1.metric, top1.value) == ("top1", sum(rank == 0 for rank in ranks) / 40)
    assert (top5.metric, top5.value) == ("top5", sum(rank < 5 for rank in ranks) / 40)
    headline, _ = measure(Classification(metric="top5"), Gives(), batches(*parts), CPU)
    assert headline.metric == "top5"
    (accuracy,) = measure(SequenceClassification(), Gives(), batches(*parts), CPU)
    assert accuracy.value == top1.value


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        (torch.tensor([0, 3]), "label 3 is outside the model's 3 classes"),
        (torch.tensor([0, -1]), "label -1 is outside"),
        (torch.tensor([[0], [1]]), r"gives \[2, 3\] for labels of \[2, 1\]"),
        (None, "has no labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Tensor | None, error: str) -> None:
    with pytest.raises(DataError, match=error):
        measure(Classification(), Gives(), batches(Batch((torch.randn(2, 3),), labels=labels)), CPU)


def test_a_model_that_does_not_run_on_the_data_says_with_which_shapes() -> None:
    found = batches(Batch((torch.randn(2, 5),), labels=torch.tensor([0, 1])))
    with pytest.raises(ModelError, match=r"Linear: does not run on inputs of \[2, 5\]"):
        measure(Classification(), nn.Linear(3, 2), found, CPU)


class Uniform(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, 7)


def test_a_model_that_knows_nothing_has_the_vocabulary_for_its_perplexity() -> None:
    ids = torch.randint(7, (3, 5))
    (found,) = measure(CausalLm(), Uniform(), batches(Batch((ids,))), CPU)
    assert found.value == pytest.approx(7) and not found.higher
    assert (found.low, found.high) == pytest.approx((7, 7))


def test_perplexity_scores_what_lies_within_the_lengths() -> None:
    torch.manual_seed(0)
    table, ids, lengths = torch.randn(7, 7), torch.randint(7, (4, 6)), torch.tensor([6, 2, 4, 3])

    class Bigrams(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return table[ids]

    losses = [
        float(F.cross_entropy(table[ids[row, place - 1]], ids[row, place]))
        for row in range(4)
        for place in range(1, int(lengths[row]))
    ]
    (found,) = measure(CausalLm(), Bigrams(), batches(Batch((ids,), lengths=lengths)), CPU)
    assert found.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found.weights.sum() == len(losses)
    assert found.low < found.value < found.high


def test_psnr_is_that_of_the_mean_error() -> None:
    x, y = torch.rand(4, 3, 2), torch.rand(4, 3, 2)
    (found,) = measure(Reconstruction(peak=2.0), Gives(), batches(Batch((x,), labels=y)), CPU)
    assert found.value == pytest.approx(10 * math.log10(4 / float((x - y).square().mean())), rel=1e-5)
    assert found.low <= found.value <= found.high
    with pytest.raises(DataError, match="needs labels of the output's shape"):
        measure(Reconstruction(), Gives(), batches(Batch((x,), labels=y[:, :1])), CPU)


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def spread(output, batch): return output.amax(1) - output.amin(1)\ndef wrong(output, batch): return output\n"
    )
    x = torch.randn(6, 4)
    task = FactoryTask(factory="mine.py:spread", metric="spread", higher=False)
    (found,) = measure(task, Gives(), batches(Batch((x,))), CPU, root=tmp_path, allow_code=True)
    assert found.value == pytest.approx(float((x.amax(1) - x.amin(1)).mean()), rel=1e-6) and not found.higher
    with pytest.raises(DataError, match=r"gives \[6, 4\] for 6 samples"):
        measure(
            FactoryTask(factory="mine.py:wrong"), Gives(), batches(Batch((x,))), CPU, root=tmp_path, allow_code=True
        )


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


@pytest.mark.parametrize("beams", [1, 3])
def test_a_perfect_translation_has_a_bleu_of_100(beams: int) -> None:
    pytest.importorskip("sacrebleu")
    source = torch.tensor([[3, 4, 5, 6, 7, 2], [8, 9, 10, 11, 2, 2]])
    texts = ("word3 word4 word5 word6 word7", "word8 word9 word10 word11")
    (found,) = measure(Translation(beams=beams), Echo(), batches(Batch((source,), texts=texts)), CPU)
    assert found.metric == "bleu" and found.value == pytest.approx(100)
    (other,) = measure(Translation(), Echo(), batches(Batch((source,), texts=texts[::-1])), CPU)
    assert other.value < 10


def test_wilson_is_the_root_of_its_equation() -> None:
    """|p - x| = z sqrt(x (1 - x) / n) at both ends."""
    for hits, samples in ((9, 10), (457, 500), (1, 1000)):
        for end in wilson(hits, samples):
            spread = 1.959963984540054 * math.sqrt(end * (1 - end) / samples)
            assert abs(hits / samples - end) == pytest.approx(spread, rel=1e-9)
    assert (wilson(0, 10)[0], wilson(10, 10)[1]) == pytest.approx((0, 1), abs=1e-12)
    assert wilson(0, 10)[1] > 0 and wilson(10, 10)[0] < 1


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        values = random.exponential(2.0, 200)
        low, high = mean_interval(values)
        held += low <= 2.0 <= high
    assert 0.91 < held / 400 < 0.98


def measured(
    values: np.ndarray, *, higher: bool = True, metric: str = "top1", value: float | None = None
) -> Measurement:
    mean = float(values.mean()) if value is None else value
    return Measurement(metric, mean, len(values), 0.0, 1.0, higher, values.astype(float), np.ones(len(values)))


def test_a_paired_drop_is_that_of_resampled_pairs() -> None:
    random = np.random.default_rng(1)
    before = random.random(500) < 0.9
    after = np.where(random.random(500) < 0.05, ~before, before)
    drop, low, high = paired_drop(measured(before), measured(after))
    assert drop == pytest.approx(before.mean() - after.mean())
    chosen = random.integers(500, size=(4000, 500))
    resampled = before[chosen].mean(1) - after[chosen].mean(1)
    assert (low, high) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])), abs=0.006)
    assert paired_drop(measured(before), measured(before)) == (0.0, 0.0, 0.0)


def test_where_less_is_better_a_rise_is_a_drop() -> None:
    random = np.random.default_rng(2)
    before = random.random(300) + 1
    after = before + 0.1
    drop, low, high = paired_drop(measured(before, higher=False), measured(after, higher=False))
    assert (drop, low, high) == pytest.approx((0.1, 0.1, 0.1))
    one, other = (
        measured(values, higher=False, metric="perplexity", value=math.exp(values.mean())) for values in (before, after)
    )
    drop, low, high = paired_drop(one, other)
    assert drop == pytest.approx(other.value - one.value) and low < drop < high
    chosen = random.integers(300, size=(4000, 300))
    resampled = np.exp(after[chosen].mean(1)) - np.exp(before[chosen].mean(1))
    assert (low, high) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "recipe", "samples", "hits"),
    [
        ("cifar10/resnet20.safetensors", "cifar10/resnet20_rtn_w4a8.yaml", 2000, 1834),
        ("kws/dscnn.safetensors", None, 1000, 915),
        ("stories/stories260K.safetensors", None, 300, 5.502),
    ],
)
def test_real_networks_have_the_accuracies_that_they_are_known_for(
    weights: str, recipe: str | None, samples: int, hits: float
) -> None:
    from qcompress.compress.evaluate import evaluate
    from qcompress.recipe import parse_recipe, read_recipe
    from qcompress.types.run import ModelRun

    if "QCOMPRESS_DATA" not in os.environ:
        pytest.skip("QCOMPRESS_DATA names no folder with real networks")
    root = Path(__file__).parents[2]
    rules = 'rules: [{match: "*", keep: {}}]'
    texts = {
        "kws/dscnn.safetensors": "model: {factory: nets/ds_cnn.py:ds_cnn}\n"
        "data: {eval: {npz: kws/kws01_1000.npz, scale: 0.5847029, zero_point: 83}}\ntask: classification\n",
        "stories/stories260K.safetensors": "model: {factory: nets/tiny_llama.py:stories260k}\n"
        "data: {eval: {npz: stories/stories.npz, inputs: eval_ids, lengths: eval_len}}\ntask: causal-lm\n",
    }
    if recipe is None:
        made = parse_recipe(f"version: 1\n{texts[weights]}{rules}", str(root / "recipes" / "test.yaml"))
    else:
        made = read_recipe(root / "recipes" / recipe, [f"data.eval.samples={samples}"])
    found = evaluate(Path(os.environ["QCOMPRESS_DATA"]) / weights, ModelRun(made, CPU, allow_code=True))[0]
    assert found.samples == samples
    expected = hits if found.metric == "perplexity" else hits / samples
    assert found.value == pytest.approx(expected, abs=6e-4)

"""BLEU of a translation model: sentences are decoded token by token and held against their references."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.errors import DataError
from qcompress.model.batches import Batch, Batches, first_tensor
from qcompress.model.code import import_package
from qcompress.model.tasks import Measurement
from qcompress.settings import Translation

RESAMPLES = 200


def measure_translation(
    task: Translation,
    module: nn.Module,
    batches: Batches,
    device: torch.device,
    advance: Callable[[int], None],
) -> list[Measurement]:
    """Corpus BLEU by sacrebleu; its interval from resampled sentences (Koehn 2004).

    A module with `generate` (transformers) is asked for its own decoding. Any other is called module(source, prefix)
    and gives logits [samples, length, vocabulary]; its attributes `begin`, `end` and `decode_text` (ids -> text) say
    the rest.
    """
    sacrebleu = import_package("sacrebleu")
    hypotheses: list[str] = []
    references: list[str] = []
    with torch.inference_mode():
        for batch in batches:
            if not batch.texts:
                raise DataError("data.eval", "has no reference sentences", "name the file of translations as `target`")
            hypotheses += _translate(task, module, batch.to(device))
            references += batch.texts
            advance(len(references))
    metric = sacrebleu.BLEU()
    value = float(metric.corpus_score(hypotheses, [references]).score)
    generator = np.random.default_rng(0)
    scores = []
    for _ in range(RESAMPLES):
        chosen = generator.integers(len(references), size=len(references))
        resampled = metric.corpus_score([hypotheses[i] for i in chosen], [[references[i] for i in chosen]])
        scores.append(float(resampled.score))
    low, high = np.quantile(scores, [0.025, 0.975])
    sentence = sacrebleu.BLEU(effective_order=True)
    each = np.array([sentence.sentence_score(h, [r]).score for h, r in zip(hypotheses, references, strict=True)])
    return [Measurement("bleu", value, len(references), float(low), float(high), True, each, np.ones(len(each)))]


def _translate(task: Translation, module: nn.Module, batch: Batch) -> list[str]:
    decode = getattr(module, "decode_text", None)
    if decode is None:
        what = f"{type(module).__name__} does not say how its tokens become text"
        raise DataError("task", what, "give the model an attribute decode_text: ids -> text")
    if hasattr(module, "generate"):
        ids = module.generate(**batch.kwargs, max_length=task.length, num_beams=task.beams)  # type: ignore[operator]
        return [decode(row.tolist()) for row in ids]
    source = batch.args[0] if batch.args else batch.kwargs["input_ids"]
    beams = _search(task, module, source)
    return [decode(row) for row in beams]


def _search(task: Translation, module: nn.Module, source: Tensor) -> list[list[int]]:
    """The likeliest translations by beam search, greedy with one beam; finished ones keep their score."""
    begin, end = int(module.begin), int(module.end)  # type: ignore[arg-type]
    samples, beams = len(source), task.beams
    repeated = source.repeat_interleave(beams, 0)
    prefix = torch.full((samples * beams, 1), begin, dtype=torch.long, device=source.device)
    scores = torch.full((samples, beams), -torch.inf, device=source.device)
    scores[:, 0] = 0
    finished = torch.zeros(samples, beams, dtype=torch.bool, device=source.device)
    for _ in range(task.length):
        logits = first_tensor(module(repeated, prefix))[:, -1].float().log_softmax(-1).view(samples, beams, -1)
        # A finished beam can only go on with its end, at no cost.
        stay = torch.full_like(logits, -torch.inf)
        stay[..., end] = 0
        logits = torch.where(finished.unsqueeze(2), stay, logits)
        scores, flat = (scores.unsqueeze(2) + logits).flatten(1).topk(beams, 1)
        parent, token = flat // logits.shape[2], flat % logits.shape[2]
        rows = (torch.arange(samples, device=source.device).unsqueeze(1) * beams + parent).flatten()
        prefix = torch.cat([prefix[rows], token.view(-1, 1)], 1)
        finished = finished.gather(1, parent) | (token == end)
        if bool(finished.all()):
            break
    best = prefix.view(samples, beams, -1)[torch.arange(samples), scores.argmax(1)].tolist()
    return [[token for token in row[1:] if token != end] for row in best]

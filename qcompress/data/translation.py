"""The BLEU of a translation model is measured here: sentences are decoded and held against their references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.data.batches import Batch, Batches, first_tensor
from qcompress.data.measurement import Measurement
from qcompress.data.text import Sentences
from qcompress.data.user_code import import_package
from qcompress.errors import DataError
from qcompress.types.ranks import ALONE, World
from qcompress.types.settings import Translation

RESAMPLES = 200
TARGET = "decoder_input_ids"

NextToken = Callable[[Tensor, Tensor], Tensor]
"""(samples int64 [rows], their prefixes int64 [rows, length]) -> logits [rows, vocabulary] of what comes next."""


def measure_translation(
    task: Translation,
    module: nn.Module,
    batches: Batches,
    device: torch.device,
    advance: Callable[[int], None],
    world: World = ALONE,
) -> list[Measurement]:
    """Corpus BLEU by sacrebleu; its interval from resampled sentences (Koehn 2004).

    A module with `generate` (transformers) is asked for its own decoding. Any other is called as for training, with the
    translation so far as `decoder_input_ids`, or behind positional inputs, and gives logits [samples, length,
    vocabulary]; with `encode` and `decode` too (forward is decode(encode(input_ids, attention_mask), attention_mask,
    decoder_input_ids)) a source is encoded once. Where a translation begins and ends and how its ids become text is
    what the module's `begin`, `end` and `decode_text` say, else what the tokenizer of the data does.

    raises  DataError for data without references, and where begin, end or the text of ids is known to neither
    """
    bleu = import_package("sacrebleu").BLEU
    own: list[tuple[Sequence[str], Sequence[str]]] = []
    done = 0
    with torch.inference_mode():
        for batch in batches.of_rank(world):
            world.check()
            if not batch.texts:
                raise DataError("data.eval", "has no reference sentences", "name the file of translations as `target`")
            own.append((_translate(task, module, batch.to(device)), batch.texts))
            done += len(batch.texts) * world.size
            advance(min(done, batches.samples))
    rows = world.tell_in_turn(own)
    hypotheses, references = ([text for row in rows for text in row[part]] for part in (0, 1))
    value = float(bleu().corpus_score(hypotheses, [references]).score)
    sentence = bleu(effective_order=True)
    each = [sentence.sentence_score(h, [r]) for h, r in zip(hypotheses, references, strict=True)]
    low, high = _interval(bleu.compute_bleu, each)
    scores = np.array([one.score for one in each])
    return [Measurement("bleu", value, len(references), low, high, True, scores, np.ones(len(scores)))]


def _interval(compute_bleu: Callable[..., Any], each: Sequence[Any]) -> tuple[float, float]:
    """The middle 95 % of corpus BLEU, which follows from the sentences' summed counts, over sentences drawn again."""
    counts: NDArray[np.int64] = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in each])
    orders = len(each[0].counts)
    generator = np.random.default_rng(0)
    scores = []
    for _ in range(RESAMPLES):
        *grams, ours, theirs = counts[generator.integers(len(counts), size=len(counts))].sum(0).tolist()
        scores.append(compute_bleu(grams[:orders], grams[orders:], ours, theirs, smooth_method="exp").score)
    low, high = np.quantile(scores, [0.025, 0.975])
    return float(low), float(high)


def _translate(task: Translation, module: nn.Module, batch: Batch) -> list[str]:
    decode = _known(module, batch, "decode_text", "decode")
    if hasattr(module, "generate"):
        ids = module.generate(**_source(batch), max_length=task.length, num_beams=task.beams)  # type: ignore[operator]
        rows = ids.tolist()
    else:
        begin, end = (int(_known(module, batch, name, name)) for name in ("begin", "end"))
        device = batch.args[0].device if batch.args else batch.kwargs["input_ids"].device
        prefix = torch.full((batch.size, 1), begin, device=device)
        found = search(_next_token(module, batch), prefix, end, task.length, task.beams)
        rows = [[token for token in row if token != end] for row in found.tolist()]
    return [decode(row) for row in rows]


def _known(module: nn.Module, batch: Batch, name: str, tokenizer_name: str) -> Any:
    found = getattr(module, name, None)
    if found is None and isinstance(batch, Sentences):
        found = getattr(batch.tokenizer, tokenizer_name, None)
    if found is None:
        what = f"neither {type(module).__name__} nor the data's tokenizer says `{name}`"
        hint = "name a tokenizer.json that puts a begin and an end token around a sentence, or give the model "
        raise DataError("task", what, hint + "attributes begin, end and decode_text: ids -> text")
    return found


def _source(batch: Batch) -> Mapping[str, Tensor]:
    return {name: x for name, x in batch.kwargs.items() if name != TARGET}


def _next_token(module: nn.Module, batch: Batch) -> NextToken:
    source: Any = _source(batch)
    if not batch.args and source.keys() == {"input_ids", "attention_mask"} and hasattr(module, "encode"):
        parts: Any = module
        memory, mask = parts.encode(**source), source["attention_mask"]
        return lambda samples, prefix: parts.decode(memory[samples], mask[samples], prefix)[:, -1]

    def next_token(samples: Tensor, prefix: Tensor) -> Tensor:
        args = [x[samples] for x in batch.args]
        kwargs = {name: x[samples] for name, x in source.items()}
        output = module(*args, prefix, **kwargs) if args else module(**kwargs, **{TARGET: prefix})
        return first_tensor(output)[:, -1]

    return next_token


def search(next_token: NextToken, prefix: Tensor, end: int, length: int, beams: int) -> Tensor:
    """The likeliest translations by beam search, greedy with one beam: int64 [samples, length], `end` behind their end.

    prefix  int64 [samples, 1], what every translation begins with, which is not given back
    length  most tokens of a translation

    A beam's score is its log-likelihood, whatever its length. It only falls, so a sample is done when its best beam is
    finished, and runs no further.
    """
    samples = len(prefix)
    found = torch.full((samples, beams, length + 1), end, device=prefix.device)
    found[:, :, 0] = prefix
    scores = torch.full((samples, beams), -torch.inf, device=prefix.device)
    scores[:, 0] = 0
    finished = torch.zeros(samples, beams, dtype=torch.bool, device=prefix.device)
    for place in range(1, length + 1):
        rows = (~finished[:, 0]).nonzero().squeeze(1)
        if len(rows) == 0:
            break
        so_far = found[rows, :, :place]
        logits = next_token(rows.repeat_interleave(beams), so_far.flatten(0, 1))
        logits = logits.float().log_softmax(-1).view(len(rows), beams, -1)
        # A finished beam can only go on with its end, at no cost.
        stay = torch.full_like(logits[0, 0], -torch.inf)
        stay[end] = 0
        logits = torch.where(finished[rows].unsqueeze(2), stay, logits)
        scores[rows], flat = (scores[rows].unsqueeze(2) + logits).flatten(1).topk(beams, 1)
        parent, token = flat // logits.shape[2], flat % logits.shape[2]
        found[rows, :, :place] = so_far.gather(1, parent.unsqueeze(2).expand_as(so_far))
        found[rows, :, place] = token
        finished[rows] = token == end
    return found[:, 0, 1:]

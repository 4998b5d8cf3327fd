"""The networks for training: sizes against hand arithmetic, what each must compute, and that methods can trace them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qcompress.data.batches import Batch, run_model
from qcompress.data.user_code import find_callable
from qcompress.model.build import load_weights
from qcompress.model.trace import run, trace

WORDS, WIDTH, HIDDEN = 23, 16, 24


def factory(name: str) -> Callable[..., nn.Module]:
    return find_callable(f"nets/{name}", ROOT / "recipes", True, "test")


alexnet = factory("alexnet_cifar.py:alexnet")
vgg16 = factory("vgg16_cifar.py:vgg16")
translation_transformer = factory("translation_transformer.py:translation_transformer")


def small_transformer(dropout: float = 0.1, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    module = translation_transformer(WORDS, WIDTH, layers, heads=4, hidden=HIDDEN, dropout=dropout, length=20)
    with torch.no_grad():
        # Whatever begins at zero or one would hide what it does.
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module.eval()


def sentences(samples: int, source: int, target: int, seed: int = 0) -> Batch:
    """Random sentences of unequal lengths, the first one whole."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (samples, source), generator=generator)
    lengths = torch.randint(1, source + 1, (samples, 1), generator=generator)
    lengths[0] = source
    mask = (torch.arange(source) < lengths).long()
    prefix = torch.randint(3, WORDS, (samples, target), generator=generator)
    return Batch(kwargs={"input_ids": ids * mask, "attention_mask": mask, "decoder_input_ids": prefix})


def images(samples: int) -> Batch:
    return Batch((torch.randn(samples, 3, 32, 32, generator=torch.Generator().manual_seed(1)),))


SMALL: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]] = {
    "alexnet": (lambda: alexnet(7, 0.125), images),
    "vgg16": (lambda: vgg16(7, 0.125), images),
    "vgg16 without batch norm": (lambda: vgg16(7, 0.125, batch_norm=False), images),
    "transformer": (small_transformer, lambda samples: sentences(samples, 5, 4)),
}
EVERY = pytest.mark.parametrize(("make", "inputs"), SMALL.values(), ids=list(SMALL))


def n_parameters(make: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())


def dense(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def test_alexnet_has_the_parameters_of_its_layers() -> None:
    convolutions = (
        (3 * 9 + 1) * 64 + (64 * 9 + 1) * 192 + (192 * 9 + 1) * 384 + (384 * 9 + 1) * 256 + (256 * 9 + 1) * 256
    )
    hidden = dense(256 * 2 * 2, 4096) + dense(4096, 4096)
    assert n_parameters(alexnet) == convolutions + hidden + dense(4096, 10)
    assert n_parameters(lambda: alexnet(100)) == convolutions + hidden + dense(4096, 100)
    half = (3 * 9 + 1) * 32 + (32 * 9 + 1) * 96 + (96 * 9 + 1) * 192 + (192 * 9 + 1) * 128 + (128 * 9 + 1) * 128
    assert n_parameters(lambda: alexnet(10, 0.5)) == half + dense(512, 2048) + dense(2048, 2048) + dense(2048, 10)


def test_vgg16_has_the_parameters_of_its_layers() -> None:
    channels = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    weights = sum(9 * before * after for before, after in pairwise(channels))
    head = dense(512, 512) + dense(512, 512) + dense(512, 10)
    assert n_parameters(vgg16) == weights + 2 * sum(channels[1:]) + head
    assert n_parameters(lambda: vgg16(batch_norm=False)) == weights + sum(channels[1:]) + head
    with torch.device("meta"):
        shapes = [p.shape for name, p in vgg16(10, 0.25).named_parameters() if name.endswith("weight") and p.ndim > 1]
    assert [shape[0] for shape in shapes] == [size // 4 for size in channels[1:]] + [128, 128, 10]


def test_the_transformer_has_the_parameters_of_its_layers() -> None:
    v, w, h, layers = 4000, 256, 1024, 3
    attention, feed, norm = 4 * dense(w, w), dense(w, h) + dense(h, w), 2 * w
    encoder, decoder = attention + feed + 2 * norm, 2 * attention + feed + 3 * norm
    assert n_parameters(lambda: translation_transformer(v)) == v * w + layers * (encoder + decoder) + 2 * norm


@EVERY
def test_outputs_have_their_shape_and_every_parameter_learns(make: Callable[[], nn.Module], inputs: object) -> None:
    torch.manual_seed(0)
    module, batch = make().train(), inputs(6)
    logits = run_model(module, batch)
    assert logits.shape == ((6, 7) if batch.args else (6, 4, WORDS))
    logits.square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    # A key's bias adds the same to all scores of a query, which the softmax takes away.
    still = [
        name for name, g in gradients.items() if not name.endswith(".k.bias") and (g is None or not g.norm() > 1e-4)
    ]
    assert still == []


@EVERY
def test_dropout_is_for_training_only(make: Callable[[], nn.Module], inputs: object) -> None:
    module, batch = make().eval(), inputs(3)
    with torch.no_grad():
        assert torch.equal(run_model(module, batch), run_model(module, batch))
        module.train()
        one, other = (run_model(module, batch) for _ in range(2))
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("make", [alexnet, lambda **k: vgg16(batch_norm=False, **k)], ids=["alexnet", "vgg16"])
def test_signals_neither_fade_nor_explode_without_batch_norm(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    module = make(classes=50, width=0.25).eval()
    with torch.no_grad():
        spread = float(run_model(module, images(16)).square().mean().sqrt())
    assert 0.2 < spread < 10


@EVERY
def test_weights_go_through_a_checkpoint(make: Callable[[], nn.Module], inputs: object, tmp_path: Path) -> None:
    module, batch = make().eval(), inputs(3)
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    other = make().eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.5)
    load_weights(other, load_file(tmp_path / "model.safetensors"), "model.safetensors")
    with torch.no_grad():
        assert torch.equal(run_model(module, batch), run_model(other, batch))


@EVERY
def test_methods_can_trace_it_for_any_number_of_samples(make: Callable[[], nn.Module], inputs: object) -> None:
    module = make().eval()
    layers = {name for name, one in module.named_modules() if isinstance(one, nn.Conv2d | nn.Linear)}
    graph = trace(module, layers, inputs(2))
    assert {str(node.target) for node in graph.nodes if node.op == "call_module"} >= layers
    longer = inputs(5) if inputs is images else sentences(5, 9, 7)
    with torch.no_grad():
        assert torch.allclose(run(graph, module, longer), run_model(module, longer), atol=1e-5)


def answer(module: nn.Module, batch: Batch, **changes: Tensor) -> Tensor:
    with torch.no_grad():
        return module(**{**batch.kwargs, **changes})


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_transformer_is_torchs_own_with_the_same_weights() -> None:
    """torch.nn.Transformer, which normalizes first, with its projections put together from ours."""
    module, batch = small_transformer(), sentences(4, 6, 5)
    theirs = nn.Transformer(WIDTH, 4, 2, 2, HIDDEN, batch_first=True, norm_first=True).eval()
    names = {"attention": "self_attn", "cross": "multihead_attn", "feed.expand": "linear1", "feed.contract": "linear2"}
    state = {}
    for side in ("encoder", "decoder"):
        norms = ("attention_norm", "feed_norm") if side == "encoder" else ("attention_norm", "cross_norm", "feed_norm")
        for number, layer in enumerate(getattr(module, side)):
            prefix = f"{side}.layers.{number}"
            for mine, their in (*names.items(), *((norm, f"norm{n}") for n, norm in enumerate(norms, start=1))):
                if mine == "cross" and side == "encoder":
                    continue
                part = layer.get_submodule(mine)
                for kind in ("weight", "bias"):
                    if mine in ("attention", "cross"):
                        joined = torch.cat([getattr(one, kind) for one in (part.q, part.k, part.v)])
                        state[f"{prefix}.{their}.in_proj_{kind}"] = joined
                        state[f"{prefix}.{their}.out_proj.{kind}"] = getattr(part.out, kind)
                    else:
                        state[f"{prefix}.{their}.{kind}"] = getattr(part, kind)
        for kind in ("weight", "bias"):
            state[f"{side}.norm.{kind}"] = getattr(getattr(module, f"{side}_norm"), kind)
    theirs.load_state_dict(state)
    ids, mask, prefix = (batch.kwargs[name] for name in ("input_ids", "attention_mask", "decoder_input_ids"))
    with torch.no_grad():
        mixed = theirs(
            module.embed(ids),
            module.embed(prefix),
            tgt_mask=torch.ones(5, 5).triu(1).bool(),
            src_key_padding_mask=mask == 0,
            memory_key_padding_mask=mask == 0,
        )
    expected = mixed @ module.embedding.weight.T
    assert torch.allclose(answer(module, batch), expected, atol=1e-4)


def test_positions_are_the_papers_sinusoids() -> None:
    """PE(place, 2i) = sin(place / 10000**(2i / width)) and its cosine, in two halves instead of alternating."""
    module = small_transformer()
    ids = torch.full((1, 7), 5)
    with torch.no_grad():
        signals = module.embed(ids)[0] - 4 * module.embedding.weight[5]
    for place in range(7):
        for pair in range(WIDTH // 2):
            angle = torch.tensor(place / 10000 ** (2 * pair / WIDTH))
            assert signals[place, pair] == pytest.approx(float(angle.sin()), abs=1e-5)
            assert signals[place, WIDTH // 2 + pair] == pytest.approx(float(angle.cos()), abs=1e-5)


def test_padding_changes_no_real_position() -> None:
    module = small_transformer()
    batch = sentences(3, 6, 5)
    batch.kwargs["attention_mask"][:] = 1
    expected = answer(module, batch)
    ids, mask, prefix = (batch.kwargs[name] for name in ("input_ids", "attention_mask", "decoder_input_ids"))
    for filler in (0, 9):
        wider = torch.cat([ids, torch.full((3, 4), filler)], 1)
        masked = torch.cat([mask, torch.zeros(3, 4, dtype=torch.long)], 1)
        longer = torch.cat([prefix, torch.full((3, 2), filler)], 1)
        found = answer(module, batch, input_ids=wider, attention_mask=masked, decoder_input_ids=longer)
        assert torch.allclose(found[:, :5], expected, atol=1e-5)


def test_a_sentence_alone_is_as_in_its_batch() -> None:
    module, batch = small_transformer(), sentences(4, 7, 5)
    together = answer(module, batch)
    for row in range(4):
        length = int(batch.kwargs["attention_mask"][row].sum())
        ids, prefix = (
            batch.kwargs["input_ids"][row : row + 1, :length],
            batch.kwargs["decoder_input_ids"][row : row + 1],
        )
        alone = answer(module, batch, input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=prefix)
        assert torch.allclose(alone[0], together[row], atol=1e-5)


def test_the_decoder_sees_its_past_and_no_future() -> None:
    module, batch = small_transformer(), sentences(2, 5, 6)
    before = answer(module, batch)
    for place in range(6):
        prefix = batch.kwargs["decoder_input_ids"].clone()
        prefix[:, place] = (prefix[:, place] + 1) % WORDS
        change = (answer(module, batch, decoder_input_ids=prefix) - before).abs().amax((0, 2))
        assert bool((change[:place] == 0).all()) and bool((change[place:] > 1e-4).all())


def test_every_place_of_the_source_reaches_the_answer() -> None:
    module, batch = small_transformer(), sentences(1, 5, 3)
    before = answer(module, batch)
    for place in range(5):
        ids = batch.kwargs["input_ids"].clone()
        ids[:, place] = (ids[:, place] + 1) % WORDS
        assert float((answer(module, batch, input_ids=ids) - before).abs().max()) > 1e-4
    assert not torch.allclose(answer(module, batch, input_ids=batch.kwargs["input_ids"].flip(1)), before, atol=1e-4)


def test_teacher_forcing_gives_what_decoding_step_by_step_gives() -> None:
    module, batch = small_transformer(), sentences(3, 6, 7)
    whole = answer(module, batch)
    ids, mask, prefix = (batch.kwargs[name] for name in ("input_ids", "attention_mask", "decoder_input_ids"))
    with torch.no_grad():
        memory = module.encode(ids, mask)
        for length in range(1, 8):
            assert torch.allclose(
                module.decode(memory, mask, prefix[:, :length])[:, -1], whole[:, length - 1], atol=1e-5
            )


def test_quantizers_and_hooks_see_every_projection() -> None:
    module, batch = small_transformer(), sentences(2, 5, 4)
    seen: set[str] = set()
    for name, one in module.named_modules():
        one.register_forward_pre_hook(lambda *_, name=name: seen.add(name))
    answer(module, batch)
    assert {name for name, one in module.named_modules() if any(True for _ in one.parameters(recurse=False))} <= seen


def test_embedding_and_output_are_one_tensor() -> None:
    module, batch = small_transformer(), sentences(2, 5, 4)
    before = answer(module, batch)
    with torch.no_grad():
        # No sentence holds this token, so that only the output changes.
        module.embedding.weight[1] += 1
    change = (answer(module, batch) - before).abs().amax((0, 1))
    assert float(change[1]) > 1e-3 and float(change[0]) == 0 and bool((change[2:] == 0).all())


@pytest.mark.parametrize(("width", "heads"), [(16, 3), (9, 3)])
def test_widths_that_do_not_divide_are_refused(width: int, heads: int) -> None:
    with pytest.raises(ValueError, match=f"width {width} is not even, or no multiple of the {heads} heads"):
        translation_transformer(WORDS, width, 1, heads)

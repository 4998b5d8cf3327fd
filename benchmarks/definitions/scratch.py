"""Rows of networks trained from scratch with and without DSMM, then quantized: Kundu et al. 2024, Tables 1, 3 and 4.

ResNet-20 for 7 epochs and a MobileNetV1 of half the width for 6, on 20,000 images of CIFAR-10. Rows that train go on
from their saved state when they are run again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ledger import Row, work_file
from tables import Cell, Table, mean

from .words import TOP1, live

WIDTHS = (4, 3, 2)
GLANCE = ("data.eval.samples=1000",)
"""While a network is trained a thousand images are enough."""
MEASURED = ("data.eval.samples=2000",)
"""What is quantized is measured on these."""


class Network(NamedTuple):
    """The stem of its recipes, what other recipes are told so that they take it, and seconds of a training."""

    title: str
    recipe: str
    changes: tuple[str, ...]
    layers: tuple[int, ...]
    seconds: int


class Training(NamedTuple):
    """A recipe, what is changed in it, the seeds, and the training whose checkpoint it starts from, if any.

    recipe  the end of its name where it trains from scratch, else its name
    """

    title: str
    recipe: str
    changes: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    source: str = ""


SEEDS = (0, 1, 2)
NETWORKS = {
    "resnet20": Network("ResNet-20", "cifar10/resnet20_scratch", (), (0, 10, 19), 290),
    "mobilenet": Network(
        "MobileNetV1",
        "cifar10/mobilenet_v1_scratch",
        ("model.factory=../nets/mobilenet_v1.py:mobilenet_v1_cifar",),
        (0, 13, 27),
        500,
    ),
}
STRENGTHS = (0.01, 0.03, 0.3, 1.0)
FINETUNED = "none_then_dsmm"


def strong(strength: float) -> Training:
    rule = f"finetune.regularize.0.dsmm.strength={strength:g}"
    return Training(f"DSMM, strength {strength:g}", "dsmm", (rule,))


TRAININGS: dict[str, dict[str, Training]] = {
    "resnet20": {
        "none": Training("no regularizer", "none", (), SEEDS),
        "dsmm": Training("DSMM, strength 0.1", "dsmm", (), SEEDS),
        "heavy_l2": Training("heavy L2", "heavy_l2", (), SEEDS),
        "dsmm_paper": Training("DSMM, paper", "dsmm_paper"),
        "dsmm_alpha10": Training("DSMM, alpha 10", "dsmm_alpha10"),
        **{f"dsmm_{strength:g}": strong(strength) for strength in STRENGTHS},
        "dsmm_schedule": Training(
            "DSMM, paper, strength: schedule", "dsmm_paper", ("finetune.regularize.0.dsmm.strength=schedule",)
        ),
        FINETUNED: Training(
            "no regularizer, then 3 epochs of DSMM",
            "cifar10/resnet20_train_dsmm",
            ("finetune.epochs=3", "finetune.regularize.0.dsmm={strength: 0.1}"),
            (0,),
            "none",
        ),
    },
    "mobilenet": {
        "none": Training("no regularizer", "none", (), SEEDS),
        "dsmm": Training("DSMM, strength 0.1", "dsmm", (), SEEDS),
    },
}


class Way(NamedTuple):
    """A method after training: its name in recipes, the grids and widths it is given, about its seconds.

    options  beside bits and granularity
    recipe   the end of its recipe's name
    names    trainings whose first seed alone it is run on; all where empty
    """

    method: str
    grains: tuple[str, ...]
    seconds: int
    widths: tuple[int, ...] = WIDTHS
    options: str = ""
    recipe: str = "w4a8"
    names: tuple[str, ...] = ()


PAIR = ("none", "dsmm")
TABLE_1 = (*PAIR, "heavy_l2", "dsmm_alpha10", "dsmm_paper")
VECTORS = (2, 4)
"""Lengths of vectors that DSMM is told of in trainings of their own."""
QUICK = "preset: paper, iterations: 300, correction_steps: 20"
WAYS = {
    "naive": Way("rtn", ("tensor", "channel"), 14),
    "squant": Way("squant", ("tensor", "channel"), 14),
    "dfq": Way("dfq", ("tensor",), 14),
    "squant paper": Way("squant", ("tensor",), 20, WIDTHS, "preset: paper", "paper", PAIR),
    "dfq paper": Way("dfq", ("tensor",), 25, WIDTHS, "preset: paper", "paper", PAIR),
    "gptq": Way("gptq", ("tensor",), 30, WIDTHS, "", "w4a8", PAIR),
    "gptq paper": Way("gptq", ("tensor",), 30, WIDTHS, "preset: paper", "paper", PAIR),
    "adaround": Way("adaround", ("tensor",), 30, (2,), "", "w4a8", PAIR),
    "adaround paper": Way("adaround", ("tensor",), 700, (2,), "preset: paper, iterations: 2000", "paper", PAIR),
    "pdquant": Way("pdquant", ("tensor",), 110, (2,), "", "w4a8", PAIR),
    "pdquant paper": Way("pdquant", ("tensor",), 400, (2,), QUICK, "paper", PAIR),
}
ALWAYS = ("naive", "squant", "dfq")
"""Methods that every network is given."""


def start(network: str, name: str, seed: int = 0) -> str:
    """The row that trains."""
    return f"scratch/{network}/{name}/seed{seed}"


def trained(network: str, name: str, seed: int) -> Row:
    about, training = NETWORKS[network], TRAININGS[network][name]
    changes = (*GLANCE, *training.changes)
    if training.source:
        return finetuned(network, name, training, seed)
    figures = {"top1 of 1000": "0.metrics.top1"}
    figures |= {f"naive channel W{bits}": f"0.naive.{index}.after" for index, bits in enumerate((2, 3, 4))}
    if name.startswith("dsmm"):
        figures |= {f"alpha of layer {layer}": f"0.layers.{layer}.temperature" for layer in about.layers}
    command = live("finetune-reg", "", f"{about.recipe}_{training.recipe}", changes, f" --seed {seed} --resume")
    return Row(name=start(network, name, seed), commands=(command,), figures=figures, seconds=about.seconds)


def finetuned(network: str, name: str, training: Training, seed: int) -> Row:
    source = start(network, training.source, seed)
    changes, more = (*GLANCE, *training.changes), f" --seed {seed} --resume"
    return Row(
        name=start(network, name, seed),
        commands=(live("finetune-reg", work_file(source), training.recipe, changes, more),),
        figures={"top1 of 1000": "0.metrics.top1"},
        seconds=130,
        needs=(source,),
    )


def name_of(network: str, name: str, seed: int, way: str, grain: str, bits: int) -> str:
    return f"{start(network, name, seed)}/{way.replace(' ', '-')}/{grain}/w{bits}"


def quantized(network: str, name: str, seed: int, way: str, grain: str, bits: int) -> Row:
    about = WAYS[way]
    if about.options:
        rule: tuple[str, ...] = (f"rules.0.{about.method}={{bits: {bits}, granularity: {grain}, {about.options}}}",)
    else:
        rule = (f"rules.0.{about.method}.bits={bits}", f"rules.0.{about.method}.granularity={grain}")
    changes = (*NETWORKS[network].changes, *MEASURED, *rule)
    recipe = f"cifar10/resnet20_{about.method}_{about.recipe}"
    return Row(
        name=name_of(network, name, seed, way, grain, bits),
        commands=(live("quantize", work_file(start(network, name, seed)), recipe, changes),),
        figures=TOP1,
        seconds=about.seconds,
        needs=(start(network, name, seed),),
    )


def all_quantized(network: str, name: str, seed: int, ways: Iterable[str]) -> Iterator[Row]:
    for way in ways:
        about = WAYS[way]
        for grain, bits in itertools.product(about.grains, about.widths):
            yield quantized(network, name, seed, way, grain, bits)


QAT = {"pact": "PACT", "lsq": "LSQ"}
PACT = {"none": "pact_w2a2_scratch", "dsmm": "pact_w2a2_scratch_dsmm"}
"""Training -> the recipe of PACT on its grids from the first step."""
SETTINGS = ((1, 1), (2, 1), (2, 2), (4, 4))
"""Bits of a code, and weights that share one."""
SHARED = {
    "fp32": "0.accuracy.top1.baseline",
    "kmeans": "0.accuracy.top1.kmeans",
    "top1": "0.accuracy.top1.artifact",
    "bytes": "0.size.artifact_bytes",
}


def on_grids(name: str, method: str) -> Row:
    """Trained on 2 bits for the ten epochs of the recipe, from a checkpoint."""
    source = start("resnet20", name)
    return Row(
        name=f"{source}/{method}-w2a2",
        commands=(live("quantize", work_file(source), f"cifar10/resnet20_{method}_w2a2", (), " --resume"),),
        figures=TOP1,
        seconds=1100,
        needs=(source,),
    )


def on_grids_from_scratch(name: str) -> Row:
    return Row(
        name=f"scratch/resnet20/{name}/pact-w2a2/seed0",
        commands=(live("quantize", "", f"cifar10/resnet20_{PACT[name]}", (), " --resume"),),
        figures={"top1": TOP1["top1"]},
        seconds=350,
    )


def shared(name: str, setting: tuple[int, int]) -> Row:
    """DKM for ten epochs; the ten channels of the last layer, which has the first rule, make no vectors of four."""
    source, (_, dim) = start("resnet20", name), setting
    changes = ["finetune.epochs=10", "data.train.batch_size=128"]
    for index, (width, length) in {1: setting, 0: (2, 2) if dim == 4 else setting}.items():
        changes += [f"rules.{index}.dkm.bits={width}", f"rules.{index}.dkm.dim={length}"]
    return Row(
        name=f"{source}/dkm/{setting[0]}-{setting[1]}",
        commands=(live("cluster", work_file(source), "cifar10/resnet20_dkm", changes, " --resume"),),
        figures=SHARED,
        seconds=700,
        needs=(source,),
    )


def rest_of_table_1() -> Iterator[Row]:
    """AdaRound and PD-Quant at 4 bits, and at 2 under the other lines of Table 1; of Table 3 what is fine-tuned."""
    for name, way, bits in itertools.product(TABLE_1, ("adaround", "pdquant"), (4, 2)):
        if name not in PAIR or bits == 4:
            yield quantized("resnet20", name, 0, way, "tensor", bits)
    yield quantized("resnet20", FINETUNED, 0, "pdquant", "tensor", 2)


def of_vectors(dim: int) -> Iterator[Row]:
    """A training whose range is that of each place in the vectors which DKM then shares."""
    changes = (*GLANCE, f"finetune.regularize.0.dsmm.dim={dim}")
    command = live("finetune-reg", "", "cifar10/resnet20_scratch_dsmm", changes, " --seed 0 --resume")
    name = vectors(dim)
    yield Row(
        name=start("resnet20", name), commands=(command,), figures={"top1 of 1000": "0.metrics.top1"}, seconds=290
    )
    yield shared(name, (dim, dim))


def vectors(dim: int) -> str:
    return f"dsmm_dim{dim}"


def rows() -> Iterator[Row]:
    """In the order in which they tell most: each network without and with DSMM first, other seeds last."""
    first = [("resnet20", name, 0) for name in ("none", "dsmm", "heavy_l2")]
    first += [("resnet20", name, seed) for seed in SEEDS[1:] for name in PAIR]
    first += [("resnet20", name, 0) for name in ("dsmm_paper", "dsmm_alpha10", FINETUNED)]
    first += [("mobilenet", name, 0) for name in PAIR]
    for network, name, seed in first:
        yield trained(network, name, seed)
        yield from all_quantized(network, name, seed, ALWAYS)
    for name in PAIR:
        yield from all_quantized("resnet20", name, 0, (way for way in WAYS if way not in ALWAYS))
    yield from (on_grids(name, method) for method, name in itertools.product(QAT, PAIR))
    yield from (on_grids_from_scratch(name) for name in PACT)
    yield from (shared(name, setting) for setting, name in itertools.product(SETTINGS, PAIR))
    for seed, network in itertools.product(SEEDS, NETWORKS):
        for name, training in TRAININGS[network].items():
            if seed in training.seeds and (network, name, seed) not in first:
                yield trained(network, name, seed)
                yield from all_quantized(network, name, seed, ALWAYS)
    yield from rest_of_table_1()
    for dim in VECTORS:
        yield from of_vectors(dim)


ROWS = tuple(rows())


def table(network: str, grain: str) -> Table:
    """Every training by the methods without data, on one grid a tensor or a channel."""
    columns = {f"{way} W{bits}A8": (way, bits) for way in ALWAYS if grain in WAYS[way].grains for bits in WIDTHS}
    lines: dict[str, list[str | Cell]] = {}
    for name, training in TRAININGS[network].items():
        full = tuple(name_of(network, name, seed, "naive", "tensor", 4) for seed in training.seeds)
        cells: list[str | Cell] = [training.title, Cell(full, mean("fp32"))]
        for way, bits in columns.values():
            found = tuple(name_of(network, name, seed, way, grain, bits) for seed in training.seeds)
            cells.append(Cell(found, mean("top1")))
        lines[training.title] = cells
    return Table(name=f"scratch {network} {grain}", columns=("trained with", "FP32", *columns), lines=lines)


def methods() -> Table:
    """Every method, as it is and as published, on ResNet-20 without and with DSMM: one grid a tensor, one seed."""
    places = [(name, bits) for bits in WIDTHS for name in PAIR]
    titles = {"none": "none", "dsmm": "DSMM"}
    lines: dict[str, list[str | Cell]] = {}
    for way, about in WAYS.items():
        cells: list[str | Cell] = [way]
        for name, bits in places:
            one = (name_of("resnet20", name, 0, way, "tensor", bits),)
            cells.append(Cell(one, mean("top1")) if bits in about.widths else "-")
        lines[way] = cells
    columns = ("method", *(f"W{bits}A8 {titles[name]}" for name, bits in places))
    return Table(name="scratch methods", columns=columns, lines=lines)


def qat() -> Table:
    lines: dict[str, list[str | Cell]] = {}
    for name in PAIR:
        title = TRAININGS["resnet20"][name].title
        after = [(f"{start('resnet20', name)}/{method}-w2a2",) for method in QAT]
        lines[title] = [title, *(Cell(one, mean("top1")) for one in after)]
        lines[title].append(Cell((f"scratch/resnet20/{name}/pact-w2a2/seed0",), mean("top1")))
    columns = ("trained with", *(f"{title} W2A2" for title in QAT.values()), "PACT W2A2 from scratch")
    return Table(name="scratch qat", columns=columns, lines=lines)


def codebooks() -> Table:
    lines: dict[str, list[str | Cell]] = {}
    for setting in SETTINGS:
        title = f"{setting[0]}/{setting[1]}"
        ones = [(f"{start('resnet20', name)}/dkm/{setting[0]}-{setting[1]}",) for name in PAIR]
        lines[title] = [title, *(Cell(one, mean(figure)) for figure in ("kmeans", "top1") for one in ones)]
        vector = (f"{start('resnet20', vectors(setting[1]))}/dkm/{title.replace('/', '-')}",)
        lines[title].append(Cell(vector, mean("top1")) if setting[1] in VECTORS else "-")
        lines[title].append(Cell(ones[0], mean("bytes", ".0f")))
    columns = (
        "bits/dim",
        "k-means, none:",
        "k-means, DSMM:",
        "DKM, none:",
        "DKM, DSMM:",
        "DKM, DSMM of vectors:",
        "bytes:",
    )
    return Table(name="scratch dkm", columns=columns, lines=lines)


TABLES = (
    *(table(network, grain) for network in NETWORKS for grain in ("tensor", "channel")),
    methods(),
    qat(),
    codebooks(),
)

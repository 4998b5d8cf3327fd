"""The two papers that the regularizers are of: their tables in their own shape, and what they claim of figures.

Kundu, Yoo, Cho, Adya 2024, with the longer version of it, R2-Loss (Kundu, Yoo, Mishra, Cho, Adya 2023, arXiv
2303.08253); Malchiodi, Ferraretto, Frasca 2026, arXiv 2602.03614. The rows are those of other groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from claims import Claim, Comparison, Side
from ledger import Row
from tables import Cell, Table, mean, plain_mean

from . import clusters, methods, qar, qat, scratch, text, training
from .words import CHANCE

ROWS: tuple[Row, ...] = ()
NETWORKS = {"resnet20": "ResNet-20", "mobilenet": "MobileNetV1"}


def seeds_of(network: str, *names: str) -> tuple[int, ...]:
    """The seeds that all of these trainings have."""
    wanted = [scratch.TRAININGS[network][name].seeds for name in names]
    return tuple(seed for seed in wanted[0] if all(seed in other for other in wanted))


def held(title: str, rows: Iterable[Sequence[str]], figure: str = "top1") -> Comparison:
    """Rows, and those of the same seeds that they are held against."""
    ours, base = (Side(rows=tuple(names), figure=figure) for names in rows)
    return Comparison(title=title, ours=ours, base=base)


def rows_of(network: str, name: str, way: str, bits: int, seeds: Iterable[int]) -> tuple[str, ...]:
    """A training from scratch under one method, one grid a tensor."""
    return tuple(scratch.name_of(network, name, seed, way, "tensor", bits) for seed in seeds)


def versus(network: str, ours: str, base: str, way: str, bits: int, figure: str = "top1") -> Comparison:
    """Two trainings from scratch under one method."""
    seeds = seeds_of(network, ours, base) if way in scratch.ALWAYS else (0,)
    setting = "FP32" if figure == "fp32" else f"{way} W{bits}A8"
    rows = (rows_of(network, name, way, bits, seeds) for name in (ours, base))
    return held(f"{NETWORKS[network]} {setting}", rows, figure=figure)


def all_versus(places: Iterable[tuple[str, str, int]], ours: str, base: str = "none") -> tuple[Comparison, ...]:
    """The same two trainings under each network, method and width."""
    return tuple(versus(network, ours, base, way, bits) for network, way, bits in places)


def each(networks: Iterable[str], ways: Iterable[str], widths: Iterable[int]) -> list[tuple[str, str, int]]:
    return list(itertools.product(networks, ways, widths))


def gain(network: str, way: str, bits: int) -> Side:
    """What DSMM adds to the accuracy under one method."""
    seeds = seeds_of(network, "dsmm", "none")
    return Side(rows=rows_of(network, "dsmm", way, bits, seeds), less=rows_of(network, "none", way, bits, seeds))


def gains_below(widths: Iterable[int]) -> Iterator[Comparison]:
    """The gain at each width against that at 4 bits."""
    for network, way, bits in each(NETWORKS, ("naive", "squant"), widths):
        title = f"{NETWORKS[network]} {way}, gain at W4 and W{bits}"
        yield Comparison(title=title, ours=gain(network, way, bits), base=gain(network, way, 4))


def full_precision(network: str, ours: str, base: str) -> Comparison:
    return versus(network, ours, base, "naive", 4, "fp32")


BETTER = (("dfq", "naive"), ("squant", "naive"), ("adaround", "dfq"), ("adaround", "squant"), ("pdquant", "adaround"))
"""Columns of Table 1, and those that they are above in the paper without a regularizer."""


def ordered() -> Iterator[Comparison]:
    """Methods on the checkpoint of ResNet-20, one grid a tensor."""
    for bits, (above, below) in itertools.product(methods.WIDTHS, BETTER):
        rows = ([methods.name_of("resnet20", column, "tensor", bits)] for column in (above, below))
        yield held(f"{above} over {below} W{bits}A8", rows)


BOTH = tuple(NETWORKS)
RESNET = ("resnet20",)
TABLE_1 = (
    Claim(name="gain", comparisons=all_versus(each(BOTH, ["naive"], [4]), "dsmm")),
    Claim(name="gain-below-4-bits", comparisons=all_versus(each(BOTH, ["naive"], [3, 2]), "dsmm")),
    Claim(name="constants", comparisons=all_versus(each(RESNET, ["naive"], [4, 3, 2]), "dsmm_paper")),
    Claim(name="schedule", comparisons=all_versus(each(RESNET, ["naive"], [4, 3, 2]), "dsmm_schedule")),
    Claim(
        name="gain-of-methods",
        comparisons=(
            *all_versus(each(BOTH, ["squant"], [4]), "dsmm"),
            *all_versus(each(RESNET, ["adaround", "pdquant"], [4]), "dsmm"),
        ),
    ),
    Claim(
        name="gain-of-methods-below-4-bits",
        comparisons=(
            *all_versus(each(BOTH, ["squant"], [3, 2]), "dsmm"),
            *all_versus(each(RESNET, ["adaround", "pdquant"], [2]), "dsmm"),
        ),
    ),
    Claim(name="gain-grows", comparisons=tuple(gains_below([3, 2]))),
    Claim(
        name="gain-as-published",
        comparisons=(
            *all_versus(each(RESNET, ["squant paper", "dfq paper"], [4, 3, 2]), "dsmm"),
            *all_versus(each(RESNET, ["adaround paper", "pdquant paper"], [2]), "dsmm"),
        ),
    ),
    Claim(name="gain-of-dfq", comparisons=all_versus(each(BOTH, ["dfq"], [4, 3, 2]), "dsmm")),
    Claim(name="heavy-l2", comparisons=all_versus(each(RESNET, ["naive"], [4, 3, 2]), "dsmm", "heavy_l2")),
    Claim(name="heavy-l2-gain", comparisons=all_versus(each(RESNET, ["naive"], [4]), "heavy_l2")),
    Claim(name="heavy-l2-price", comparisons=(full_precision("resnet20", "none", "heavy_l2"),)),
    Claim(name="heavy-l2-dfq", comparisons=all_versus(each(RESNET, ["dfq"], [4, 3, 2]), "none", "heavy_l2")),
    Claim(
        name="alpha-learned", comparisons=all_versus(each(RESNET, ["naive"], [4, 3, 2]), "dsmm_paper", "dsmm_alpha10")
    ),
    Claim(name="alpha-10", comparisons=all_versus(each(RESNET, ["naive"], [4, 3, 2]), "dsmm_alpha10")),
    Claim(
        name="price",
        comparisons=tuple(full_precision(network, "dsmm", "none") for network in BOTH),
        wanted="not below",
    ),
    Claim(name="order", comparisons=tuple(ordered()), wanted="not below"),
)
TABLE_4 = (
    Claim(
        name="gain-of-small-networks",
        comparisons=tuple(
            Comparison(
                title=f"{way} W4A8, gain of ResNet-20 and MobileNetV1",
                ours=gain("mobilenet", way, 4),
                base=gain("resnet20", way, 4),
            )
            for way in ("naive", "squant")
        ),
    ),
)
FINE = scratch.FINETUNED
TABLE_3 = (
    Claim(name="pdquant-2-bits", comparisons=all_versus(each(RESNET, ["pdquant"], [2]), "dsmm")),
    Claim(name="fine-tuned", comparisons=all_versus(each(RESNET, ["pdquant", "naive", "squant"], [2]), FINE)),
    Claim(
        name="scratch-over-fine-tuned",
        comparisons=all_versus(each(RESNET, ["pdquant", "naive", "squant"], [2]), "dsmm", FINE),
    ),
)


def after(name: str, method: str) -> str:
    return f"{scratch.start('resnet20', name)}/{method}-w2a2"


def on_grids(title: str, ours: str, base: str) -> Comparison:
    return held(f"{title} W2A2", ([ours], [base]))


def at_four_bits() -> Iterator[Comparison]:
    for method, title in qat.METHODS.items():
        rows = ([qat.name_of(key, method, 4, seed) for seed in qat.SEEDS] for key in ("dsmm", "checkpoint"))
        yield held(f"{title} W4A4", rows)


TABLE_5 = (
    Claim(name="pact", comparisons=(on_grids("PACT", after("dsmm", "pact"), after("none", "pact")),)),
    Claim(name="lsq", comparisons=(on_grids("LSQ", after("dsmm", "lsq"), after("none", "lsq")),)),
    Claim(
        name="lsq-over-pact",
        comparisons=tuple(
            on_grids(f"from {title}, LSQ over PACT", after(name, "lsq"), after(name, "pact"))
            for name, title in {"none": "no regularizer", "dsmm": "DSMM"}.items()
        ),
    ),
    Claim(
        name="pact-from-scratch",
        comparisons=(on_grids("PACT", *(f"scratch/resnet20/{name}/pact-w2a2/seed0" for name in ("dsmm", "none"))),),
    ),
    Claim(name="four-bits", comparisons=tuple(at_four_bits()), wanted="equal"),
)


def shared(method: str = "DKM", figure: str = "top1") -> Iterator[Comparison]:
    for bits, dim in scratch.SETTINGS:
        rows = ([f"{scratch.start('resnet20', name)}/dkm/{bits}-{dim}"] for name in ("dsmm", "none"))
        yield held(f"{method} {bits}/{dim}", rows, figure=figure)


def of_vectors(base: str) -> Iterator[Comparison]:
    """DSMM told of the length of the vectors that are shared."""
    for dim in scratch.VECTORS:
        names = (scratch.vectors(dim), base)
        yield held(f"DKM {dim}/{dim}", ([f"{scratch.start('resnet20', name)}/dkm/{dim}-{dim}"] for name in names))


def translated(name: str, bits: int, figure: str = "bleu") -> Side:
    return Side(rows=(text.name_of(name, bits),), figure=figure)


BLEU = 1.0
TABLE_2 = (
    Claim(
        name="transformer-naive",
        comparisons=(Comparison(title="W8 and FP32", ours=translated("none", 8, "fp32"), base=translated("none", 8)),),
        within=BLEU,
    ),
    Claim(
        name="transformer-dsmm",
        comparisons=(Comparison(title="FP32 and W8", ours=translated("dsmm", 8), base=translated("dsmm", 8, "fp32")),),
        wanted="not below",
        within=BLEU,
    ),
    Claim(
        name="transformer-gain",
        comparisons=tuple(
            Comparison(title=f"W{bits}", ours=translated("dsmm", bits), base=translated("none", bits))
            for bits in text.WIDTHS
        ),
        within=BLEU,
    ),
)
TABLE_6 = (
    Claim(
        name="mobilebert",
        comparisons=tuple(
            held(
                f"DKM {bits} bit{'s' * (bits > 1)}",
                ([text.shared_name(name, bits, seed) for seed in text.SEEDS] for name in ("dsmm", "none")),
                "accuracy",
            )
            for bits in text.BITS
        ),
        within=0.0,
    ),
)
FIGURE_3 = (
    Claim(name="dkm", comparisons=tuple(shared())),
    Claim(name="vectors", comparisons=tuple(of_vectors("none"))),
    Claim(name="vectors-over-scalars", comparisons=tuple(of_vectors("dsmm"))),
    Claim(name="kmeans", comparisons=tuple(shared("k-means", "kmeans")), floor=CHANCE),
)


def fine_tuned(ours: str, base: str, widths: Iterable[int] = training.WIDTHS) -> Iterator[Comparison]:
    """Two trainings from the checkpoint, naive, one grid a channel."""
    for bits in widths:
        rows = ([f"{training.start(name, seed)}/rtn/w{bits}" for seed in training.SEEDS] for name in (ours, base))
        yield held(f"ResNet-20 naive W{bits}A8", rows)


R2 = (
    Claim(name="linf", comparisons=tuple(fine_tuned("linf", "none"))),
    Claim(name="margin", comparisons=tuple(fine_tuned("margin", "none"))),
    Claim(
        name="uniform-grids",
        comparisons=tuple(
            replace(one, title=f"{name}, {one.title}")
            for name in ("linf", "margin")
            for one in fine_tuned(name, "dsmm", [2])
        ),
    ),
    Claim(
        name="clustering",
        comparisons=tuple(
            held(f"DKM {one[0]}/{one[1]}", ([clusters.name_of(key, "dkm", one)] for key in ("dsmm", "linf")))
            for one in clusters.SHARED
        ),
    ),
    Claim(name="dsmm-over-kurtosis", comparisons=tuple(fine_tuned("dsmm", "kurtosis"))),
)
STATIC, DYNAMIC = ("sine", "cosine"), ("min-squared", "exponential")


def codebooks(
    ours: Sequence[str], base: Sequence[str], when: str, scopes: Iterable[str] = ("all",), places: str = "all"
) -> tuple[Comparison, ...]:
    """Trainings for codebooks, `when` their entries are tuned or before, at each number of entries.

    places  `low` or `high`: the fewest or the most entries of a network; or its name and one of them: `vgg16 low`
    """
    found = []
    for (network, about), scope in itertools.product(qar.NETWORKS.items(), scopes):
        chosen = {"low": about.levels[:1], "high": about.levels[1:]}.get(places.split()[-1], about.levels)
        if places.split()[0] in qar.NETWORKS and network != places.split()[0]:
            continue
        for levels in chosen:
            rows = (
                [qar.clustered(network, name, levels, scope, seed) for name in names for seed in qar.seeds_of(scope)]
                for names in (ours, base)
            )
            layers = "" if scope == "all" else f" {scope}"
            found.append(held(f"{about.title} {levels}{layers}", rows, figure=qar.WHEN[when]))
    return tuple(found)


def over_kmeans(when: str, scopes: Iterable[str] = ("all",), places: str = "all") -> tuple[Comparison, ...]:
    """Each of the four against k-means without a regularizer."""
    return tuple(
        replace(one, title=f"{name} {one.title}")
        for name in qar.REGULARIZERS
        for one in codebooks([name], [qar.NONE], when, scopes, places)
    )


def full_of(network: str, name: str) -> Comparison:
    """Full precision with a regularizer and without, at the most entries."""
    levels = qar.NETWORKS[network].levels[-1]
    rows = ([qar.clustered(network, one, levels, "all", seed) for seed in qar.SEEDS] for one in (name, qar.NONE))
    return held(f"{name} {network} FP32", rows, figure="fp32")


PARTS = ("conv", "dense")
SECOND = (
    Claim(name="before-tuning", comparisons=over_kmeans("before", qar.SCOPES), share=0.9, floor=CHANCE),
    Claim(name="after-tuning-alexnet", comparisons=over_kmeans("after", qar.SCOPES, "alexnet low"), floor=CHANCE),
    Claim(name="after-tuning-vgg16", comparisons=over_kmeans("after", ["all"], "vgg16 low"), floor=CHANCE),
    Claim(
        name="after-tuning-vgg16-parts",
        comparisons=over_kmeans("after", PARTS, "vgg16 low"),
        wanted="equal",
        within=0.02,
        floor=CHANCE,
    ),
    Claim(
        name="after-tuning-many",
        comparisons=over_kmeans("after", qar.SCOPES, "high"),
        wanted="not below",
        share=0.9,
        floor=CHANCE,
    ),
    Claim(
        name="dynamic-over-static",
        comparisons=(*codebooks(DYNAMIC, STATIC, "before"), *codebooks(DYNAMIC, STATIC, "after")),
        paired=False,
        share=0.5,
        floor=CHANCE,
    ),
    Claim(
        name="dynamic-over-static-vgg16",
        comparisons=(
            *codebooks(DYNAMIC, STATIC, "before", places="vgg16 all"),
            *codebooks(DYNAMIC, STATIC, "after", places="vgg16 all"),
        ),
        paired=False,
        floor=CHANCE,
    ),
    Claim(
        name="exponential-over-min-squared",
        comparisons=(
            *codebooks(["exponential"], ["min-squared"], "before", qar.SCOPES),
            *codebooks(["exponential"], ["min-squared"], "after", qar.SCOPES),
        ),
        within=0.0,
        paired=False,
        share=0.5,
        floor=CHANCE,
    ),
    Claim(
        name="sine-equals-cosine",
        comparisons=(*codebooks(["sine"], ["cosine"], "before"), *codebooks(["sine"], ["cosine"], "after")),
        wanted="equal",
        within=0.02,
        share=0.9,
        floor=CHANCE,
    ),
    Claim(
        name="price-of-codebooks",
        comparisons=tuple(full_of(network, name) for network in qar.NETWORKS for name in qar.REGULARIZERS),
        wanted="not below",
    ),
)
ABSTRACT = (
    Claim(
        name="improves",
        comparisons=tuple(
            one
            for claim in (*TABLE_1, *TABLE_3, *TABLE_5, *FIGURE_3)
            if claim.name in ("gain", "gain-of-methods-below-4-bits", "pact", "lsq", "dkm")
            for one in claim.comparisons
        ),
    ),
)
CLAIMS = (*ABSTRACT, *TABLE_1, *TABLE_2, *TABLE_3, *TABLE_4, *TABLE_5, *TABLE_6, *FIGURE_3, *R2, *SECOND)

LINES = ("none", "heavy_l2", "dsmm_alpha10", "dsmm_paper", "dsmm")
"""Of Table 1, and below them what is ours."""


def table_1(network: str) -> Table:
    """The lines of the paper; its methods at W4A8, and at W2A8 those that are told apart there only."""
    columns = [(way, bits) for bits in (4, 2) for way in ("naive", "dfq", "adaround", "squant", "pdquant")]
    lines: dict[str, list[str | Cell]] = {}
    for name in LINES:
        if name not in scratch.TRAININGS[network]:
            continue
        about = scratch.TRAININGS[network][name]
        full = tuple(scratch.name_of(network, name, seed, "naive", "tensor", 4) for seed in about.seeds)
        cells: list[str | Cell] = [about.title, Cell(full, mean("fp32"))]
        for way, bits in columns:
            seeds = about.seeds if way in scratch.ALWAYS else (0,)
            rows = tuple(scratch.name_of(network, name, seed, way, "tensor", bits) for seed in seeds)
            cells.append(Cell(rows, mean("top1")) if set(rows) <= KNOWN else "-")
        lines[about.title] = cells
    titles = (f"{way} W{bits}A8:" for way, bits in columns)
    return Table(name=f"papers table 1 {network}", columns=("trained with", "FP32:", *titles), lines=lines)


KNOWN = {row.name for row in scratch.ROWS}


def table_3() -> Table:
    """PD-Quant at W2A8, DSMM from scratch and by fine-tuning; beside it the methods without data."""
    lines: dict[str, list[str | Cell]] = {}
    for name in ("none", "dsmm", FINE):
        title = scratch.TRAININGS["resnet20"][name].title
        ways = ("pdquant", "naive", "squant")
        rows = [(scratch.name_of("resnet20", name, 0, way, "tensor", 2),) for way in ways]
        full = (scratch.name_of("resnet20", name, 0, "naive", "tensor", 4),)
        lines[title] = [title, Cell(full, mean("fp32")), *(Cell(one, mean("top1")) for one in rows)]
    return Table(name="papers table 3", columns=("trained with", "FP32:", "pdquant:", "naive:", "squant:"), lines=lines)


def temperatures() -> Table:
    """Where a learned alpha comes to in the first, a middle and the last layer of ResNet-20."""
    layers = scratch.NETWORKS["resnet20"].layers
    lines: dict[str, list[str | Cell]] = {}
    for name in ("dsmm_paper", "dsmm_schedule", "dsmm_alpha10", "dsmm"):
        title = scratch.TRAININGS["resnet20"][name].title
        row = (scratch.start("resnet20", name),)
        lines[title] = [title, *(Cell(row, plain_mean(f"alpha of layer {layer}", ".2f")) for layer in layers)]
    columns = ("trained with", *(f"alpha, {place} layer:" for place in ("first", "middle", "last")))
    return Table(name="papers alpha", columns=columns, lines=lines)


def figure_3(when: str) -> Table:
    """Of the second paper: k-means without a regularizer, and the ratio to it with each."""
    lines: dict[str, list[str | Cell]] = {}
    for (network, about), scope in itertools.product(qar.NETWORKS.items(), qar.SCOPES):
        for levels in about.levels:
            base = tuple(qar.clustered(network, qar.NONE, levels, scope, seed) for seed in qar.seeds_of(scope))
            title, figure = f"{about.title}, {levels} entries, {scope}", qar.WHEN[when]
            cells: list[str | Cell] = [title, Cell(base, mean(figure, ".2f"))]
            for name in qar.REGULARIZERS:
                own = tuple(qar.clustered(network, name, levels, scope, seed) for seed in qar.seeds_of(scope))
                cells.append(Cell((*own, *base), qar.ratio(figure, f"qar/{network}/{qar.NONE}/")))
            cells.append(Cell(base, plain_mean("bytes", ",.0f")))
            lines[title] = cells
    ratios = (f"{name}:" for name in qar.REGULARIZERS)
    columns = ("network, entries a layer, layers shared", "k-means:", *ratios, "bytes of k-means:")
    return Table(name=f"papers codebooks {when}", columns=columns, lines=lines)


TABLES = (*(table_1(network) for network in NETWORKS), table_3(), temperatures(), figure_3("before"), figure_3("after"))

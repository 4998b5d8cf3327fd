"""Rows of rate-distortion, beside methods of fixed width and NNCodec, at real bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ledger import Row
from tables import Cell, Table, cpu, mean, plain_mean

from .words import MOBILENET, RESNET20, SIZE, STORIES, bare, live

SMALL_RATES = (1.4, 1.8)
"""Of whole files in which what is not compressed is stored in 16 bits."""
NNCODEC_QPS = (-24, -22, -20, -18, -16, -14, -12)
"""Quantization parameters: the larger, the larger the steps."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A checkpoint, its recipes, its metric, the budgets that it is coded at, and others that it is held against.

    fixed     stem of a recipe of a fixed width, whose rules the rows set
    table     the rule of an embedding, which calibrated methods do not know
    entquant  bits a weight that EntQuant's scheme is held against rd without data at
    seconds   about, of a run of rd, of one without data, and of one of a fixed width
    """

    title: str
    checkpoint: str
    recipe: str
    fixed: str
    metric: str
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    rivals: tuple[str, ...]
    table: str = ""
    entquant: tuple[float, ...] = ()
    seconds: tuple[int, int, int] = (85, 15, 25)


NETWORKS = {
    "resnet20": Network(
        title="CIFAR-10 ResNet-20, 5,000 test images",
        checkpoint=RESNET20,
        recipe="cifar10/resnet20_rd",
        fixed="benchmarks/recipes/resnet20",
        metric="top1",
        rates=(1.0, 1.5, 2.0, 2.5, 3.0),
        seeds=(0, 1, 2),
        rivals=tuple(f"{method}/w{bits}" for bits in (4, 3, 2) for method in ("rtn", "squant", "gptq", "huffman")),
        entquant=(2.0, 3.0),
    ),
    "stories": Network(
        title="stories260K, 300 texts",
        checkpoint=STORIES,
        recipe="stories/stories260k_rd",
        fixed="stories/stories260k_gptq_w3",
        metric="perplexity",
        rates=(2.0, 3.0, 4.0),
        seeds=(0, 1, 2),
        rivals=tuple(f"{method}/w{bits}" for bits in (4, 3, 2) for method in ("rtn", "gptq")),
        table='{match: "tok_embeddings.weight", mse: {bits: BITS}}, {match: "*norm.weight", keep: {}}, ',
        entquant=(2.0, 3.0, 4.0),
        seconds=(120, 10, 18),
    ),
    "mobilenet": Network(
        title="ImageNet MobileNetV1 0.75, 400 photos",
        checkpoint=MOBILENET,
        recipe="imagenet/mobilenet_v1_075_rd",
        fixed="benchmarks/recipes/mobilenet",
        metric="top1",
        rates=(2.0, 2.5, 3.0, 4.0),
        seeds=(0,),
        rivals=("gptq/w4", "gptq/w3", "gptq/w2"),
        seconds=(220, 30, 70),
    ),
}


def against(network: Network) -> str:
    """The command that measures outputs against the checkpoint's."""
    return f"python benchmarks/divergence.py $OUT {network.checkpoint} -r recipes/{network.recipe}.yaml"


def of_outputs(step: int, metric: str) -> dict[str, str]:
    return {"value": f"{step}.{metric}", "divergence": f"{step}.divergence", "agreement": f"{step}.agreement"}


def measured(network: Network, name: str, command: str, seconds: float) -> Row:
    figures = SIZE | of_outputs(1, network.metric)
    return Row(name=name, commands=(command, against(network)), figures=figures, seconds=seconds)


def rival(key: str, network: Network, name: str) -> Row:
    """A method of fixed width by the recipe's data, without quantized inputs."""
    method, _, bits = name.partition("/w")
    rule = f"{'kmeans' if method == 'huffman' else method}: {{bits: {bits}}}"
    rules = "rules=[" + network.table.replace("BITS", bits) + f'{{match: "*.weight", {rule}}}]'
    verb = "cluster" if method == "huffman" else "quantize"
    row = measured(
        network,
        f"rd/{key}/{name}",
        live(verb, network.checkpoint, network.fixed, (rules,)),
        network.seconds[2],
    )
    if method != "huffman":
        return row
    return Row(
        name=row.name,
        commands=(*row.commands, "python benchmarks/huffman.py $OUT"),
        figures=row.figures | {"bpw": "2.bits_per_weight", "bytes": "2.bytes"},
        seconds=row.seconds,
    )


def own(key: str, network: Network) -> Iterator[tuple[str, str, list[Row]]]:
    """Key and title of a line, and its rows, one a seed."""
    for rate in network.rates:
        rows = [
            measured(
                network,
                f"rd/{key}/{rate}/seed{seed}",
                live("quantize", network.checkpoint, network.recipe, (), f" --bpw {rate} --seed {seed}"),
                network.seconds[0],
            )
            for seed in network.seeds
        ]
        yield f"rd {rate}", f"rd, {rate}", rows
    for rate in network.rates:
        command = bare("quantize", network.checkpoint, f"--bpw {rate}")
        yield (
            f"free {rate}",
            f"rd without data, {rate}",
            [measured(network, f"rd/{key}/free/{rate}", command, network.seconds[1])],
        )
    if key != "resnet20":
        return
    for rate in network.rates:
        command = live("quantize", network.checkpoint, network.recipe, (), f" --bpw {rate} --effort high")
        yield f"trellis {rate}", f"rd, trellis, {rate}", [measured(network, f"rd/{key}/trellis/{rate}", command, 120)]
    for rate in SMALL_RATES:
        words = f" --bpw {rate} --keep-dtype f16"
        command = live("quantize", network.checkpoint, network.recipe, (), words)
        yield f"f16 {rate}", f"rd, rest as f16, {rate}", [measured(network, f"rd/{key}/f16/{rate}", command, 80)]
    for rate in SMALL_RATES:
        command = bare("quantize", network.checkpoint, f"--bpw {rate} --keep-dtype f16")
        title = f"rd without data, rest as f16, {rate}"
        yield f"free f16 {rate}", title, [measured(network, f"rd/{key}/free-f16/{rate}", command, network.seconds[1])]


def rivals(key: str, network: Network) -> Iterator[tuple[str, str, list[Row]]]:
    for name in network.rivals:
        method, _, bits = name.partition("/w")
        title = f"k-means, {bits} bits, Huffman" if method == "huffman" else f"{method}, {bits} bits a channel"
        yield f"{method} W{bits}", title, [rival(key, network, name)]
    for rate in network.entquant:
        row = Row(
            name=f"rd/{key}/entquant/{rate}",
            commands=(
                f"python benchmarks/entquant.py {network.checkpoint} --bpw {rate} -o $OUT",
                against(network),
            ),
            figures={"bpw": "0.bpw", "bytes": "0.bytes"} | of_outputs(1, network.metric),
            seconds=50,
        )
        yield f"entquant {rate}", f"EntQuant's scheme, {rate}", [row]
    for qp in NNCODEC_QPS if key == "resnet20" else ():
        row = Row(
            name=f"rd/{key}/nncodec/qp{-qp}",
            commands=(
                f"$NNCODEC benchmarks/nncodec_peer.py {network.checkpoint} {qp} $WORK/nncodec.nnc $OUT",
                against(network),
            ),
            figures={"bpw": "0.bpw", "bytes": "0.bytes"} | of_outputs(1, network.metric),
            seconds=20,
        )
        yield f"nncodec {qp}", f"NNCodec, qp {qp}", [row]


LINES = {
    key: {line: (title, rows) for line, title, rows in (*own(key, network), *rivals(key, network))}
    for key, network in NETWORKS.items()
}

ROWS = tuple(row for lines in LINES.values() for _, rows in lines.values() for row in rows)


def table(key: str) -> Table:
    def cells(rows: list[Row]) -> list[Cell]:
        names = tuple(row.name for row in rows)
        ways = (
            mean("value"),
            mean("divergence"),
            mean("agreement", ".3f"),
            plain_mean("bpw", ".3f"),
            plain_mean("bytes", ",.0f"),
            cpu,
        )
        return [Cell(names, way) for way in ways]

    columns = ("", NETWORKS[key].metric, "divergence", "agreement", "bits a weight:", "bytes:", "seconds:")
    lines = {line: [title, *cells(rows)] for line, (title, rows) in LINES[key].items()}
    return Table(name=f"rd {key}", columns=columns, lines=lines)


TABLES = tuple(table(key) for key in NETWORKS)

"""Rows by which defaults are chosen: on training images that no calibration sees, never on test images."""

from __future__ import annotations

from collections.abc import Iterator

from ledger import Row
from tables import Cell, Table, figure_of, mean

from .words import MOBILENET, RESNET20, RESNET32, STORIES, TOP1, live

NETWORKS = {"resnet20": RESNET20, "resnet32": RESNET32, "mobilenet": MOBILENET, "stories": STORIES}
TITLES = {"resnet20": "ResNet-20", "resnet32": "ResNet-32", "mobilenet": "MobileNetV1 0.75", "stories": "stories260K"}
PRIORS = ("correlated", "flips", "none")
PRIOR_RATES = {"resnet20": (1.5, 2.0, 3.0), "resnet32": (1.5, 2.0, 3.0), "mobilenet": (3.0, 4.0)}
FREE_PRICES = (0.0, 0.01, 0.03, 0.06, 0.12)
FREE_RATES = {"resnet20": (1.5, 2.0), "resnet32": (1.5, 2.0), "mobilenet": (4.0,), "stories": (3.0, 4.0)}
FEW_PRICES = (0.0, 0.01, 0.03)
"""Those that are tried on more networks than the first."""
PRICES = (0.01, 0.03, 0.06, 0.12)
TRELLIS_PRICES = (0.0, 0.06, 0.12, 0.25)
PRICE_RATES = (1.5, 2.0)
STARTS = ("error", "mean")
POWERS = ("one width", "relative", "over the norm", "absolute")
WEIGHTED = {"resnet20": (2, 3, 4), "resnet32": (2, 3, 4), "mobilenet": (2, 3, 4), "stories": (2, 3, 4)}


def held_out(network: str) -> str:
    recipe = f"benchmarks/recipes/heldout_{network}.yaml"
    return f"python benchmarks/divergence.py $OUT {NETWORKS[network]} -r {recipe}"


def row(name: str, network: str, command: str, seconds: float) -> Row:
    figures = {"bpw": "0.size.bits_per_weight", "divergence": "1.divergence"}
    return Row(name=f"choices/{name}", commands=(command, held_out(network)), figures=figures, seconds=seconds)


def free(network: str, rate: float, change: str, more: str = "") -> str:
    checkpoint = NETWORKS[network]
    words = (
        f"qcompress quantize {checkpoint} -r benchmarks/recipes/rd.yaml --set rules.0.rd.{change} --bpw {rate}{more}"
    )
    return f"{words} --threads 1 --force -o $OUT --json -"


def with_data(rate: float, change: str, more: str = "") -> str:
    samples = ("data.calibration.samples=1024", "data.eval.samples=250")
    changes = (f"rules.0.rd.{change}", "rules.0.rd.allocation=measured", *samples)
    return live("quantize", RESNET20, "cifar10/resnet20_rd", changes, f" --bpw {rate}{more}")


def trained(start: str) -> Row:
    """A short training by LSQ, whose steps start there, measured on the images that no training sees."""
    command = live("quantize", RESNET20, "benchmarks/recipes/heldout_lsq", (f"rules.0.lsq.start={start}",))
    return Row(name=f"choices/lsq-start/{start}", commands=(command,), figures=TOP1, seconds=40)


def rows() -> Iterator[Row]:
    for network, rates in PRIOR_RATES.items():
        for rate in rates:
            for prior in PRIORS:
                yield row(f"prior/{network}/{rate}/{prior}", network, free(network, rate, f"prior={prior}"), 12)
    for network, rates in FREE_RATES.items():
        for rate in rates:
            for price in FREE_PRICES if network == "resnet20" else FEW_PRICES:
                yield row(f"free-price/{network}/{rate}/{price}", network, free(network, rate, f"price={price}"), 12)
    for rate in PRICE_RATES:
        for price in TRELLIS_PRICES:
            command = free("resnet20", rate, f"price={price}", " --effort high")
            yield row(f"free-trellis-price/resnet20/{rate}/{price}", "resnet20", command, 14)
    for rate in PRICE_RATES:
        for price in PRICES:
            yield row(f"price/resnet20/{rate}/{price}", "resnet20", with_data(rate, f"price={price}"), 50)
    yield from map(trained, STARTS)
    for network, widths in WEIGHTED.items():
        bits = ",".join(map(str, widths))
        yield Row(
            name=f"choices/weighting/{network}",
            commands=(f"python benchmarks/weightings.py --networks {network} --bits {bits}",),
            figures={network: f"0.{network}"},
            seconds=90,
        )


ROWS = tuple(rows())
NAMES = {row.name for row in ROWS}


def divergences(name: str, options: tuple[object, ...], settings: dict[str, tuple[float, ...]]) -> Table:
    """One line a network and rate, one column an option."""
    lines: dict[str, list[str | Cell]] = {}
    for network, rates in settings.items():
        for rate in rates:
            rows = {option: f"choices/{name}/{network}/{rate}/{option}" for option in options}
            cells = [Cell((row,), mean("divergence")) if row in NAMES else "-" for row in rows.values()]
            lines[f"{TITLES[network]} {rate}"] = [TITLES[network], f"{rate}", *cells]
    columns = ("network", "bits a weight", *(f"{option}:" for option in options))
    return Table(name=f"choices {name}", columns=columns, lines=lines)


def weightings() -> Table:
    lines: dict[str, list[str | Cell]] = {}
    for network, widths in WEIGHTED.items():
        for bits in widths:

            def cell(figure: str, form: str = ".4f", network: str = network, bits: int = bits) -> Cell:
                way = f"{network}|W{bits}|{figure}"
                return Cell((f"choices/weighting/{network}",), lambda lines: format(figure_of(lines[0], way), form))

            lines[f"{TITLES[network]} W{bits}"] = [TITLES[network], cell("bits per weight"), *map(cell, POWERS)]
    return Table(
        name="choices weighting", columns=("network", "bits a weight:", *(f"{p}:" for p in POWERS)), lines=lines
    )


def starts() -> Table:
    cells = (Cell((f"choices/lsq-start/{start}",), mean("top1")) for start in STARTS)
    return Table(
        name="choices lsq-start",
        columns=("network", *(f"{start}:" for start in STARTS)),
        lines={"ResNet-20": ["ResNet-20 W2A2", *cells]},
    )


TABLES = (
    divergences("prior", PRIORS, PRIOR_RATES),
    divergences("free-price", FREE_PRICES, FREE_RATES),
    divergences("free-trellis-price", TRELLIS_PRICES, {"resnet20": PRICE_RATES}),
    divergences("price", PRICES, {"resnet20": PRICE_RATES}),
    weightings(),
    starts(),
)

"""Rows of speed, memory and size: each one run of a script, which measures peers in the same run."""

from __future__ import annotations

from ledger import Row
from tables import Cell, Table, figure_of

F32, BF16, RESNET50 = "$WORK/f32.safetensors", "$WORK/bf16.safetensors", "$WORK/resnet50.safetensors"
LARGE = "$WORK/large.safetensors"
MAKE = {
    F32: f"python benchmarks/make_checkpoint.py {F32} --dtype F32 --size 100MB",
    BF16: f"python benchmarks/make_checkpoint.py {BF16} --dtype BF16 --size 1.9GB",
    LARGE: f"python benchmarks/make_checkpoint.py {LARGE} --dtype BF16 --size 2GB",
    RESNET50: f"python benchmarks/make_checkpoint.py {RESNET50} --resnet50",
}
SMALL = "$WORK/bf16-60.safetensors"
DECODING = f"benchmarks/decoding.py {SMALL} --json -"
REAL = {
    "ResNet-20": "cifar10/resnet20",
    "ResNet-32": "cifar10/resnet32",
    "MobileNetV1 0.75": "imagenet/mobilenet_v1_075_224",
    "DS-CNN": "kws/dscnn",
    "stories260K": "stories/stories260K",
}
NEAR = 0.25
"""Times of a second run differ by so much on a busy machine; errors and sizes do not, but stand beside them."""


def row(name: str, command: str, seconds: float, checkpoint: str | None = None) -> Row:
    """One script's run, all of what it prints being figures."""
    commands = (*([MAKE[checkpoint]] if checkpoint else []), f"python benchmarks/{command} --json -")
    return Row(
        name=f"speed/{name}",
        commands=commands,
        figures={"all": str(len(commands) - 1)},
        seconds=seconds,
        tolerance=NEAR,
    )


ROWS = (
    row("start", "commands.py start --turns 9", 80),
    row("coding", "coding.py", 150),
    row("rd-coding", "rd_coding.py", 150),
    Row(
        name="speed/decoding",
        commands=(f"python benchmarks/make_checkpoint.py {SMALL} --dtype BF16 --size 60MB", f"$NUMBA {DECODING}"),
        figures={"all": "1"},
        seconds=70,
        tolerance=NEAR,
    ),
    row(
        "lossless-sizes",
        "lossless.py sizes " + " ".join(f"'{name}=$QCOMPRESS_DATA/{path}.safetensors'" for name, path in REAL.items()),
        60,
    ),
    Row(
        name="speed/lossless",
        commands=(
            f"python benchmarks/make_checkpoint.py {SMALL} --dtype BF16 --size 60MB",
            f"$NUMBA benchmarks/lossless.py speed {SMALL} --turns 3 --json -",
        ),
        figures={"all": "1"},
        seconds=60,
        tolerance=NEAR,
    ),
    row("reading", f"reading.py {F32}", 220, F32),
    row("budgets", f"commands.py budgets {F32}", 250, F32),
    row("large", f"commands.py large {LARGE} --turns 1", 400, LARGE),
    row("layers", "commands.py layers", 100),
    row("resnet50", f"commands.py resnet50 {RESNET50}", 15, RESNET50),
    row("gptq", "gptq.py", 150),
    row("language", "language.py --llmcompressor $LLMCOMPRESSOR", 120),
    row("training", "training.py", 110),
    row("qat", "qat.py", 30),
    row("regularizers", "regularizers.py", 500),
    row("dkm", "dkm.py", 250),
    row("kmeans", "kmeans.py", 300),
    row("throughput", f"throughput.py {F32} --peers $PEERS --runs 5", 300, F32),
    row(
        "throughput-bf16",
        f"throughput.py {BF16} --peers $PEERS --runs 3 "
        "--tools 'qcompress rtn 4' 'qcompress mse 4' 'torch rtn 4' 'quanto 4' 'compressed-tensors 4'",
        300,
        BF16,
    ),
    row("palettize", f"palettize.py {F32} --peer $COREMLTOOLS", 60, F32),
)


def figures(
    name: str, table: str, columns: dict[str, tuple[str, str]], lines: dict[str, str], first: str, way: str = "{}"
) -> Table:
    """One line a measurement of a script's run.

    columns  title -> key and format of a figure
    lines    title -> name of the measurement
    way      how the measurement stands in what the script prints
    """

    def cell(key: str, form: str, measurement: str) -> Cell:
        def text(found: list[object]) -> str:
            try:
                value = figure_of(found[0], "all|" + way.format(measurement) + f"|{key}")
            except TypeError:
                return "-"
            return format(value, form)

        return Cell((f"speed/{name}",), text)

    cells = {
        title: [title, *(cell(key, form, measurement) for key, form in columns.values())]
        for title, measurement in lines.items()
    }
    return Table(name=table, columns=(first, *(f"{column}:" for column in columns)), lines=cells)


OURS = {
    "qcompress `rtn`, 4 bits, `packed`": "qcompress rtn 4",
    "qcompress `rtn`, 4 bits, `auto` (entropy coded)": "qcompress rtn 4 auto",
    "qcompress `mse`, 4 bits": "qcompress mse 4",
    "qcompress `mse`, 2 bits": "qcompress mse 2",
    "qcompress `hqq`, 4 bits": "qcompress hqq 4",
    "qcompress `squant`, 4 bits, a grid a channel": "qcompress squant 4, channel",
}
PEERS = {
    "plain torch, round to nearest, 4 bits": "torch rtn 4",
    "optimum-quanto, 4 bits": "quanto 4",
    "compressed-tensors, symmetric, 4 bits": "compressed-tensors 4",
    "hqq, 4 bits": "hqq 4",
    "hqq, 2 bits": "hqq 2",
}
RATE = {"M weights / core-second": ("M weights/core-s", ".1f"), "memory, MB": ("memory MB", ".0f")}
CODING = {
    "bytes over the entropy, %": ("over_percent", ".3f"),
    "encode": ("encode_mcodes", ".0f"),
    "decode": ("decode_mcodes", ".0f"),
}
PACKING = {
    "pack": ("pack", ".1f"),
    "unpack": ("unpack", ".1f"),
    "count": ("count", ".1f"),
    "`numpy.packbits`": ("np_packbits", ".2f"),
}
READING = {
    "CPU s": ("cpu", ".3f"),
    "more than without checks, %": ("percent", ".1f"),
    "memory, MB": ("memory MB", ".0f"),
}
LATTICES = {
    "entropy": ("entropy", ".3f"),
    "bits a weight": ("bits", ".3f"),
    "encode": ("encode_m", ".1f"),
    "decode": ("decode_m", ".1f"),
    "length told, % off": ("model_percent", ".4f"),
}
SOURCES = {
    **{f"Gaussian, step {step}": f"gaussian, step {step}" for step in (3.0, 1.2, 0.6, 0.3)},
    "the same on a trellis, step 1.2": "trellis, step 1.2",
    "ResNet-20": "resnet20",
    "MobileNetV1 0.75": "mobilenet_v1_075_224",
}
COMMANDS = {"CPU s": ("cpu", ".2f"), "ratio": ("ratio", ".2f"), "peak memory, MB": ("peak MB", ".0f")}
GPTQ = {
    "`preset: paper`": "paper",
    "`range: mse, descent: 0`": "without descent",
    "default": "default",
}
REGULARIZERS = {
    "dsmm, one range a tensor": "dsmm",
    "dsmm, one range a channel": "dsmm channel",
    "sine": "sine",
    "sine on a grid": "sine grid",
    **{name: name for name in ("cosine", "min-squared", "exponential", "l2", "linf", "margin", "kurtosis")},
}

TABLES = (
    figures(
        "throughput", "throughput", RATE | {"bits": ("bits", ".3f"), "error": ("error", ".5f")}, OURS | PEERS, "tool"
    ),
    figures(
        "throughput-bf16",
        "throughput bf16",
        RATE,
        {
            title: name
            for title, name in (OURS | PEERS).items()
            if name in ("qcompress rtn 4", "qcompress mse 4", "torch rtn 4", "quanto 4", "compressed-tensors 4")
        },
        "tool",
    ),
    figures("resnet50", "resnet50", {"CPU s": ("cpu", ".1f")}, {"`squant`, 25.5 M weights": "squant, 4 bits"}, "what"),
    figures(
        "coding",
        "coding",
        CODING,
        {
            f"{bits} bit{'s' if bits > 1 else ''}, `{choice}`": f"{bits} bits, {choice}"
            for choice in ("ans", "zstd")
            for bits in (1, 2, 3, 4, 8)
        },
        "codes",
        "payloads|{}",
    ),
    figures(
        "coding",
        "packing",
        PACKING,
        {f"{bits} bit{'s' if bits > 1 else ''}": f"{bits} bits, rows of 4096" for bits in range(1, 9)},
        "GB/s of codes",
        "packing|{}",
    ),
    figures(
        "rd-coding",
        "rd coding",
        LATTICES,
        {f"{title}, `{choice}`": f"{name}, {choice}" for title, name in SOURCES.items() for choice in ("ans", "zstd")},
        "weights",
    ),
    figures(
        "reading",
        "reading",
        READING,
        {
            f"`{reader}`, {title}": f"{reader}, {coding}"
            for title, coding in (("`packed`", "packed"), ("`ans`", "ans"), ("`rd`, entropy coded", "rd"))
            for reader in ("load_state_dict", "export", "verify", "report")
        },
        "reader and codes",
    ),
    figures(
        "decoding",
        "decoding",
        {
            "without numba": ("without", ".0f"),
            "with": ("with", ".0f"),
            "times": ("times", ".1f"),
            "safetensors, cloned": ("safetensors", ".0f"),
        },
        {f"`{coding}`": coding for coding in ("packed", "zstd", "ans")} | {"`rd` at 2 bits, entropy coded": "rd"},
        "codes",
    ),
    figures(
        "lossless-sizes",
        "lossless sizes",
        {
            "bfloat16": ("BF16|lossless", ".1%"),
            "zstd -3 of bfloat16": ("BF16|zstd -3", ".1%"),
            "zstd -19 of bfloat16": ("BF16|zstd -19", ".1%"),
            "float16": ("F16|lossless", ".1%"),
            "float32": ("F32|lossless", ".1%"),
            "zstd -19 of float32": ("F32|zstd -19", ".1%"),
        },
        {name: name for name in REAL},
        "network",
    ),
    figures(
        "lossless",
        "lossless",
        {"bytes": ("share", ".1%"), "write": ("write", ".0f"), "read": ("read", ".0f")},
        {
            "safetensors, cloned": "safetensors",
            "zstd -3 of the file": "zstd -3 of the file",
            "`--lossless --coding zstd`": "zstd",
            "`--lossless`": "auto",
            "`--lossless`, with numba": "auto, numba",
        },
        "way",
    ),
    figures(
        "budgets",
        "speed budgets",
        COMMANDS | {"bits a weight": ("bits", ".2f"), "error": ("error", ".4f")},
        {
            "`--method rtn --bits 2`": "rtn, 2 bits",
            "`--method squant --bits 2`": "squant, 2 bits",
            "`--method squant --bpw 2`": "squant, 2 bits a weight",
            "`--bpw 2 --effort fast`": "rd, 2 bits a weight, fast",
            "`--bpw 2`": "rd, 2 bits a weight",
            "`--bpw 4`": "rd, 4 bits a weight",
        },
        "command",
    ),
    figures(
        "large",
        "speed large",
        {"CPU s": ("cpu", ".0f"), "peak memory, MB": ("peak MB", ".0f"), "bits a weight": ("bits", ".2f")},
        {"`--bpw 2`": "rd, 2 bits a weight"},
        "command",
    ),
    figures(
        "start",
        "start",
        {"CPU s": ("cpu", ".2f"), "ratio": ("ratio", ".2f")},
        {
            f"`{name}`": name
            for name in (
                "import typer, rich",
                "qcompress --help",
                "qcompress quantize --help",
                "qcompress recipe schema",
                "import torch",
            )
        },
        "command",
    ),
    figures(
        "layers",
        "layers",
        {"CPU s": ("cpu", ".2f"), "page, MB": ("page MB", ".2f")},
        {
            "`quantize --bits 3`": "quantize, 3 bits",
            "`quantize --bpw 3.3 --method squant`": "quantize, 3.3 bits a weight",
            "`report`": "report",
            "`report --format html`": "report as html",
        },
        "command",
    ),
    figures(
        "gptq",
        "gptq",
        {
            "M weights/core-s": ("M weights/core-s", ".2f"),
            "time": ("time", ".2f"),
            "output error": ("output error", ".2f"),
        },
        {
            f"{size}x{size}, {bits} bits, {title}": f"{size}x{size} W{bits} {name}"
            for size in (1024, 2048)
            for bits in (4, 2)
            for title, name in GPTQ.items()
        },
        "layer and setting",
    ),
    figures(
        "language",
        "language",
        {
            "M weights/core-s": ("M weights/core-s", ".2f"),
            "times llm-compressor": ("times the peer", ".2f"),
            "core-s": ("core-s", ".1f"),
            "whole command": ("whole command, core-s", ".1f"),
            "output error": ("output error", ".3f"),
        },
        {name: name for name in ("`gptq`, `preset: paper, range: mse`", "`gptq`, `preset: paper`", "`gptq`")}
        | {"llm-compressor 0.14.0.1, GPTQ": "llm-compressor"},
        "tool",
    ),
    figures(
        "training",
        "training speed",
        {
            "core-s a step": ("seconds", ".3f"),
            "of 20,000 images": ("epoch", ".0f"),
            "times faster": ("times", ".2f"),
        },
        {
            "`float32`": "float32",
            "`float32`, `channels_last`": "float32, channels_last",
            "`bfloat16`": "bfloat16",
            "`bfloat16`, `channels_last`": "bfloat16, channels_last",
        },
        "form",
    ),
    figures(
        "qat",
        "qat speed",
        {"core-s a step": ("seconds", ".3f"), "times plain": ("ratio", ".2f")},
        {name: name for name in ("plain", "lsq", "pact")},
        "form",
    ),
    figures(
        "regularizers",
        "regularizers",
        {
            "times faster than plain autograd": ("times faster", ".1f"),
            "floats a weight": ("floats", ".2f"),
            "% of a step": ("percent of a step", ".1f"),
        },
        REGULARIZERS,
        "regularizer",
    ),
    figures(
        "kmeans",
        "kmeans",
        {
            "times less time": ("time", ".1f"),
            "error": ("error", ".4f"),
            "core-s": ("core-s", ".2f"),
            "M weights": ("M weights", ".1f"),
        },
        {
            "bfloat16, 16 entries": "bf16 16",
            "float32, 16 entries": "fp32 16",
            "rows of 576, 16 entries each": "rows of 576, 16",
            "vectors of 4, 256 entries": "vectors of 4, 256",
        },
        "what",
    ),
    figures(
        "dkm",
        "dkm",
        {
            "times less time": ("times less time", ".1f"),
            "times less memory": ("times less memory", ".1f"),
            "error of the gradient": ("error", ".1e"),
        },
        {
            "4/1 chunked": "4/1 chunked",
            "4/1 table of bfloat16": "4/1 table bfloat16",
            "2/1 chunked": "2/1 chunked",
            "4/4 chunked": "4/4 chunked",
        },
        "bits/dim and form",
    ),
    figures(
        "palettize",
        "palettize",
        {
            "ours, core-s": ("ours seconds", ".2f"),
            "coremltools": ("peer seconds", ".2f"),
            "times less time": ("times less time", ".2f"),
            "times less memory": ("times less memory", ".1f"),
            "error": ("ours error", ".7f"),
            "its error": ("peer error", ".7f"),
        },
        {"23.1 M weights": "checkpoint", "a DKM step at 4/1": "step 4 1", "at 2/1": "step 2 1", "at 4/4": "step 4 4"},
        "what",
    ),
)

"""Every architecture of tests/model/architectures.py goes through: quantized, clustered, expanded, loaded again.

    python benchmarks/architectures.py

prints a row each and the processor seconds of all. The networks are tiny and of random weights: what counts is which
names and stacks come back, and whether they come back to the bit.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import torch  # noqa: E402
from model.architectures import ARCHITECTURES, make_architecture  # noqa: E402
from safetensors import safe_open  # noqa: E402

import qcompress  # noqa: E402
from qcompress.cli.app import run  # noqa: E402
from qcompress.data.user_code import import_package  # noqa: E402
from qcompress.model.build import take_shapes  # noqa: E402

COLUMNS = (
    "architecture",
    "tensors",
    "renamed",
    "merged",
    "b/weight",
    "from_pretrained",
    "load_into",
    "compressed folder",
    "tensors by role",
)


def call(*arguments: object) -> None:
    """A command of qcompress, without what it prints."""
    with redirect_stdout(io.StringIO()):
        code = run([str(argument) for argument in arguments])
    if code:
        raise SystemExit(f"{' '.join(map(str, arguments))}: exit {code}")


def measure(name: str, folder: Path) -> list[str]:
    """One row: `equal` where every tensor is that of the artifact to the bit, `refused` where nothing is loaded."""
    module: Any = make_architecture(name)
    module.save_pretrained(folder / "m")
    call("quantize", folder / "m", "--bits", 4, "-q", "-o", folder / "a")
    call("cluster", folder / "m", "--bits", 4, "-q", "-o", folder / "c")
    call("export", folder / "a", "--to", "safetensors", "-q", "-o", folder / "d")
    with safe_open(folder / "m" / "model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    names = take_shapes(module, shapes).names(shapes)
    other: Any = make_architecture(name, seed=1)
    qcompress.load_into(other, folder / "a")
    dense: Any = type(module).from_pretrained(folder / "d", dtype=torch.float32)
    own, loaded, decoded = other.state_dict(), dense.state_dict(), qcompress.load_state_dict(folder / "a")
    plain = {key: value for key, value in decoded.items() if key not in names.merged}
    exact = all(torch.equal(own[names.place(key)].float(), value.float()) for key, value in plain.items())
    same = own.keys() == loaded.keys() and all(torch.equal(own[key], value) for key, value in loaded.items())
    try:
        type(module).from_pretrained(folder / "a")
        refused = "LOADED"
    except OSError:
        refused = "refused"
    return [
        name,
        str(len(shapes)),
        str(len(names.places)),
        str(len(names.merged)),
        bits_per_weight(folder / "a.report.json"),
        "equal" if same else "DIFFERS",
        "equal" if exact else "DIFFERS",
        refused,
        roles(folder),
    ]


def roles(folder: Path) -> str:
    """How many tensors have each role, most first."""
    call("quantize", folder / "m", "--bits", 4, "--dry-run", "--json", folder / "plan.json")
    counts = Counter(one["role"] for one in json.loads((folder / "plan.json").read_text())["tensors"])
    return ", ".join(f"{count} {role}" for role, count in counts.most_common())


def bits_per_weight(report: Path) -> str:
    return f"{json.loads(report.read_text())['size']['bits_per_weight']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures; all where absent")
    asked = parser.parse_args().names or list(ARCHITECTURES)
    torch.set_num_threads(1)
    logging = import_package("transformers.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"| {' | '.join(COLUMNS)} |\n|---|{'---:|' * 4}{'---|' * 4}")
    start = time.process_time()
    for name in asked:
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {' | '.join(measure(name, Path(folder)))} |", flush=True)
    print(f"\n{time.process_time() - start:.0f} processor seconds for {len(asked)} architectures")


if __name__ == "__main__":
    main()

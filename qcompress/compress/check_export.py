"""An export is loaded with what it was made for, and its weights are held against those of the artifact."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.artifact.reader import Artifact
from qcompress.artifact.writer import CONFIG_NAME, QUANTIZATION
from qcompress.compress.evaluate import attach_grids
from qcompress.compress.load import read_state
from qcompress.data.batches import run_model
from qcompress.data.sources import open_batches
from qcompress.data.user_code import import_package, missing_package
from qcompress.errors import ModelError, raise_all
from qcompress.exporters.matrices import read_config
from qcompress.model.build import build_network, load_weights
from qcompress.types.export import ExportOptions
from qcompress.types.run import ModelRun

NEAR = 2.0**-20
"""A difference that float32 explains, relative to the largest weight of a tensor: norms to which one was added."""
ROUNDED = 2.0**-6
"""The same where scales may have been rounded."""


@dataclass(frozen=True)
class Loaded:
    """An export as its consumer holds it.

    state    the checkpoint's name of a tensor -> its values, dense
    network  what computes from it; None where the consumer is a reader of tensors
    """

    state: Mapping[str, Tensor]
    network: nn.Module | None = None


@dataclass(frozen=True)
class Checked:
    """What an export's consumer makes of it.

    consumer    with the versions of its packages
    tensors     how many were compared, and
    missing     those of the artifact that the consumer does not hold under their name
    difference  the largest difference of a weight, and
    worst       the tensor that has it; None where all are equal
    relative    the largest difference relative to the largest weight of its tensor
    outputs     the largest difference of the outputs of the first batch; None where no recipe was given
    near        what `relative` may be
    """

    consumer: str
    tensors: int
    missing: tuple[str, ...]
    difference: float
    worst: str | None
    relative: float
    outputs: float | None
    near: float

    @property
    def holds(self) -> bool:
        """Whether the consumer has the artifact's weights."""
        return self.tensors > 0 and self.relative <= self.near


def refuse_check(to: str) -> None:
    """Raise UsageError (UsageErrors where several) for each package that checking an export needs and that is missing;
    ModelError where nothing loads the format here."""
    if to not in CONSUMERS:
        raise ModelError(f"--to {to}", "nothing here loads the format, to check it", "leave --check out")
    raise_all([error for error in map(missing_package, CONSUMERS[to][0]) if error is not None])


def check_export(
    artifact: Artifact, output: Path, to: str, options: ExportOptions, model_run: ModelRun | None = None
) -> Checked:
    """Load an export with its consumer and compare.

    model_run  of a recipe whose network and data tell outputs too
    raises     ModelError where the consumer does not load the file; as `refuse_check`; DataError; ResourceError
    """
    refuse_check(to)
    packages, load = CONSUMERS[to]
    try:
        # Bars of the consumer's own progress are none of ours; what fails is told by the error.
        with redirect_stderr(StringIO()):
            loaded = load(artifact, output)
    except Exception as error:
        what = f"does not load the export: {type(error).__name__}: {error}"
        raise ModelError(str(output), f"{packages[0]} {version(packages[0])} {what}", "do not use this file") from error
    state = read_state(artifact)
    worst, difference, relative, compared = None, 0.0, 0.0, 0
    for name, value in state.items():
        if name not in loaded.state:
            continue
        compared += 1
        change = _difference(value, loaded.state[name])
        if change > difference:
            worst, difference = name, change
        # Of a tensor of zeros any difference is whole.
        most = float(value.abs().max()) if change else 1.0
        relative = max(relative, change / most if most else float("inf"))
    return Checked(
        ", ".join(f"{package} {version(package)}" for package in packages),
        compared,
        tuple(name for name in state if name not in loaded.state),
        difference,
        worst,
        relative,
        None if model_run is None or loaded.network is None else _outputs(artifact, state, loaded.network, model_run),
        ROUNDED if options.round_scales else NEAR,
    )


def _difference(value: Tensor, found: Tensor) -> float:
    """The largest difference of two tensors of one dtype; what the second has more than the first has to be zero."""
    found = found.detach().to(value.dtype)
    if found.ndim != value.ndim or any(one < other for one, other in zip(found.shape, value.shape, strict=True)):
        return float("inf")
    if found.shape != value.shape:
        filled = torch.zeros_like(found)
        filled[tuple(slice(0, size) for size in value.shape)] = value
        value = filled
    if not value.is_floating_point():
        return 0.0 if torch.equal(value, found) else float("inf")
    differs = (value != found) & ~(value.isnan() & found.isnan())
    return float((value.double() - found.double())[differs].abs().max()) if differs.any() else 0.0


def _outputs(artifact: Artifact, state: dict[str, Tensor], network: nn.Module, model_run: ModelRun) -> float:
    """The largest difference of what the recipe's network and the consumer's give of the first batch."""
    dense = build_network(model_run).float()
    load_weights(dense, state, str(artifact.path))
    attach_grids(dense, artifact)
    batch = next(iter(open_batches(model_run, "eval"))).to(torch.device("cpu"))
    with torch.no_grad():
        one, other = (run_model(module.eval(), batch) for module in (dense, network))
    return float((one.double() - other.double()).abs().max())


def _load_safetensors(artifact: Artifact, output: Path) -> Loaded:
    library = import_package("safetensors.torch")
    files = sorted(output.glob("*.safetensors")) if output.is_dir() else [output]
    return Loaded({name: value for file in files for name, value in library.load_file(file).items()})


def _transformers() -> Any:
    library = import_package("transformers")
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


def _kind(library: Any, config: Mapping[str, Any]) -> Any:
    """The class of a network, as its config.json names it; else that of language models."""
    names = config.get("architectures") or []
    return getattr(library, str(names[0]), library.AutoModelForCausalLM) if names else library.AutoModelForCausalLM


def _load_compressed_tensors(artifact: Artifact, output: Path) -> Loaded:
    library = _transformers()
    config = json.loads((output / CONFIG_NAME).read_text(encoding="utf-8"))
    groups = config[QUANTIZATION]["config_groups"].values()
    # Zero points it loads only dense, all of one grid.
    dense = any(not group["weights"]["symmetric"] for group in groups)
    how = {"quantization_config": library.CompressedTensorsConfig(dequantize=True)} if dense else {}
    network = _kind(library, config).from_pretrained(output, dtype=torch.float32, **how).eval()
    with torch.no_grad():
        # Codes are decoded when the network first computes.
        network(torch.zeros(1, 1, dtype=torch.int64))
    return Loaded(network.state_dict(), network)


def _load_gguf(artifact: Artifact, output: Path) -> Loaded:
    library = _transformers()
    kind = _kind(library, read_config(artifact, "gguf"))
    kind = library.LlamaForCausalLM if kind.__name__.startswith("Mistral") else kind
    network = kind.from_pretrained(output.parent, gguf_file=output.name, dtype=torch.float32).eval()
    return Loaded(network.state_dict(), network)


def _load_mlx(artifact: Artifact, output: Path) -> Loaded:
    mx, utils = import_package("mlx.core"), import_package("mlx_lm.utils")
    flatten = import_package("mlx.utils").tree_flatten
    mx.set_default_device(mx.cpu)
    network, _ = utils.load_model(output)
    state: dict[str, Tensor] = {}
    for path, module in network.named_modules():
        for name, value in flatten(module.parameters()) if not module.children() else []:
            if name == "weight" and "scales" in module:
                value = mx.dequantize(value, module.scales, module.biases, module.group_size, module.bits)
            state[f"{path}.{name}"] = torch.from_numpy(np.array(value.astype(mx.float32)))
    return Loaded(state)


CONSUMERS: Mapping[str, tuple[tuple[str, ...], Callable[[Artifact, Path], Loaded]]] = {
    "safetensors": (("safetensors",), _load_safetensors),
    "compressed-tensors": (("transformers", "compressed_tensors"), _load_compressed_tensors),
    "gguf": (("transformers", "gguf", "accelerate"), _load_gguf),
    "mlx": (("mlx", "mlx_lm"), _load_mlx),
}
"""Exporter -> the packages of its consumer, and how that loads the file."""

"""transformers loads compressed folders by this plug-in: `from_pretrained` gives a network that holds their codes.

Importing it registers quantizer and configuration under the name `qcompress`, which config.json of a compressed folder
has. transformers finds neither without that import: then it finds no weights in the folder, and says so.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qcompress.artifact.layout import INDEX_NAME
from qcompress.artifact.reader import Artifact, read_artifact
from qcompress.model.build import take_shapes
from qcompress.runtime.load_packed import KERNELS, Kernel, make_packing, stored_shapes
from qcompress.runtime.packed_modules import put_packed
from qcompress.runtime.packed_weight import PackedWeight
from qcompress.types.config import Shape

METHOD = "qcompress"
FILE_NAME = INDEX_NAME.removesuffix(".index.json")
STORED = (r"\.qc\.", r"^qcompress\.")
"""What transformers is not to expect in the files: codes and grids, the manifest, side information."""


@register_quantization_config(METHOD)
class QcompressConfig(QuantizationConfigMixin):
    """What config.json of a compressed folder says of its weights.

    weights   the name of the folder's only file, or of the index of several
    kernel    how linear layers compute, see qcompress.load_into; to be set in config.json, or in an AutoConfig
    original  what config.json of the checkpoint had in its place
    """

    def __init__(self, weights: str = FILE_NAME, kernel: Kernel = "decode", original: Any = None, **_: Any) -> None:
        if kernel not in KERNELS:
            raise ValueError(f"kernel is {' or '.join(KERNELS)}, not {kernel!r}")
        self.quant_method: Any = METHOD
        self.weights = weights
        self.kernel = kernel
        self.original = original

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        told = {"kernel": None if self.kernel == "decode" else self.kernel, "original": self.original}
        return {"quant_method": METHOD, "weights": self.weights} | {
            name: value for name, value in told.items() if value is not None
        }


class Awaited(PackedWeight):
    """A weight whose codes come after transformers has loaded all else; until then nobody needs its values."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(shape, "F32")
        self.to(dtype)

    def decode(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@register_quantizer(METHOD)
class QcompressQuantizer(HfQuantizer):
    """Lets transformers load what was kept, and puts codes where compressed weights were."""

    requires_calibration = True

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the files of the folder: transformers asks a quantizer for nothing else before it looks for weights."""
        named: Any = self.quantization_config
        config.transformers_weights = named.weights
        return config

    def _process_model_before_weight_loading(self, model: Any, **given: Any) -> Any:
        # It is for this loading alone: a folder that is saved names no files.
        del model.config.transformers_weights
        self.artifact = _artifact_of(given["checkpoint_files"])
        taken = take_shapes(model, stored_shapes(self.artifact))
        _tie(model, set(taken.places.values()))
        self._packing = make_packing(model, self.artifact, taken)
        sites = [site for sites in self._packing.sites.values() for site in sites]
        for site in sites:
            shape = tuple(getattr(site.owner, site.name).shape)
            put_packed(site.owner, site.name, Awaited(shape, site.dtype))
        if len(sites) > len(self._packing.sites):
            for part in model.modules():
                if hasattr(part, "all_tied_weights_keys"):
                    part._tied_weights_keys = part.all_tied_weights_keys = _still_tied(part)
        kept = [info.name for file in self.artifact.files for info in file.kept]
        self.kept = {name: taken.places[name] for name in kept if name in taken.places}
        coded = {name for file in self.artifact.files for name in file.manifest.coded}
        now = {place for name, place in self.kept.items() if name not in coded}
        later = set(model.state_dict()) - now - set(taken.missing)
        # transformers would call a checkpoint corrupted that has none of two names of one weight.
        self._tied_later = {name: twin for name, twin in model.all_tied_weights_keys.items() if twin in later}
        model.all_tied_weights_keys = {
            name: twin for name, twin in model.all_tied_weights_keys.items() if name not in self._tied_later
        }
        later |= set(self._tied_later)
        model._keys_to_ignore_on_load_unexpected |= set(STORED)
        model._keys_to_ignore_on_load_missing |= {f"^{re.escape(name)}$" for name in later}
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        config: Any = self.quantization_config
        self._packing.hold_codes(config.kernel)
        coded = {name: file.kept_tensor(name) for file in self.artifact.files for name in file.manifest.coded}
        model.load_state_dict(self._packing.values(coded), strict=False)
        _share(model, self._tied_later)
        model.all_tied_weights_keys |= self._tied_later
        model.save_pretrained = MethodType(_save, model)
        return model

    def is_serializable(self) -> bool:
        """Folders are written anew from the artifact's own files."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Decoding compiles with what it is part of."""
        return True


def _tie(model: Any, given: set[str]) -> None:
    """Let names of one weight share it now, which transformers does after loading; not two that are both given."""
    _share(model, {name: twin for name, twin in model.all_tied_weights_keys.items() if not {name, twin} <= given})


def _share(model: Any, tied: Mapping[str, str]) -> None:
    """Let each name be the parameter of the other one."""
    for name, twin in tied.items():
        path, _, own = name.rpartition(".")
        setattr(model.get_submodule(path), own, model.get_parameter(twin))


def _still_tied(model: Any) -> dict[str, str]:
    """The pairs of names that transformers ties after loading: not those of a weight whose codes they share."""
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: twin for name, twin in model.all_tied_weights_keys.items() if {name, twin} <= there}


def _artifact_of(files: Sequence[str]) -> Artifact:
    folder = Path(files[0]).parent
    return read_artifact(folder if (folder / INDEX_NAME).is_file() else Path(files[0]))


def _save(model: Any, save_directory: str | os.PathLike[str], **_: Any) -> None:
    """Write the folder that the network was loaded from: its artifact, its config, how it generates.

    raises  ValueError where weights that were kept have changed since, which no codes could tell of
    """
    artifact: Artifact = model.hf_quantizer.artifact
    own = model.state_dict()
    for name, place in model.hf_quantizer.kept.items():
        if not torch.equal(artifact.file_of(name).kept_tensor(name).to(own[place]), own[place]):
            raise ValueError(f"{place} has changed since it was loaded; an artifact is written by qcompress quantize")
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    files = [file.path for file in artifact.files]
    if (index := files[0].parent / INDEX_NAME).is_file():
        files.append(index)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)

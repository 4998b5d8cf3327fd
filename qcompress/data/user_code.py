"""The one door to code: what a recipe names runs only with the user's consent, and packages of extras come in here."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompress.data.foreign import first_line
from qcompress.errors import InputError, ModelError, UsageError
from qcompress.types.data_settings import FactoryData
from qcompress.types.plan import Recipe
from qcompress.types.settings import FactoryTask

EXTRAS = {
    "torchvision": "vision",
    "timm": "vision",
    "PIL": "vision",
    "transformers": "text",
    "tokenizers": "text",
    "datasets": "text",
    "sacrebleu": "text",
    "compressed_tensors": "compressed-tensors",
    "gguf": "gguf",
    "accelerate": "gguf",
    "mlx": "mlx",
    "mlx_lm": "mlx",
}
"""The extra that brings a package."""

USERS_OF_TORCHVISION = ("torchvision", "timm", "transformers", "compressed_tensors")
MISSING_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_libraries: list[Any] = []


def import_package(name: str) -> Any:
    """A package or a module of one.

    raises  UsageError for a missing extra; ImportError for any other module that is not there
    """
    try:
        if name.partition(".")[0] in USERS_OF_TORCHVISION:
            _import_torchvision()
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = missing_package(error.name) if error.name in EXTRAS else None
        if missing is None:
            raise
        raise missing from None


def missing_package(name: str) -> UsageError | None:
    """What importing a package of an extra would raise where it is not installed; nothing is imported."""
    if importlib.util.find_spec(name) is not None:
        return None
    return UsageError(name, f"the package {name} is not installed", f"pip install 'qcompress[{EXTRAS[name]}]'")


def _import_torchvision() -> None:
    """Import torchvision where it is installed.

    Its wheels for CUDA do not import beside a torch for the CPU, where two of its operators are missing, and neither
    does what is built on it: they are declared then, and the import is tried once more.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _libraries:
            raise
        import torch

        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for schema in MISSING_OPERATORS:
            library.define(schema)
        _libraries.append(library)
        for broken in [loaded for loaded in sys.modules if loaded.partition(".")[0] == "torchvision"]:
            del sys.modules[broken]
        importlib.import_module("torchvision")


@dataclass(frozen=True, slots=True)
class NamedCode:
    """A callable that a recipe names: the key that names it, where that stands, and its name."""

    key: str
    where: str
    name: str


def named_code(recipe: Recipe) -> list[NamedCode]:
    """Every callable that a recipe names, whether it is a listed network or any other code."""
    found: dict[str, str] = {}
    if recipe.model is not None:
        found["model.factory"] = recipe.model.factory
    data, train = recipe.data, None if recipe.data is None or recipe.data.train is None else recipe.data.train.source
    parts = {} if data is None else {"calibration": data.calibration, "eval": data.eval, "train": train}
    found |= {f"data.{part}.factory": one.factory for part, one in parts.items() if isinstance(one, FactoryData)}
    if isinstance(recipe.task, FactoryTask):
        found["task.factory"] = recipe.task.factory
    if recipe.finetune is not None and recipe.finetune.loss is not None:
        found["finetune.loss"] = recipe.finetune.loss
    return [NamedCode(key, _place(recipe, key), name) for key, name in found.items()]


def _place(recipe: Recipe, key: str) -> str:
    section, _, last = key.rpartition(".")
    return f"{recipe.place(section)}.{last}"


def consent_error(found: Sequence[NamedCode], instead: str | None = None) -> UsageError:
    """One line that names every key whose code needs consent; `instead` is a name that needs none."""
    first, *others = found
    also = "".join(f", and so is {one.name!r} of {one.key}" for one in others)
    hint = f"did you mean {instead}? Else look at it" if instead else "look at it"
    return UsageError(
        first.where, f"{first.name!r} is code that would run{also}", f"{hint}, and pass --allow-code if you trust it"
    )


def find_callable(
    name: str, root: Path, allow_code: bool, place: str, kind: type[InputError] = ModelError
) -> Callable[..., Any]:
    """The callable "package.module:name" or "path/to/file.py:name", paths from `root`.

    raises  UsageError without `allow_code` and for a missing extra; `kind` for what does not import or is no callable
    """
    module_name, colon, attribute = name.rpartition(":")
    if not colon or not module_name or not attribute:
        raise kind(place, f"{name!r} is not MODULE:NAME", "write it like torchvision.models:resnet18 or net.py:make")
    if not allow_code:
        raise consent_error([NamedCode("", place, name)])
    if module_name.endswith(".py"):
        module = _load_file(root / module_name, place, kind)
    else:
        try:
            module = import_package(module_name)
        except UsageError:
            raise
        except Exception as error:
            # Importing runs whatever code the package has.
            what = f"{module_name!r} does not import: {first_line(error)}"
            hint = "check that it is installed; code of the current folder is named by its file, as net.py:make"
            raise kind(place, what, hint) from None
    found = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise kind(place, f"{module_name!r} has no callable {attribute!r}", "check the name after the colon")
    return found  # type: ignore[no-any-return]


def _load_file(path: Path, place: str, kind: type[InputError]) -> Any:
    if not path.is_file():
        raise kind(place, f"no file {str(path)!r}", "paths start from the recipe's folder")
    name = f"qcompress_code_{abs(hash(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling workers look their module up by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UsageError:
        raise
    except Exception as error:
        del sys.modules[name]
        raise kind(place, f"{str(path)!r} does not import: {first_line(error)}", "mend the file") from None
    return module

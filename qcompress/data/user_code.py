"""Callables that a recipe names are found here: in a package, or in a Python file, which needs the user's leave."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qcompress.data.foreign import first_line
from qcompress.errors import InputError, ModelError, UsageError

EXTRAS = {
    "torchvision": "vision",
    "timm": "vision",
    "PIL": "vision",
    "transformers": "text",
    "tokenizers": "text",
    "datasets": "text",
    "sacrebleu": "text",
}
"""The extra that brings a package."""

USERS_OF_TORCHVISION = ("torchvision", "timm", "transformers")
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
        top = (error.name or name).partition(".")[0]
        if top not in EXTRAS:
            raise
        raise UsageError(
            name, f"the package {top} is not installed", f"pip install 'qcompress[{EXTRAS[top]}]'"
        ) from None


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
        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for schema in MISSING_OPERATORS:
            library.define(schema)
        _libraries.append(library)
        for broken in [loaded for loaded in sys.modules if loaded.partition(".")[0] == "torchvision"]:
            del sys.modules[broken]
        importlib.import_module("torchvision")


def find_callable(
    name: str, root: Path, allow_code: bool, place: str, kind: type[InputError] = ModelError
) -> Callable[..., Any]:
    """The callable "package.module:name" or "path/to/file.py:name", paths from `root`.

    raises  UsageError for a file without `allow_code` and for a missing extra; `kind` for what does not import or is no
            callable
    """
    module_name, colon, attribute = name.rpartition(":")
    if not colon or not module_name or not attribute:
        raise kind(place, f"{name!r} is not MODULE:NAME", "write it like torchvision.models:resnet18 or net.py:make")
    if module_name.endswith(".py"):
        if not allow_code:
            what = f"{name!r} is code that would run"
            raise UsageError(place, what, "look at it, and pass --allow-code if you trust it")
        module = _load_file(root / module_name, place, kind)
    else:
        try:
            module = import_package(module_name)
        except UsageError:
            raise
        except Exception as error:
            # Importing runs whatever code the package has.
            what = f"{module_name!r} does not import: {first_line(error)}"
            raise kind(place, what, "check its name and that it is installed") from None
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

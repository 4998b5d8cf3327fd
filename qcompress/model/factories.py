"""The networks that a recipe may name without consent: what is in this list is data, all else is code.

A network of torchvision or timm by a name that the package lists, a class of transformers that is built from its
Config, and the demo's network. They are built without weights, and neither ask a server nor run code that they fetch.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qcompress.data.foreign import first_line
from qcompress.data.user_code import NamedCode, consent_error, import_package, named_code
from qcompress.errors import ModelError, QcompressError, UsageError
from qcompress.types.plan import Recipe
from qcompress.types.settings import ModelSettings

if TYPE_CHECKING:
    from torch import nn

DEMO = "qcompress.demo:DigitsNet"
PLACES = frozenset(("path", "paths", "dir", "directory", "folder", "file", "files", "filename", "repo", "repository"))
"""Words in the name of an argument that text makes a place of."""
LOADERS = frozenset(
    (
        *("weights", "pretrained", "checkpoint", "checkpoints", "ckpt", "url", "uri", "cache", "hub", "download"),
        *("remote", "auto_map"),
    )
)
"""Words in the name of an argument that no value but false may be given."""
SWITCHES = ("use_cache", "init_weights")
"""Arguments of such names that are mere switches."""
PLACE_IN_TEXT = re.compile(r"[/\\:]")
LABELS = ("id2label", "label2id")

OFFLINE: tuple[tuple[str, str, object], ...] = (
    ("huggingface_hub.constants", "HF_HUB_OFFLINE", True),
    ("transformers.dynamic_module_utils", "TIME_OUT_REMOTE_CODE", 0),
)
"""What keeps libraries from asking a server, and the user on the terminal whether code may run: module, name, value."""

Build = Callable[[], "nn.Module"]


def listed_network(settings: ModelSettings) -> Build | None:
    """What builds the network that a recipe names, if it is a listed one; else None, and nothing of it was imported.

    raises  UsageError for a missing extra, ModelError for a package that does not import
    """
    module, _, name = settings.factory.rpartition(":")
    if settings.factory == DEMO:
        return lambda: import_package("qcompress.demo").DigitsNet(**settings.args)
    if module.endswith(".py") or not name.isidentifier():
        return None
    if re.fullmatch(r"torchvision\.models(\.[a-z0-9_]+)*", module):
        return _torchvision(module, name, settings.args)
    if re.fullmatch(r"timm(\.models(\.[a-z0-9_]+)?)?", module):
        return _timm(module, name, settings.args)
    if re.fullmatch(r"transformers(\.models(\.[a-z0-9_]+)*)?", module):
        return _transformers(module, name, settings.args)
    return None


def _package(name: str) -> Any:
    try:
        return import_package(name)
    except QcompressError:
        raise
    except Exception as error:
        what = f"{name.partition('.')[0]} does not import: {first_line(error)}"
        raise ModelError("model.factory", what, "install it again, in a version that goes with this torch") from None


def _member(module: str, name: str) -> Any:
    """What a module of a listing package has by this name, or None."""
    try:
        return getattr(import_package(module), name, None)
    except QcompressError:
        raise
    except Exception:
        # A module of the package may lack what it is built on.
        return None


def _torchvision(module: str, name: str, args: Mapping[str, Any]) -> Build | None:
    models = _package("torchvision.models")
    found = _member(module, name)
    builder = next((one for one in map(models.get_model_builder, models.list_models()) if one is found), None)
    if builder is None:
        return None
    # Without these, a detector or a segmenter fetches the weights of its backbone.
    loading = {key: None for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters}
    return lambda: builder(**{**args, **loading})


def _timm(module: str, name: str, args: Mapping[str, Any]) -> Build | None:
    models = _package("timm.models")
    if name == "create_model":
        chosen = args.get("model_name")
        if not isinstance(chosen, str) or PLACE_IN_TEXT.search(chosen) or not models.is_model(chosen):
            return None
        return lambda: models.create_model(**{**args, "pretrained": False})
    found = _member(module, name)
    if not models.is_model(name) or models.model_entrypoint(name) is not found:
        return None
    return lambda: found(**{**args, "pretrained": False})


def _transformers(module: str, name: str, args: Mapping[str, Any]) -> Build | None:
    package = _package("transformers")
    found, base = _member(module, name), package.PreTrainedModel
    if not isinstance(found, type) or not issubclass(found, base) or getattr(found, "config_class", None) is None:
        return None
    kind: Any = found

    def build() -> nn.Module:
        # Version 5 has renamed it.
        configs = getattr(package, "PreTrainedConfig", None) or package.PretrainedConfig
        network: nn.Module = kind(_without_pretrained(kind.config_class(**args), configs))
        return network

    return build


def _without_pretrained(config: Any, configs: type) -> Any:
    """The Config, which asks for no weights of a backbone, nor does any of the `configs` in it."""
    for value in list(vars(config).values()):
        if isinstance(value, configs):
            _without_pretrained(value, configs)
    if getattr(config, "use_pretrained_backbone", False):
        config.use_pretrained_backbone = False
    return config


def refuse_arguments(settings: ModelSettings, place: str) -> None:
    """Raise UsageError for the first argument that may name weights, a file, a server or code."""
    error = argument_error(settings, place)
    if error is not None:
        raise error


def argument_error(settings: ModelSettings, place: str) -> UsageError | None:
    """What is said of the first argument that needs consent, or None."""
    for keys, value in _walk((), settings.args):
        names = [key for key in keys if isinstance(key, str)]
        if names and not set(names) & set(LABELS) and _is_place(names[-1], value):
            what = "may name weights, a file, a server or code, which only a recipe that you trust may do"
            return UsageError(f"{place}.args.{'.'.join(map(str, keys))}", what, "remove it, or pass --allow-code")
    return None


def _walk(keys: tuple[str | int, ...], value: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every value in an argument, with the keys and indices that lead there."""
    yield keys, value
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _walk((*keys, key), child)
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            yield from _walk((*keys, index), child)


def _is_place(name: str, value: Any) -> bool:
    # Names that begin so are internal to a Config, and set what its own arguments do not.
    if name.startswith("_"):
        return True
    if isinstance(value, str) and PLACE_IN_TEXT.search(value):
        return True
    words = {name.lower(), *name.lower().split("_")}
    if words & LOADERS:
        return name not in SWITCHES and value not in (None, False, "")
    # Rates and sizes may have such names too, as drop_path_rate.
    return bool(words & PLACES) and isinstance(value, str | Mapping | list | tuple) and bool(value)


@contextmanager
def without_network() -> Iterator[None]:
    """Within it the libraries of Hugging Face ask no server, and not the user whether code may run."""
    changed: list[tuple[Any, str, Any]] = []
    for module, name, value in OFFLINE:
        try:
            found = import_package(module)
        except (ImportError, UsageError):
            continue
        changed.append((found, name, getattr(found, name, None)))
        setattr(found, name, value)
    try:
        yield
    finally:
        for found, name, before in changed:
            setattr(found, name, before)


def code_of(recipe: Recipe) -> list[NamedCode]:
    """All code that a recipe names and that runs only with consent; imports what tells listed networks from code.

    raises  UsageError for a missing extra
    """
    return [one for one in named_code(recipe) if one.key != "model.factory" or not _is_listed(recipe)]


def _is_listed(recipe: Recipe) -> bool:
    return recipe.model is not None and listed_network(recipe.model) is not None


def refuse_code(recipe: Recipe) -> None:
    """Raise UsageError, one line that names each key, where a recipe names code, or arguments that lead to some."""
    found = code_of(recipe)
    if found:
        raise consent_error(found, _nearest(recipe) if found[0].key == "model.factory" else None)
    if recipe.model is not None:
        refuse_arguments(recipe.model, recipe.place("model"))


def _nearest(recipe: Recipe) -> str | None:
    """The listed network whose name is most like the one that a recipe gives, where it seems to mean one."""
    assert recipe.model is not None
    module, _, name = recipe.model.factory.rpartition(":")
    if module.startswith("torchvision.models"):
        close = difflib.get_close_matches(name, import_package("torchvision.models").list_models(), n=1)
        return f"torchvision.models:{close[0]}" if close and close[0] != name else None
    if module in ("timm", "timm.models") and name == "create_model":
        close = difflib.get_close_matches(
            str(recipe.model.args.get("model_name")), import_package("timm").list_models(), n=1
        )
        return f"model_name: {close[0]}" if close else None
    return None

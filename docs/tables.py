"""Writes what docs/ take from the program: python docs/tables.py

The tables of docs/recipes.md and docs/training.md come from the config dataclasses, those of docs/cli.md from the
commands; docs/glossary.md and the schema of reports from the rows of their figures.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.main import get_command

from qcompress.cli.app import app
from qcompress.cli.panels import PanelCommand, panels_of
from qcompress.plan.roles import ROLES
from qcompress.recipe.explain import expected, limits
from qcompress.recipe.schema import recipe_schema
from qcompress.recipe.show import flow
from qcompress.registry import METHODS, ClusterConfig, GridConfig
from qcompress.registry.regularizers import REGULARIZERS, RegularizerConfig
from qcompress.report.document_json import REPORT
from qcompress.report.glossary import glossary_markdown, schema_text
from qcompress.types.config import PenaltyConfig
from qcompress.types.data_settings import AUGMENTATIONS
from qcompress.types.plan import ROLE_NAMES

PAGES = (Path(__file__).with_name("recipes.md"), Path(__file__).with_name("training.md"))
COMMANDS_PAGE = Path(__file__).with_name("cli.md")
ROLES_PAGE = Path(__file__).with_name("roles.md")
PINS = Path(__file__).parents[1] / "tests" / "plan" / "architectures.py"
GLOSSARY = Path(__file__).with_name("glossary.md")
REPORT_SCHEMA = Path(__file__).parents[1] / "qcompress" / "report" / "schema.json"
SHARED: dict[str, type] = {
    "grids": GridConfig,
    "clusters": ClusterConfig,
    "regularizers": RegularizerConfig,
}
"""What several have in common, which has a table of its own."""
REQUIRED = dataclasses.MISSING
OWN = ("strength", "start", "ramp")
"""Shared options whose defaults differ between regularizers."""


def pages() -> dict[Path, str]:
    """The pages with options, every table as it should be."""
    marked = r"<!-- options of (\S+) -->\n.*?(?=\n\n|\Z)"
    return {page: re.sub(marked, _section, page.read_text(encoding="utf-8"), flags=re.DOTALL) for page in PAGES}


def _section(found: re.Match[str]) -> str:
    rows = [*_rows(found[1], recipe_schema()["$defs"])]
    return "\n".join([f"<!-- options of {found[1]} -->", "| option | values | default | |", "|---|---|---|---|", *rows])


def _rows(name: str, schema: dict[str, Any]) -> Iterator[str]:
    """The rows of a method or regularizer, of what several have in common, of augmentations, or of a section."""
    kinds: dict[str, type] = {one: kind.config for one, kind in {**METHODS, **REGULARIZERS}.items()}
    if name == "augment":
        yield from _augmentations(schema)
    elif name in SHARED:
        members = [config for config in kinds.values() if issubclass(config, SHARED[name])]
        for option in dataclasses.fields(SHARED[name]):
            # A member tells the defaults that its class fills in, where it takes no other values than the rest.
            config = next(one for one in members if option.name not in vars(one).get("__annotations__", {}))
            default = "" if option.name in OWN else _defaults(config, option.name)
            yield _row(option.name, schema[config.__name__]["properties"][option.name], default)
    elif name in kinds:
        config = kinds[name]
        shared = {one.name for base in SHARED.values() if issubclass(config, base) for one in dataclasses.fields(base)}
        for key, option in schema[config.__name__]["properties"].items():
            if key in OWN or key not in shared:
                yield _row(key, option, _defaults(config, key))
    else:
        for key, option in schema[name]["properties"].items():
            if name != "WrittenFinetune" or key not in ("optimizer", "schedule", "distil", "regularize"):
                yield _row(key, option, _default(option.get("default")))


def _defaults(config: type, name: str) -> str:
    """What a config has where the option is left out, without a preset and with one."""
    options = {one.name: one for one in dataclasses.fields(config)}
    # Grids cannot be made without bits, nor sine and cosine without levels.
    needed = {key: 4 for key in ("bits", "levels") if key in options and options[key].default in (None, REQUIRED)}
    if issubclass(config, PenaltyConfig):
        needed.pop("bits", None)
    if options[name].default is REQUIRED:
        return "required"
    if name in needed or name == "preset":
        return ""
    usual = _default(getattr(config(**needed), name))
    presets = get_args(get_args(get_type_hints(config)["preset"])[0]) if "preset" in options else ()
    paper = [_default(getattr(config(**needed, preset=preset), name)) for preset in presets]
    return usual if paper in ([], [usual]) else f"{usual or 'none'}; paper {paper[0] or 'none'}"


def _augmentations(schema: dict[str, Any]) -> Iterator[str]:
    for name, kind in AUGMENTATIONS.items():
        one = schema[kind.__name__]
        yield f"| `{name}` | | | {one['description']} |"
        for key, option in one["properties"].items():
            yield _row(key, option, _default(option.get("default"))).replace("| `", f"| `{name}.", 1)


def _row(name: str, option: dict[str, Any], default: str) -> str:
    """A row of the table; what the description ends in of an option that is left out stands under its default."""
    text, _, absent = option.get("description", "").replace("|", "\\|").partition("; where absent ")
    default = re.sub(r"^[^;]*", lambda _: absent, default, count=1) if absent else default
    return f"| `{name}` | {', '.join(_choices(option))} | {default} | {text} |"


def _default(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return f"`{str(value).lower()}`"
        case str():
            return f"`{value}`"
        case list() | tuple():
            return f"[{', '.join(f'{one:.4g}' if isinstance(one, float) else str(one) for one in value)}]"
        case _:
            return f"{value:g}"


def _choices(option: dict[str, Any]) -> list[str]:
    """The values that an option takes, in words."""
    if "anyOf" in option:
        return [choice for branch in option["anyOf"] if branch.get("type") != "null" for choice in _choices(branch)]
    if "$ref" in option:
        return ["a mapping"]
    if "enum" in option:
        return [f"`{value}`" for value in option["enum"]]
    if "const" in option:
        return [f"`{option['const']}`"]
    match option["type"]:
        case "boolean":
            return ["`true`", "`false`"]
        case "array":
            return ["[low, high]" if "prefixItems" in option else expected(option)]
        case "object":
            return ["a mapping" + "".join(f", as `{flow(one)}`" for one in option.get("examples", ()))]
        case "string":
            return ["a size as `2MB`" if "pattern" in option else "text"]
        case kind:
            words = limits(option) or ("a number" if kind == "number" else "an integer")
            words = re.sub(r"^between (\S+) and ", r"\1 to ", words)
            return [re.sub(r"^at least (\S+)", r"\1 or more", words)]


def commands_page() -> str:
    """The page of commands with every table as it should be."""
    text = COMMANDS_PAGE.read_text(encoding="utf-8")
    return re.sub(
        r"<!-- options of (qcompress[a-z -]*) -->\n.*?<!-- end of options -->", _command, text, flags=re.DOTALL
    )


def _command(found: re.Match[str]) -> str:
    command: Any = get_command(app)
    for word in found[1].split()[1:]:
        command = command.commands[word]
    context: Any = type(command).context_class(command)
    panels = panels_of(command, context) if isinstance(command, PanelCommand) else {"": command.get_params(context)}
    lines = [found[0].partition("\n")[0]]
    for name, parameters in panels.items():
        rows = [row for one in parameters if (row := _option(one, context)) is not None]
        if rows:
            lines += [f"**{name}**", ""] * bool(name) + ["| option | |", "|---|---|", *rows, ""]
    return "\n".join([*lines, "<!-- end of options -->"])


def _option(option: Any, context: Any) -> str | None:
    """A row of the table: names and value, then what --help says."""
    if option.param_type_name != "option" or "--help" in option.opts:
        return None
    names = sorted((*option.opts, *option.secondary_opts), key=lambda name: not name.startswith("--"))
    # As help shows it: "-b, --bits N", "--device <auto|cpu|cuda>".
    value = option.get_help_record(context)[0].rpartition("--")[2].partition(" ")[2].strip("<>")
    text = option.help.replace("|", "\\|")
    if "|" in value and not value.endswith("|-"):
        text += f" Values: {', '.join(f'`{word}`' for word in value.split('|'))}."
        value = ""
    if option.envvar:
        text += f" Environment: `{option.envvar}`."
    first = f"{names[0]} {value}".rstrip().replace("|", "\\|")
    return f"| {', '.join(f'`{name}`' for name in (first, *names[1:]))} | {text} |"


def roles_page() -> str:
    """The page of roles, its table as it should be."""
    rows = [
        f"| `{row.role}` | {row.what} | {row.told} | {'kept' if row.kept else 'compressed'} |" for row in ROLES.values()
    ]
    table = [
        "<!-- table of roles -->",
        "| role | what it is | how it is told | without its name |",
        "|---|---|---|---|",
    ]
    page = ROLES_PAGE.read_text(encoding="utf-8")
    for lines in ([*table, *rows], _architecture_lines()):
        page = re.sub(rf"{lines[0]}\n.*?(?=\n\n|\Z)", lambda _, new=lines: "\n".join(new), page, flags=re.DOTALL)
    return page.rstrip("\n") + "\n"


COUNTED = ("matrix", "convolution", "depthwise", "norm", "bias", "mask", "quantizer-scale")
"""Roles whose tensors the table of architectures counts; it names the others."""


def _architecture_lines() -> list[str]:
    """The table of architectures: of each, how many kinds of weights have a role, or what these are called."""
    spec = importlib.util.spec_from_file_location("architectures", PINS)
    assert spec is not None and spec.loader is not None
    pins: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = pins
    spec.loader.exec_module(pins)
    lines = ["<!-- table of architectures -->", "| architecture | its kinds of tensors by role |", "|---|---|"]
    for one in (*pins.read_pins(pins.BUILT), *pins.read_pins(pins.BY_HAND)):
        if one.name.endswith(" in memory"):
            continue
        words = []
        for role in ROLE_NAMES:
            names = [tensor.info.name for tensor in one.tensors if tensor.role == role]
            if role in COUNTED:
                words += [f"{len(names)} {role}"] * bool(names)
            elif names:
                words.append(f"{role} {', '.join(f'`{name}`' for name in dict.fromkeys(map(_short, names)))}")
        lines.append(f"| {one.name} | {'; '.join(words)} |")
    return lines


def _short(name: str) -> str:
    """A tensor's own name in its module, or the module's where that is just weight; numbers left out."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    COMMANDS_PAGE.write_text(commands_page(), encoding="utf-8")
    ROLES_PAGE.write_text(roles_page(), encoding="utf-8")
    GLOSSARY.write_text(glossary_markdown(), encoding="utf-8")
    REPORT_SCHEMA.write_text(schema_text(REPORT), encoding="utf-8")

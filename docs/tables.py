"""Writes what docs/ take from the program: python docs/tables.py

The tables of docs/training.md come from the config dataclasses, those of docs/cli.md from the commands;
docs/glossary.md and the schema of reports from the rows of their figures.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from qcompress.cli.app import app
from qcompress.cli.panels import PanelCommand, panels_of
from qcompress.recipe.explain import limits
from qcompress.recipe.schema import recipe_schema
from qcompress.registry.regularizers import REGULARIZERS, RegularizerConfig
from qcompress.report.document_json import REPORT
from qcompress.report.glossary import glossary_markdown, schema_text
from qcompress.types.settings import AUGMENTATIONS

PAGE = Path(__file__).with_name("training.md")
COMMANDS_PAGE = Path(__file__).with_name("cli.md")
GLOSSARY = Path(__file__).with_name("glossary.md")
REPORT_SCHEMA = Path(__file__).parents[1] / "qcompress" / "report" / "schema.json"
SHARED = [one.name for one in dataclasses.fields(RegularizerConfig)]
OWN = ("strength", "start", "ramp")
"""Shared options whose defaults differ between regularizers."""


def page() -> str:
    """The page with every table as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(r"<!-- options of (\S+) -->\n.*?(?=\n\n|\Z)", _section, text, flags=re.DOTALL)


def _section(found: re.Match[str]) -> str:
    name = found[1]
    schema = recipe_schema()["$defs"]
    if name == "finetune":
        sections = ("optimizer", "schedule", "distil", "regularize")
        options = {key: value for key, value in schema["WrittenFinetune"]["properties"].items() if key not in sections}
        rows = [_row(key, option, _default(option.get("default"))) for key, option in options.items()]
    elif name == "augment":
        rows = [*_augmentations(schema)]
    elif name == "all":
        options = schema["L2Config"]["properties"]
        rows = [_row(key, options[key], "" if key in OWN else _default(options[key].get("default"))) for key in SHARED]
    else:
        config = REGULARIZERS[name].config
        options = schema[config.__name__]["properties"]
        needed: dict[str, Any] = {"levels": 4} if name in ("sine", "cosine") else {}
        usual = config(**needed)
        preset = options.get("preset")
        paper = config(**needed, preset=_choices(preset)[0].strip("`")) if preset else usual
        rows = [
            _row(key, option, "" if key in ("preset", *needed) else _both(getattr(usual, key), getattr(paper, key)))
            for key, option in options.items()
            if key not in SHARED or key in OWN
        ]
    return "\n".join([f"<!-- options of {name} -->", "| option | values | default | |", "|---|---|---|---|", *rows])


def _augmentations(schema: dict[str, Any]) -> Iterator[str]:
    for name, kind in AUGMENTATIONS.items():
        one = schema[kind.__name__]
        yield f"| `{name}` | | | {one['description']} |"
        for key, option in one["properties"].items():
            yield _row(key, option, _default(option.get("default"))).replace("| `", f"| `{name}.", 1)


def _row(name: str, option: dict[str, Any], default: str) -> str:
    return f"| `{name}` | {', '.join(_choices(option))} | {default} | {option.get('description', '')} |"


def _both(usual: Any, paper: Any) -> str:
    if usual == paper:
        return _default(usual)
    return f"{_default(usual) or 'none'}; paper {_default(paper) or 'none'}"


def _default(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool() | str():
            return f"`{str(value).lower()}`"
        case list() | tuple():
            return f"[{', '.join(f'{one:.4g}' if isinstance(one, float) else str(one) for one in value)}]"
        case _:
            return f"{value:g}"


def _choices(option: dict[str, Any]) -> list[str]:
    """The values that an option takes, in words."""
    if "anyOf" in option:
        return [choice for branch in option["anyOf"] if branch.get("type") != "null" for choice in _choices(branch)]
    if "enum" in option:
        return [f"`{value}`" for value in option["enum"]]
    if "const" in option:
        return [f"`{option['const']}`"]
    match option["type"]:
        case "boolean":
            return ["`true`", "`false`"]
        case "array":
            return ["[low, high]" if "prefixItems" in option else "a list"]
        case "string":
            return ["text"]
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


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    COMMANDS_PAGE.write_text(commands_page(), encoding="utf-8")
    GLOSSARY.write_text(glossary_markdown(), encoding="utf-8")
    REPORT_SCHEMA.write_text(schema_text(REPORT), encoding="utf-8")

"""The help of a command lists its options by topic. Drawn by the plain formatter, for Rich takes time to import."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

INPUT = "Input and recipe"
METHOD = "Method and grid"
BUDGET = "Budget"
MODEL = "Data and model"
OUTPUT = "Output"
GATES = "Gates"
RUNNING = "Running"
PANELS = (INPUT, METHOD, BUDGET, MODEL, OUTPUT, GATES, RUNNING)
"""The topics, in the order in which help and docs/cli.md show them."""


class PanelCommand(TyperCommand):
    """A command whose help has a section for each topic, which an option names by `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        for name, parameters in panels_of(self, ctx).items():
            records = [record for one in parameters if (record := one.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


def panels_of(command: Any, context: Any) -> dict[str, list[Any]]:
    """Topic -> the parameters of a command that belong to it, in the order of the topics."""
    found: dict[str, list[Any]] = {}
    for parameter in command.get_params(context):
        argument = parameter.param_type_name == "argument"
        name = getattr(parameter, "rich_help_panel", None) or ("Arguments" if argument else RUNNING)
        found.setdefault(name, []).append(parameter)
    own = [name for name in found if name not in PANELS]
    order = [*PANELS[:2], *own, *PANELS[2:]] if INPUT in found else [*own, *PANELS]
    return {name: found[name] for name in order if name in found}

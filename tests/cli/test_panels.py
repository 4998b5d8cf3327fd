"""Help lists the options of long commands by topic, in the same order everywhere."""

from __future__ import annotations

import re
from typing import Any

import pytest
from conftest import Run
from typer.main import get_command

from qcompress.cli.app import app
from qcompress.cli.panels import PANELS

ROOT: Any = get_command(app)
LONG = ("quantize", "cluster", "finetune-reg", "report", "eval")


@pytest.mark.parametrize("name", LONG)
def test_every_option_stands_in_its_panel(run: Run, name: str) -> None:
    ran = run(name, "--help")
    assert (ran.code, ran.err) == (0, "")
    titles = re.findall(r"^(\S[^:\n]*):$", ran.out, re.MULTILINE)
    known = [title for title in titles if title in PANELS]
    assert known == [title for title in PANELS if title in known]
    assert {"Input and recipe", "Data and model", "Output", "Gates", "Running"} <= set(titles)
    sections = dict(zip(titles, re.split(r"^\S[^:\n]*:$", ran.out, flags=re.MULTILINE)[1:], strict=True))
    for parameter in ROOT.commands[name].params:
        if parameter.param_type_name == "option":
            panel = parameter.rich_help_panel or "Running"
            assert re.search(rf"(^|[\s,/]){re.escape(parameter.opts[0])}\b", sections[panel]), parameter.opts[0]


@pytest.mark.parametrize("name", LONG)
def test_every_option_of_a_long_command_names_its_topic(name: str) -> None:
    options = [
        one for one in ROOT.commands[name].params if one.param_type_name == "option" and "--help" not in one.opts
    ]
    assert [one.opts[0] for one in options if not one.rich_help_panel] == []


def test_help_of_options_is_whole_sentences() -> None:
    inner = [command for one in ROOT.commands.values() for command in getattr(one, "commands", {"": one}).values()]
    for command in inner:
        for parameter in command.params:
            text = parameter.help or ""
            assert text.endswith("."), (command.name, parameter.name)
            assert len(text.split()) >= 3, (command.name, parameter.name)

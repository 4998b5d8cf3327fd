"""The program has its commands here, and turns errors and signals into exit codes."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.main import get_command

from qcompress.cli import options as opt
from qcompress.cli.cluster import cluster
from qcompress.cli.eval import evaluate
from qcompress.cli.export import export
from qcompress.cli.finetune import finetune_reg
from qcompress.cli.options import spread
from qcompress.cli.output import print_note, print_result
from qcompress.cli.panels import PanelCommand
from qcompress.cli.quantize import quantize
from qcompress.cli.recipe import recipe
from qcompress.cli.report import report
from qcompress.cli.verify import verify
from qcompress.errors import QcompressError
from qcompress.types import VERSION
from qcompress.types.run import begin_command

INTERRUPTED, TERMINATED, PIPE_CLOSED = 130, 143, 141
OUT_OF_RESOURCE = 5

# The base of all that the command line parser raises, wherever this version of typer keeps it.
CommandLineError: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)

app = typer.Typer(
    name="qcompress",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 2 command line, 3 bad input, 4 a gate failed, 5 out of a resource, 1 a bug.",
)


class Terminated(BaseException):
    """SIGTERM: unwinds like an interrupt, so that nothing half-written stays."""


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"qcompress {VERSION}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compress the weights of neural networks: a safetensors checkpoint in, a small artifact and a report out."""


app.command(cls=PanelCommand)(spread(quantize))
app.command(cls=PanelCommand)(spread(cluster))
app.command("finetune-reg", cls=PanelCommand)(spread(finetune_reg))
app.command(cls=PanelCommand)(spread(report))
app.command("eval", cls=PanelCommand)(spread(evaluate))
app.command()(verify)
app.command(cls=PanelCommand)(spread(export))
app.add_typer(recipe, name="recipe")


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to put network, recipes and results.")] = Path(
        "qcompress-demo"
    ),
    force: opt.Force = False,
    verbose: opt.Verbose = False,
) -> None:
    """Train a small network on scikit-learn's digits, then compress it with the real commands."""
    from qcompress.demo import run_demo

    def say(text: str) -> None:
        print_result(text)
        sys.stdout.flush()

    run_demo(folder, say, force=force)


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    begin_command()
    signal.signal(signal.SIGTERM, _terminate)
    _open_closed_streams()
    sys.exit(run(sys.argv[1:]))


def _open_closed_streams() -> None:
    """Put the null device where the caller closed stdout or stderr: no output file may take their place."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated


def run(arguments: list[str]) -> int:
    """The exit code of one command; everything that it has to say is on stdout and stderr."""
    try:
        code = app(arguments, prog_name="qcompress", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:
            # Newer versions of typer turn Ctrl-C into its exit code, older ones into Abort.
            raise typer.Abort
        return code if isinstance(code, int) else 0
    except QcompressError as error:
        for line in error.lines():
            print_note(f"error: {line}")
        return error.exit_code
    except CommandLineError as error:
        return _refuse_command_line(error)
    except BrokenPipeError:
        return _leave_pipe()
    except SystemExit as leaving:
        # typer leaves with 1 where the pipe closed while a command or the help was printing.
        if not isinstance(leaving.__context__, BrokenPipeError):
            raise
        return _leave_pipe()
    except (KeyboardInterrupt, typer.Abort):
        print_note("interrupted: nothing is left half-written")
        return INTERRUPTED
    except Terminated:
        print_note("terminated: nothing is left half-written")
        return TERMINATED
    except MemoryError:
        return _out_of_resource(
            "memory: ran out of it", arguments, "--max-memory 1GB", "--threads 1", "--coding packed"
        )
    except OSError as error:
        print_note(f"error: {error.filename or 'output'}: {error.strerror or error}; check the disk and permissions")
        return OUT_OF_RESOURCE
    except Exception as bug:
        return _report_bug(bug, arguments)


def _leave_pipe() -> int:
    """The exit code of SIGPIPE, for the reader of stdout has left; keeps Python from flushing into the closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED


def _out_of_resource(what: str, arguments: list[str], *flags: str) -> int:
    """Exit code 5 and one line, which names those of the flags that the command has."""
    command: Any = get_command(app)
    for word in arguments[:2]:
        command = getattr(command, "commands", {}).get(word, command)
    known = {name for option in command.params for name in option.opts}
    usable = [flag for flag in flags if flag.split()[0] in known]
    hint = f"use {' or '.join(usable)}" if usable else "end other programs, or use a machine that has more"
    print_note(f"error: {what}; {hint}")
    return OUT_OF_RESOURCE


def _refuse_command_line(error: Exception) -> int:
    """Exit code 2 and one line, where the parser would draw a box."""
    message = getattr(error, "format_message", error.__str__)()
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "qcompress"
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.stderr.write(f"{message}\n")
        return 2
    print_note(f"error: {command}: {' '.join(message.split()).rstrip('.')}; see {command} --help")
    return 2


def _report_bug(bug: Exception, arguments: list[str]) -> int:
    """Exit code 1: the trace with -v, else one line that says how to get it."""
    if isinstance(bug, RuntimeError) and "out of memory" in str(bug).lower():
        return _out_of_resource(
            "memory: the device ran out of it", arguments, "--device cpu", "--threads 1", "--max-memory 1GB"
        )
    if isinstance(bug, RuntimeError) and "start new thread" in str(bug):
        what = "threads: this process may start no more of them, and a higher limit would let it"
        return _out_of_resource(what, arguments, "--threads 1")
    if {"-v", "--verbose"} & set(arguments):
        traceback.print_exception(bug)
    else:
        print_note(
            f"bug: {type(bug).__name__}: {' '.join(str(bug).split())}; run again with -v for the trace, and report it"
        )
    return 1

"""`python -m qcompress` is `qcompress`. Neither imports modules of the current folder, whose files may be anyone's."""

# Only what Python has loaded before: until the folder is left, a file there could stand in for any other module.
import os
import sys


def leave_current_folder() -> None:
    """Take the current folder off the import path, of processes that this one starts too.

    Where this package itself lies there, in a clone that is not installed, the folder comes last instead.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        here = os.path.realpath(os.curdir)
    except FileNotFoundError:
        return
    if any(here.startswith(os.path.realpath(prefix) + os.sep) for prefix in (sys.prefix, sys.base_prefix)):
        return
    kept = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != here]
    home = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # noqa: PTH120
    sys.path[:] = [*kept, home] if home == here else kept


def main() -> None:
    """Run the command line and exit with its code."""
    leave_current_folder()
    from qcompress.cli import main as run

    run()


if __name__ == "__main__":
    main()

"""`python -m qcompress` is `qcompress`."""

from qcompress.cli import main

if __name__ == "__main__":
    main()

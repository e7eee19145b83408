"""``python -m kw``: see :mod:`kw.cli`."""

from .cli import main

if __name__ == "__main__":
    main()

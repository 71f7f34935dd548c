"""`python -m kgraph script.py args...` runs a script with kgraph as Keras' backend.

Anything that is not a Python file goes to kgraph's command line (`python -m kgraph compile ...`).
"""

from __future__ import annotations

import os
import runpy
import sys

from kgraph.frontend.install import install


def main() -> None:
    """Entry of `python -m kgraph`."""
    arguments = sys.argv[1:]
    if arguments and (arguments[0] == "-m" or arguments[0].endswith(".py") or os.path.isfile(arguments[0])):
        install()
        if arguments[0].endswith(".py") and not os.path.isfile(arguments[0]):
            print(f"kgraph: no such file: {arguments[0]}", file=sys.stderr)
            sys.exit(2)
        if arguments[0] == "-m":
            if len(arguments) < 2:
                sys.exit("usage: python -m kgraph -m module [arguments]")
            sys.argv = arguments[1:]
            sys.path[0] = os.getcwd()
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            return
        sys.argv = arguments
        # As `python script.py` does: the script's folder comes first on the path, not the current one.
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")
        return
    from kgraph.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()

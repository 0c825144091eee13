"""Starts one reader's own HTTP server. Runs in that reader's environment, without ctxext.

usage: serve.py READER MODEL CONTEXT PORT
"""

import importlib
import os
import sys
import threading


def main(name: str, model: str, context: str, port: str) -> None:
    """Serve until ended, or until the asking process is gone."""
    # Python runs isolated here (-I), which leaves the folder of the script out.
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    end_with = importlib.import_module("runner").end_with
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    importlib.import_module(f"serve_{name}").serve(model, int(context), int(port))


if __name__ == "__main__":
    main(*sys.argv[1:])

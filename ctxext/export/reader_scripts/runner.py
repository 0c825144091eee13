"""Puts a request to one reader and writes its answers. Runs in that reader's environment, without ctxext.

A request holds jobs (`model`, `ids`, `num_scored`), because starting a reader can take longer than asking it. A job
that fails answers with its error, the others go on; the response is rewritten after every job.

usage: runner.py READER REQUEST.json RESPONSE.json
"""

import importlib
import json
import os
import sys
import threading
import time
from typing import Any


def end_with(parent: int) -> None:
    """Leave when the asking process is gone: killed, it cannot end its reader, which may run for half an hour."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def answer(reader: Any, job: dict[str, Any]) -> dict[str, Any]:
    """The reader's log-probabilities and seconds, or its error in one line."""
    start = time.perf_counter()
    try:
        values = reader.log_probs(job["model"], job["ids"], job["num_scored"])
    except Exception as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
    return {"log_probs": values, "seconds": time.perf_counter() - start}


def main(name: str, request_path: str, response_path: str) -> None:
    """Answer the jobs of the request in order."""
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    with open(request_path, encoding="utf-8") as stream:
        jobs = json.load(stream)["jobs"]
    # Python runs isolated here (-I), which leaves the folder of the script out.
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    reader = importlib.import_module(f"ask_{name}")
    results = []
    for job in jobs:
        results.append(answer(reader, job))
        with open(f"{response_path}.partial", "w", encoding="utf-8") as stream:
            json.dump({"results": results}, stream)
        os.replace(f"{response_path}.partial", response_path)


if __name__ == "__main__":
    main(*sys.argv[1:])

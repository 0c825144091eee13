"""Weights pass from folder to folder unloaded: linked or copied to the byte, edits rounded once, damage refused."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import file_size_limit, tiny_model
from torch import Tensor

from ctxext.errors import ArtefactError, ResourceError
from ctxext.export import stream
from ctxext.export.stream import RowwiseEdit, checkpoint_tensors, read_header, read_tensor, row_scaling, stream_weights
from ctxext.files import directory_atomic, remove_partials
from ctxext.model.load import quiet

GATE = "model.layers.0.mlp.gate_proj.weight"
NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"


def every_dtype() -> dict[str, Tensor]:
    kinds = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    tensors = {kind: torch.arange(6).reshape(2, 3).to(getattr(torch, kind)) for kind in kinds}
    tensors |= {kind: torch.ones(5, 3).to(getattr(torch, kind)) for kind in ("float8_e4m3fn", "float8_e5m2")}
    return tensors | {"scalar": torch.tensor(1.5), "no rows": torch.empty(0, 4), "one row": torch.ones(1, 2)}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with one file of two float32 tensors."""
    folder = tmp_path / "small"
    folder.mkdir()
    tensors = {"a": torch.arange(12, dtype=torch.float32).reshape(4, 3), "b": torch.ones(2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def sharded(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A model in several files, as transformers writes it."""
    folder = tmp_path / "sharded"
    with quiet():
        tiny_model().to(getattr(torch, request.param)).save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


def write_file(path: Path, header: object, data: bytes, *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_headers_and_tensors_are_read_as_safetensors_reads_them(tmp_path: Path) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / "all.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "all.safetensors")
    assert header.keys() == tensors.keys()
    computable = 0
    with safe_open(tmp_path / "all.safetensors", "pt") as reference:
        for name, info in header.items():
            assert (list(info.shape), info.dtype) == (
                reference.get_slice(name).get_shape(),
                reference.get_slice(name).get_dtype(),
            )
            assert info.num_bytes == tensors[name].numel() * tensors[name].element_size()
            if info.dtype in ("F64", "F32", "F16", "BF16"):
                computable += 1
                assert torch.equal(read_tensor(tmp_path / "all.safetensors", info), tensors[name])
            else:
                with pytest.raises(ArtefactError, match="plain floating-point"):
                    read_tensor(tmp_path / "all.safetensors", info)
    assert computable == 7
    rows = read_tensor(tmp_path / "all.safetensors", header["bfloat16"], 1, 1)
    assert torch.equal(rows, tensors["bfloat16"][1:])


DAMAGED = {
    "no bytes": (b"", "cut short"),
    "a cut length": (b"\x01\x02", "cut short; got '2 bytes'"),
    "a length beyond the file": (
        (500).to_bytes(8, "little") + b"{}",
        "cut short; got '10 bytes'.* byte 508",
    ),
    "something else": (b"GGUF" + bytes(60) + b"\xff" * 8, "cut short|not a safetensors file"),
    "a huge length": (b"\xff" * 8 + b"{}", "not a safetensors file"),
    "no JSON": (b"{oops}", "not JSON"),
    "no text": (b"\xff\xfe\xfd", "not JSON"),
    "a list": ([1], "no table of tensors"),
    "a name twice": (b'{"a":{},"a":{}}', "a name occurs twice"),
    "no entry": ({"a": 3}, "malformed"),
    "no offsets": ({"a": {"dtype": "U8", "shape": [4]}}, "malformed"),
    "a negative size": ({"a": entry(0, 4, [-4])}, "malformed"),
    "a fraction": ({"a": entry(0, 4, [4.0])}, "malformed"),  # type: ignore[list-item]
    "an unknown dtype": ({"a": entry(0, 4, dtype="Q9")}, "unknown dtype; got 'Q9'"),
    "another shape": ({"a": entry(0, 4, [5])}, "does not fit the shape; got '4 bytes'; expected 5 bytes"),
    "offsets in reverse": ({"a": entry(4, 0, [4])}, "does not fit the shape"),
    "overlap": ({"a": entry(0, 3), "b": entry(2, 4)}, "two tensors overlap .a and b."),
    "a gap": ({"a": entry(0, 1), "b": entry(2, 4)}, "belong to none .a and b."),
    "a gap at the start": ({"a": entry(1, 4)}, "belong to none .the header and a."),
    "too little data": ({"a": entry(0, 5)}, "cut short"),
    "too much data": ({"a": entry(0, 3)}, "after the last tensor"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_by_name_with_what_was_seen(tmp_path: Path, damage: str) -> None:
    header, message = DAMAGED[damage]
    path = tmp_path / "model.safetensors"
    if isinstance(header, bytes) and not header.startswith((b"{", b"\xff\xfe")):
        path.write_bytes(header)
    else:
        write_file(path, header, bytes(4))
    with pytest.raises(ArtefactError, match=f"^{re.escape(str(path))}.*could not read the tensors.*({message})"):
        read_header(path)


def test_no_cut_and_no_changed_header_byte_escapes_as_anything_but_our_error(small: Path) -> None:
    path = small / "model.safetensors"
    data = path.read_bytes()
    expected = read_header(path)
    refused = 0
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ArtefactError):
            read_header(path)
    for position in range(8 + int.from_bytes(data[:8], "little")):
        changed = bytearray(data)
        changed[position] ^= 0x11
        path.write_bytes(changed)
        try:
            # What still reads has another name or dtype of the same width: ranges never change unnoticed.
            assert [(i.start, i.end) for i in read_header(path).values()] == [
                (i.start, i.end) for i in expected.values()
            ]
        except ArtefactError:
            refused += 1
    assert refused > 100
    with pytest.raises(ArtefactError, match="could not read the tensors"):
        read_header(small / "nowhere.safetensors")


def test_a_folder_of_shards_is_read_through_its_index(sharded: Path) -> None:
    weights = checkpoint_tensors(sharded)
    expected = {}
    for path in sharded.glob("*.safetensors"):
        expected |= load_file(path)
    assert weights.tensors.keys() == expected.keys()
    assert weights.num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    assert weights.main_dtype == expected[NORM].dtype
    for name, tensor in expected.items():
        assert torch.equal(weights.read(name), tensor)


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("sharded", ["bfloat16"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda named: named.update(extra="nowhere.safetensors"), "names a shard that is missing; got 'nowhere"),
        (lambda named: named.update(extra=named[NORM]), "lacks tensors that the index places there; got 'extra"),
        (lambda named: named.pop(NORM), f"holds tensors that the index does not .* got '{NORM}"),
        (lambda named: named.update(extra="../small/model.safetensors"), "outside its folder"),
        (lambda named: named.clear(), "no weight_map"),
        (lambda named: named.update(extra=3), "no weight_map"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(
    sharded: Path, change: Callable[[dict[str, str]], object], message: str, tmp_path: Path
) -> None:
    change_index(sharded, change)
    with pytest.raises(ArtefactError, match=message):
        stream_weights(sharded, tmp_path / "out")
    assert names_of(tmp_path / "out") == []


def test_pickles_are_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"no safetensors weights; expected model\.safetensors"):
        checkpoint_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ArtefactError, match=r"got 'pytorch_model\.bin'.*convert them first"):
        checkpoint_tensors(tmp_path)


def test_files_without_edits_are_hard_links_or_on_request_copies(sharded: Path, tmp_path: Path) -> None:
    shards = names_of(sharded)
    linked, copied = tmp_path / "linked", tmp_path / "copied"
    report = stream_weights(sharded, linked)
    assert (len(report.linked), report.copied, report.edited, report.bytes_written) == (len(shards) - 3, (), (), 0)
    report = stream_weights(sharded, copied, link=False)
    assert (report.linked, len(report.copied)) == ((), len(shards) - 3)
    assert names_of(linked) == names_of(copied) == [name for name in shards if "safetensors" in name]
    for name in names_of(linked):
        assert (linked / name).samefile(sharded / name) == (name != INDEX)
        assert not (copied / name).samefile(sharded / name)
        assert (copied / name).read_bytes() == (sharded / name).read_bytes()


def test_where_no_link_can_be_made_the_files_are_copied(small: Path) -> None:
    other = Path("/dev/shm")
    if not os.access(other, os.W_OK) or other.stat().st_dev == small.stat().st_dev:
        pytest.skip("this machine has no second file system to write to")
    destination = other / f"ctxext-{os.getpid()}"
    try:
        assert stream_weights(small, destination).copied == ("model.safetensors",)
        assert (destination / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()
    finally:
        for path in destination.iterdir():
            path.unlink()
        destination.rmdir()


def test_the_links_of_a_hub_cache_become_files(small: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(Path("..") / ".." / "small" / "model.safetensors")
    stream_weights(snapshot, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    assert (tmp_path / "out" / "model.safetensors").samefile(small / "model.safetensors")


def third(tensor: Tensor) -> Tensor:
    assert tensor.dtype == torch.float32
    return tensor / 3


def test_only_the_edited_ranges_change_and_each_value_is_rounded_once(sharded: Path, tmp_path: Path) -> None:
    before = checkpoint_tensors(sharded)
    report = stream_weights(sharded, tmp_path / "out", {GATE: third, NORM: lambda tensor: tensor.mul_(1.1)})
    after = checkpoint_tensors(tmp_path / "out")
    assert after.shards == before.shards
    assert set(report.edited) == {before.file_of[GATE], before.file_of[NORM]}
    assert set(report.linked) == before.shards.keys() - set(report.edited)
    assert (report.num_edited_tensors, report.num_tensors) == (2, len(before.tensors))
    for file in before.shards:
        old, new = (sharded / file).read_bytes(), bytearray((tmp_path / "out" / file).read_bytes())
        for name, info in before.shards[file].items():
            if name in (GATE, NORM):
                assert old[info.start : info.end] != new[info.start : info.end]
                new[info.start : info.end] = old[info.start : info.end]
        assert old == new
    gate = before.read(GATE)
    assert torch.equal(after.read(GATE), (gate.float() / 3).to(gate.dtype))
    assert torch.equal(load_file(tmp_path / "out" / after.file_of[GATE])[GATE], after.read(GATE))


def test_an_edit_by_rows_in_blocks_equals_the_edit_of_the_whole(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def number_rows(rows: Tensor, first: int) -> Tensor:
        seen.append((first, len(rows)))
        return rows * torch.arange(first, first + len(rows))[:, None]

    stream_weights(sharded, tmp_path / "whole", {GATE: RowwiseEdit(number_rows)})
    assert seen == [(0, 64)]
    monkeypatch.setattr(stream, "BLOCK_ELEMENTS", 32 * 10)
    seen.clear()
    stream_weights(sharded, tmp_path / "blocks", {GATE: RowwiseEdit(number_rows)})
    assert seen == [(0, 10), (10, 10), (20, 10), (30, 10), (40, 10), (50, 10), (60, 4)]
    file = checkpoint_tensors(sharded).file_of[GATE]
    assert (tmp_path / "blocks" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    values = checkpoint_tensors(sharded).read(GATE).float()
    assert torch.equal(RowwiseEdit(number_rows)(values), number_rows(values, 0))


def test_an_edit_that_scales_rows_can_be_made_in_blocks_to_the_same_bits(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scale_rotary_rows(tensor: Tensor) -> Tensor:
        scaled = tensor.clone()
        scaled.view(4, 16, -1)[:, :6] *= 1.0693147
        return scaled

    stream_weights(sharded, tmp_path / "whole", {GATE: scale_rotary_rows})
    monkeypatch.setattr(stream, "BLOCK_ELEMENTS", 32 * 10)
    stream_weights(sharded, tmp_path / "blocks", {GATE: row_scaling(scale_rotary_rows, 64)})
    whole, blocks, before = (
        checkpoint_tensors(f).read(GATE) for f in (tmp_path / "whole", tmp_path / "blocks", sharded)
    )
    assert torch.equal(whole, blocks)
    assert not torch.equal(whole, before)


def test_doubles_and_scalars_are_edited_in_their_own_precision(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    save_file(every_dtype(), source / "model.safetensors")
    edits = {name: lambda tensor: tensor + 0.1 for name in ("float64", "scalar", "no rows", "one row")}
    stream_weights(source, tmp_path / "out", edits)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in every_dtype().items():
        expected = tensor + 0.1 if name in edits else tensor
        assert torch.equal(stored[name].float(), expected.float())
    assert torch.equal(stored["float64"], every_dtype()["float64"] + 0.1)


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("c", third, "no tensor of this name; got 'c'"),
        ("a", lambda tensor: tensor[:2], r"keep the shape; got '\(2, 3\)'; expected \(4, 3\)"),
        ("a", lambda tensor: tensor / 0, "not finite numbers"),
        ("b", lambda tensor: tensor * 1e39, "not finite numbers"),
    ],
)
def test_a_wrong_edit_is_one_clear_error_and_leaves_nothing(
    small: Path, tmp_path: Path, name: str, edit: Callable[[Tensor], Tensor], message: str
) -> None:
    before = (small / "model.safetensors").read_bytes()
    with pytest.raises(ArtefactError, match=message):
        stream_weights(small, tmp_path / "out", {name: edit})
    assert names_of(tmp_path / "out") == []
    assert (small / "model.safetensors").read_bytes() == before


def test_an_edit_of_quantised_weights_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtefactError, match=r"only plain floating-point.*got 'F8_E4M3'.*before it was quantised"):
        stream_weights(tmp_path, tmp_path / "out", {"w": third})
    assert stream_weights(tmp_path, tmp_path / "out").linked == ("model.safetensors",)


def test_a_file_that_is_there_already_is_never_written_into(small: Path, tmp_path: Path) -> None:
    before = (small / "model.safetensors").read_bytes()
    with pytest.raises(ArtefactError, match="exists already"):
        stream_weights(small, small, {"a": third})
    stream_weights(small, tmp_path / "out")
    with pytest.raises(ArtefactError, match="exists already"):
        stream_weights(small, tmp_path / "out", {"a": third})
    assert (small / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("sharded", ["float32"], indirect=True)
def test_a_full_disk_leaves_nothing_and_the_source_as_it_was(sharded: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in sharded.iterdir()}
    edits = dict.fromkeys(checkpoint_tensors(sharded).tensors, third)
    with file_size_limit(20_000), pytest.raises(ResourceError, match="could not write the weights"):
        stream_weights(sharded, tmp_path / "out", edits)
    assert names_of(tmp_path / "out") == []
    with (
        file_size_limit(20_000),
        pytest.raises(ResourceError, match="could not write"),
        directory_atomic(tmp_path / "out2") as partial,
    ):
        stream_weights(sharded, partial, link=False)
    assert names_of(tmp_path) == ["out", "sharded"]
    assert {path.name: path.read_bytes() for path in sharded.iterdir()} == before


def sparse_model(folder: Path, num_bytes: int) -> Path:
    """A file of two float32 tensors that takes no room: zeros that were never written."""
    folder.mkdir()
    half = num_bytes // 2
    header = {name: entry(k * half, (k + 1) * half, [half // 4096, 1024], "F32") for k, name in enumerate("ab")}
    path = write_file(folder / "model.safetensors", header, b"")
    os.truncate(path, path.stat().st_size + 2 * half)
    return folder


def test_too_little_room_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    source = sparse_model(tmp_path / "huge", 8 << 40)
    with pytest.raises(ResourceError, match="not enough free disk space for the weights"):
        stream_weights(source, tmp_path / "out", link=False)
    assert names_of(tmp_path / "out") == []
    assert stream_weights(source, tmp_path / "out").bytes_written == 0


def in_child(work: Callable[[], None]) -> int:
    """Start `work` in a forked process; its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def test_a_kill_in_the_middle_of_a_file_leaves_no_destination(small: Path, tmp_path: Path) -> None:
    before = (small / "model.safetensors").read_bytes()
    destination, reached = tmp_path / "out", tmp_path / "reached"

    def linger(tensor: Tensor) -> Tensor:
        reached.touch()
        time.sleep(60)
        return tensor

    def work() -> None:
        with directory_atomic(destination) as partial:
            stream_weights(small, partial, {"b": linger})

    child = in_child(work)
    while not reached.exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not destination.exists()
    assert any(path.name.startswith("out.partial-") for path in tmp_path.iterdir())
    remove_partials(tmp_path)
    assert names_of(tmp_path) == ["reached", "small"]
    assert (small / "model.safetensors").read_bytes() == before


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    source = sparse_model(tmp_path / "large", 512 << 20)

    def work() -> None:
        import resource

        torch.set_num_threads(1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        edits = {"a": RowwiseEdit(lambda rows, first: rows.add_(1))}
        stream_weights(source, tmp_path / "out", edits)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        os._exit(0 if grown < 200 << 20 else 2)

    _, status = os.waitpid(in_child(work), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    weights = checkpoint_tensors(tmp_path / "out")
    assert (weights.read("a", 5, 1).mean(), weights.read("b", 5, 1).mean()) == (1, 0)
    for path in (tmp_path / "out").iterdir():
        path.unlink()

"""Damaged checkpoints: the fault is found before anything is unpickled, reported by file and byte, and the previous
checkpoint is loaded.
"""

import dataclasses
import io
import os
import pickle
import shutil
from pathlib import Path

import checkpoint_faults as faults
import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import run_on_ranks

from distattn.checkpoints.checkpoint_folder import list_checkpoints, newest_good, verify_checkpoint
from distattn.checkpoints.checkpoints import Checkpoints
from distattn.checkpoints.digested_files import CheckedFile, DigestingFile
from distattn.checkpoints.manifest import BLOCK_BYTES, Manifest
from distattn.checkpoints.pickled_names import VALUES, load_metadata
from distattn.checkpoints.retention import KeepRule
from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.models.checkpoint_files import checkpoint_tensors


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Save two checkpoints on two ranks. Return their folder."""
    folder = tmp_path_factory.mktemp("pair")
    run_on_ranks(2, faults.save_pair, str(folder))
    return folder


@pytest.fixture
def copy(pair, tmp_path):
    shutil.copytree(pair, tmp_path / "copy")
    return tmp_path / "copy"


def load(folder, group=None):
    """Load the newest checkpoint. Return what was loaded, the state and the warnings."""
    warned: list[str] = []
    checkpoints = Checkpoints(Path(folder), group=group, facts={}, keep=KeepRule(), warn=warned.append)
    state = faults.empty_state()
    try:
        return checkpoints.load_newest(state), state, warned
    finally:
        checkpoints.close()


@pytest.mark.parametrize("kind", faults.DAMAGES)
def test_no_damage_is_loaded_silently(kind, pair, tmp_path):
    injector = faults.Injector(pair, tmp_path, seed=list(faults.DAMAGES).index(kind))
    for _ in range(25):
        injector.inject(kind, beside_dcp=False)
    injector.close()
    assert not injector.silent, injector.silent[:3]
    if kind != "edited manifest":
        # an edit of the manifest may change only whitespace, which has no effect
        assert injector.counts[kind] == {"passed over": 25}


def test_plain_dcp_loads_flipped_bits_silently(pair, tmp_path):
    """Show why digests are needed."""
    injector = faults.Injector(pair, tmp_path, seed=1)
    for _ in range(20):
        injector.inject("flipped bit of a tensor file")
    injector.close()
    assert injector.plain["flipped bit of a tensor file"]["silent"] > 10
    assert injector.counts["flipped bit of a tensor file"] == {"passed over": 20}


def flip(file, at):
    content = bytearray(Path(file).read_bytes())
    content[at] ^= 1
    Path(file).write_bytes(content)


def load_on_rank(rank, folder):
    loaded, state, warned = load(folder, group=torch.distributed.group.WORLD)
    assert faults.equal(state, faults.state_of(loaded.step))
    return loaded.step, warned


@pytest.mark.parametrize("file", ["__0_0.distcp", "__1_0.distcp", ".metadata", "manifest.json"])
def test_all_ranks_pass_over_what_one_of_them_finds_damaged(file, copy):
    flip(copy / faults.NEWER / file, 40)
    (step, warned), *others = run_on_ranks(4, load_on_rank, str(copy))
    assert step == 100 and others == [(100, [])] * 3
    assert len(warned) == 1 and file in warned[0] and "Resuming from step-00000100 instead." in warned[0]


def test_if_no_checkpoint_is_intact_the_run_does_not_start_over(copy):
    flip(copy / faults.NEWER / "__0_0.distcp", 40)
    (copy / faults.OLDER / "manifest.json").unlink()
    with pytest.raises(DamagedDataError, match=r"none of its 2 checkpoints is whole.*manifest\.json.*__0_0\.distcp"):
        load(copy)
    assert newest_good(copy) is None


def test_nothing_is_unpickled_before_its_digest_is_right(copy):
    ran = copy / "ran"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    (copy / faults.NEWER / ".metadata").write_bytes(pickle.dumps(Hostile()))
    loaded, _, _ = load(copy)
    assert loaded.step == 100 and not ran.exists()


class RunsCode:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def forged(folder, where, marker):
    """Write a hostile checkpoint with correct digests that tries to run code. where: the part that names the code."""
    step = folder / "step-00000007"
    state = {"weights": torch.ones(4), "model.w": torch.ones(4), "words": "plain", "hostile": RunsCode(marker)}
    dcp.save(state, checkpoint_id=step, no_dist=True)
    metadata = pickle.loads((step / ".metadata").read_bytes())
    places = {index.fqn: index for index in metadata.storage_data}
    hostile = metadata.storage_data.pop(places["hostile"])
    del metadata.state_dict_metadata["hostile"]
    if where == "value":
        metadata.storage_data[places["words"]] = hostile
    elif where == "tensor":
        metadata.storage_data[places["weights"]] = metadata.storage_data[places["model.w"]] = hostile
    else:
        metadata.planner_data = RunsCode(marker)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    files = []
    for name in sorted(os.listdir(step)):
        content = (step / name).read_bytes()
        with DigestingFile(step / name) as file:
            file.write(content)
        files.append(file.digests(name))
    Manifest(1, 7, "2026-01-01T00:00:00+00:00", 1, torch.__version__, {}, files).write(step)
    return step


@pytest.mark.parametrize("where", ["metadata", "value", "tensor"])
def test_a_checkpoint_with_right_digests_runs_no_code_and_is_not_called_good(where, tmp_path):
    marker = tmp_path / "ran"
    step = forged(tmp_path / "checkpoints", where, marker)
    (problem,) = {str(problem) for problem in verify_checkpoint(step)}
    assert "names posix.mkdir, which no checkpoint of PyTorch's does" in problem
    state = {"weights": torch.zeros(4), "words": ""}
    checkpoints = Checkpoints(step.parent, group=None, facts={}, keep=KeepRule(), warn=faults.no_warning)
    try:
        with pytest.raises(DamagedDataError, match=r"none of its 1 checkpoints is whole.*run code"):
            checkpoints.load_newest(state)
    finally:
        checkpoints.close()
    if where != "value":
        with pytest.raises(DamagedDataError, match=r"metadata: names posix\.mkdir|model\.w cannot be read"):
            dict(checkpoint_tensors(step))
    assert not marker.exists()
    # plain DCP does run the code
    dcp.load({"weights": torch.zeros(4), "words": ""} if where != "tensor" else {"words": ""}, checkpoint_id=step)
    assert marker.exists() == (where != "tensor")


class Attribute:
    """An attribute of a class, pickled as some versions of Python 3.11 pickle enum members."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_members_of_enumerations_are_read_as_every_python_writes_them():
    path, formats = Path(".metadata"), dcp.metadata._MEM_FORMAT_ENCODING
    for member in formats:
        for written in (member, Attribute(formats, member.name)):
            assert load_metadata(io.BytesIO(pickle.dumps(written)), path) is member
    for name, owner in [("mkdir", Path), ("__subclasses__", formats), ("__init__", dcp.metadata.Metadata)]:
        with pytest.raises(DamagedDataError):
            load_metadata(io.BytesIO(pickle.dumps(Attribute(owner, name))), path)


@pytest.mark.parametrize("outside", ["../secret", "/etc/passwd", "a/b"])
def test_a_checkpoint_names_no_files_outside_of_its_folder(outside, copy):
    step = copy / faults.NEWER
    manifest = Manifest.read(step)
    first = manifest.files[0]._replace(name=outside)
    dataclasses.replace(manifest, files=[first, *manifest.files[1:]]).write(step)
    with pytest.raises(DamagedDataError, match=f"names {outside}, which is no file of this folder"):
        Manifest.read(step)


def test_torch_allows_the_values_that_verify_accepts():
    allowed = torch._weights_only_unpickler._get_allowed_globals()
    # the list may contain dtypes of other torch versions that this version lacks
    missing = {f"{module}.{name}" for module, name in VALUES} - set(allowed)
    assert all(not hasattr(torch, name.removeprefix("torch.")) for name in missing), missing


def test_classes_that_other_packages_allow_in_pytorch_are_not_accepted(tmp_path):
    """Refuse a path even though Megatron-core adds its class to the list of `torch.load(weights_only=True)`."""
    checkpoints = Checkpoints(tmp_path, group=None, facts={}, keep=KeepRule(), warn=faults.no_warning)
    try:
        with torch.serialization.safe_globals([type(Path("a"))]):
            checkpoints.save(1, {"path": Path("a")})
            with pytest.raises(DistattnError, match="path .* cannot be read again"):
                checkpoints.wait()
    finally:
        checkpoints.close()


def test_a_value_that_could_not_be_read_again_is_refused_when_it_is_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, group=None, facts={}, keep=KeepRule(), warn=faults.no_warning)
    try:
        checkpoints.save(1, {"rng": (Path("a"), 1)})
        with pytest.raises(DistattnError, match=r"rng \(builtins\.tuple\) cannot be read again"):
            checkpoints.wait()
        plain = {"list": [1, (2.0, "three", None)], "weights": torch.ones(2), "dtype": (torch.float32, b"bytes")}
        checkpoints.save(2, plain)
        loaded = {"list": [0, ()], "weights": torch.zeros(2), "dtype": ()}
        checkpoints.load_newest(loaded)
        assert loaded["list"] == plain["list"] and loaded["dtype"] == plain["dtype"]
        assert not verify_checkpoint(tmp_path / "step-00000002")
    finally:
        checkpoints.close()


def test_damage_between_the_check_and_the_reading_is_found_too(copy, monkeypatch):
    # imitate a disk that returns different bytes the second time
    from distattn.checkpoints import checkpoints as module

    def check_then_flip(folder, manifest, part, parts):
        if folder.name == faults.NEWER:
            flip(folder / "__1_0.distcp", 9000)

    monkeypatch.setattr(module, "first_problem", check_then_flip)
    loaded, state, warned = load(copy)
    assert loaded.step == 100 and faults.equal(state, faults.state_of(100))
    assert "__1_0.distcp" in warned[0]


def test_a_problem_names_the_file_and_its_bytes(tmp_path):
    checkpoints = Checkpoints(tmp_path, group=None, facts={}, keep=KeepRule(), warn=faults.no_warning)
    checkpoints.save(7, {"large": torch.arange(3 * BLOCK_BYTES // 4, dtype=torch.int32)})
    checkpoints.close()
    folder = tmp_path / "step-00000007"
    assert verify_checkpoint(folder) == []
    flip(folder / "__0_0.distcp", 2 * BLOCK_BYTES + 5)
    (problem,) = verify_checkpoint(folder)
    assert (problem.file, problem.offset) == ("__0_0.distcp", 2 * BLOCK_BYTES)
    assert f"bytes {2 * BLOCK_BYTES:,} to {3 * BLOCK_BYTES:,} are not what was written" in str(problem)
    (folder / "__0_0.distcp").unlink()
    assert [problem.offset for problem in verify_checkpoint(folder)] == [None]


def test_a_manifest_of_another_version_is_refused_by_its_version(copy, monkeypatch):
    from distattn.checkpoints import manifest as module

    manifest = Manifest.read(copy / faults.NEWER)
    monkeypatch.setattr(module, "FORMAT_VERSION", 2)
    manifest.write(copy / faults.NEWER)
    monkeypatch.undo()
    with pytest.raises(DamagedDataError, match="format version 2; this distattn reads version 1"):
        Manifest.read(copy / faults.NEWER)
    # an unreadable checkpoint sorts last
    assert [listed.manifest is None for listed in list_checkpoints(copy)] == [False, True]


def test_checked_files_are_read_in_any_order(tmp_path):
    content = torch.randint(0, 256, (2 * BLOCK_BYTES + 100,), dtype=torch.uint8).numpy().tobytes()
    with DigestingFile(tmp_path / "file") as file:
        for start in range(0, len(content), 1_000_003):
            file.write(content[start : start + 1_000_003])
    digests = file.digests("file")
    assert digests.bytes == len(content) and len(digests.blocks) == 3
    with CheckedFile(tmp_path / "file", digests) as file:
        for start, size in ((5, 10), (BLOCK_BYTES - 3, 6), (2 * BLOCK_BYTES, 500), (0, 1)):
            file.seek(start)
            content_read = b""
            while part := file.read(size - len(content_read)):
                content_read += part
            assert content_read == content[start : start + size]
        assert file.seek(-100, os.SEEK_END) == 2 * BLOCK_BYTES


def test_an_empty_file_has_a_digest_too(tmp_path):
    with DigestingFile(tmp_path / "file") as file:
        pass
    assert len(file.digests("file").blocks) == 1

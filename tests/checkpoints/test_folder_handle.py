"""Folder handles: a process notices if the folder it works in is renamed, replaced or deleted."""

import re
import shutil

import pytest

from distattn.checkpoints.folder_handle import FolderHandle
from distattn.ir.errors import DistattnError


@pytest.mark.parametrize("replaced", [False, True])
def test_a_renamed_folder_is_found_under_its_new_name(replaced, tmp_path):
    place = tmp_path / "run"
    place.mkdir()
    with FolderHandle(place) as held:
        held.check()
        place.rename(tmp_path / "other")
        if replaced:
            place.mkdir()
        assert not held.is_in_place() and held.where() == tmp_path / "other"
        moved = f"{place}: was renamed to {tmp_path}/other meanwhile"
        sentence = f"{moved}; distattn resume {tmp_path}/other goes on, or move it back."
        with pytest.raises(DistattnError, match=f"^{re.escape(sentence)}$"):
            held.check()
        if replaced:
            place.rmdir()
        (tmp_path / "other").rename(place)
        held.check()


def test_a_deleted_folder_is_nowhere_also_where_another_one_has_its_name(tmp_path):
    place = tmp_path / "run"
    place.mkdir()
    with FolderHandle(place) as held:
        shutil.rmtree(place)
        assert not held.is_in_place() and held.where() is None
        place.mkdir()
        with pytest.raises(DistattnError, match="was deleted meanwhile, or moved elsewhere; put it back"):
            held.check()

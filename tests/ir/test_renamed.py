"""Renamed names still work for one release, and the warning points at the line that uses them."""

import importlib.util

import pytest

import distattn as da


def test_old_names_of_functions_and_options_still_work_with_a_warning():
    def plan(schedule):
        shape = dict(heads=2, kv_heads=2, head_dim=16, dtype="float32", options={"schedule": schedule})
        return da.make_recurrent_plan(da.Mask.documents([64]), da.Layout.zigzag([64], 2), op="gla", **shape)

    with pytest.warns(DeprecationWarning, match="schedule 'gathered' is now 'allgather_states'") as warned:
        assert plan("gathered").digest == plan("allgather_states").digest
    assert {warning.filename for warning in warned} == {__file__}
    with pytest.warns(DeprecationWarning, match="recurrent_run.* is now 'recurrent_span'") as warned:
        assert da.recurrent_run is da.recurrent_span
    assert {warning.filename for warning in warned} == {__file__}
    assert "recurrent_run" not in da.__all__


def test_documented_modules_that_moved_are_imported_by_their_old_names():
    with pytest.warns(
        DeprecationWarning, match="module 'distattn.data.pack_rule' is now 'distattn.data.packing.pack_r"
    ) as warned:
        from distattn.data.pack_rule import PackRule
    from distattn.data.packing import pack_rule

    assert {warning.filename for warning in warned} == {__file__}
    assert PackRule is pack_rule.PackRule and pack_rule.__spec__.name == "distattn.data.packing.pack_rule"
    for name in da._MOVED.values():
        assert importlib.util.find_spec(f"distattn.{name}")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("distattn.data.nothing")


def test_an_adapter_has_its_old_names():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from distattn.adapters import huggingface

    with pytest.warns(DeprecationWarning, match="relayout_recurrent_spans"):
        assert huggingface.relayout_recurrent_runs is huggingface.relayout_recurrent_spans
    with pytest.raises(AttributeError, match="no attribute 'relayout'"):
        _ = huggingface.relayout

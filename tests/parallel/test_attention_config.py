"""Each attention setting is a single field wherever it is set, and everything that takes plans takes the same record."""

import dataclasses

import pytest

import distattn as da
from distattn.parallel.attention_config import AttentionConfig, AttentionKeys
from distattn.training.config import run_file
from distattn.training.config.plan_settings import PlanSettings, attention_config
from distattn.training.config.sections import Config, ModelConfig, ParallelConfig

MASK, LAYOUT = da.Mask.documents([40, 24]), da.Layout.zigzag([40, 24], 4)
SIZES = dict(heads=4, kv_heads=2, head_dim=8, dtype="bfloat16")
CONFIG = AttentionConfig(
    strategy="double_ring", backward="keep", comm_dtype="bfloat16", cluster="h200-2x8", max_buffer_bytes=1 << 20
)


def names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_run_files_and_code_share_fields_and_not_copies_of_them():
    # context_parallel_size has a wider meaning in run files, where it also counts the ranks of replicated data
    assert names(ParallelConfig) & names(AttentionConfig) == names(AttentionKeys) | {"context_parallel_size"}


@pytest.mark.parametrize("plan", [da.make_plan, da.make_latent_plan, da.make_recurrent_plan])
def test_a_record_plans_as_its_keyword_arguments_do(plan):
    sizes = {**SIZES, "v_head_dim": 8}
    cluster = da.Cluster(2, 2)
    settings = dict(comm_dtype="bfloat16", cluster=cluster, max_buffer_bytes=1 << 20)
    config = AttentionConfig(strategy="double_ring", backward="keep", **settings)
    if plan is da.make_latent_plan:
        del sizes["kv_heads"]
        sizes |= dict(rotary_dim=2, latent_dim=4)
    if plan is da.make_recurrent_plan:
        sizes |= dict(op="gla")
        config = dataclasses.replace(config, comm_dtype=None)
        settings["comm_dtype"] = None
    else:
        settings |= dict(strategy="double_ring", backward="keep")
    from_record, from_keywords = (plan(MASK, LAYOUT, **sizes, **how) for how in (dict(config=config), settings))
    assert from_record.digest == from_keywords.digest


def test_a_strategy_next_to_a_record_replaces_its_backward_and_options():
    config = AttentionConfig(strategy="ring", backward="keep", options={"rotate": "q"})
    plan = da.make_plan(MASK, LAYOUT, config=config, strategy="allgather", **SIZES)
    assert plan.digest == da.make_plan(MASK, LAYOUT, strategy="allgather", **SIZES).digest


def test_settings_that_contradict_a_record_are_refused():
    with pytest.raises(da.DistattnError, match="comm_dtype, cluster and max_buffer_bytes are those of config"):
        da.make_plan(MASK, LAYOUT, config=CONFIG, cluster=da.Cluster(1, 4), **SIZES)
    with pytest.raises(da.DistattnError, match="a strategy is needed"):
        da.make_plan(MASK, LAYOUT, **SIZES)


def test_the_driver_takes_a_record_and_keyword_arguments_that_replace_its_values():
    config = AttentionConfig(strategy="allgather", pad_to=4)
    with da.ContextParallel(config=config, kernel="reference") as cp:
        assert cp.config == dataclasses.replace(config, kernel="reference") and cp.planner.config is cp.config


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(strategy="star"), "strategy 'star' does not exist; there are ring"),
        (dict(backward="later"), "backward policy 'later' does not exist"),
        (dict(kernel="flush"), "kernel: there is no 'flush'; there are auto, reference, .* Did you mean flash?"),
        (dict(comm_dtype="int8"), "comm_dtype: there is no 'int8'; there are float16"),
        (dict(data="mine"), "data: there is no 'mine'; there are replicated, per_rank"),
        (dict(max_buffer_bytes=-1), "max_buffer_bytes: must be at least 0, not -1"),
        (dict(pad_to=0), "pad_to: must be at least 1, not 0"),
        (dict(timeout=0), "timeout: must be above 0, not 0"),
        (dict(pad_to="4"), "pad_to must be a whole number, not '4'"),
        (dict(servers=1, backward="keep"), "servers keep nothing"),
    ],
)
def test_a_record_refuses_values_out_of_their_limits(settings, sentence):
    with pytest.raises(da.DistattnError, match=sentence):
        AttentionConfig(**settings)


def test_a_run_file_s_record_reaches_the_plan(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        '[parallel]\nstrategy = "double_ring"\nbackward = "keep"\ndevices_per_node = 2\nlayout = "document_zigzag"\n'
        'min_chunk = 8\ncomm_dtype = ""\nmax_buffer_bytes = 0\n'
    )
    config = run_file.load(file)
    expected = AttentionConfig(
        strategy="double_ring",
        backward="keep",
        layout="document_zigzag",
        layout_options={"min_chunk": 8},
        kernel="cpu",
        cluster=da.Cluster(2, 2),
    )
    assert attention_config(config) == expected
    plan = PlanSettings.of_config(config).plan([40, 24])
    assert (plan.strategy, plan.policy, plan.call.comm_dtype, plan.call.ranks) == ("double_ring", "keep", "", 4)
    # values that TOML cannot express are left out of a saved file
    run_file.save(config, tmp_path / "saved.toml")
    assert (
        "comm_dtype" not in (tmp_path / "saved.toml").read_text() and run_file.load(tmp_path / "saved.toml") == config
    )


def test_ranks_with_packs_of_their_own_share_attention_in_blocks():
    parallel = ParallelConfig(ranks=4, data="per_rank", strategy="cad", context_parallel_size=2)
    settings = PlanSettings.of_config(Config(model=ModelConfig(), parallel=parallel))
    assert settings.config.context_parallel_size == 2 and settings.data_parallel_size == 2


def test_with_servers_no_strategy_chooses_to_keep_tensors():
    mask, layout = da.Mask.causal(256), da.Layout.zigzag([256], 2)
    shape = dict(heads=2, kv_heads=2, head_dim=16, dtype="float32")
    policies = [
        da.make_plan(mask, layout, config=AttentionConfig(strategy="usp", servers=servers), **shape).policy
        for servers in (0, 1)
    ]
    assert policies == ["keep", "refetch-follow"]
    with pytest.raises(da.DistattnError, match="servers keep nothing"):
        da.make_plan(mask, layout, config=AttentionConfig(strategy="ring", servers=1), strategy="ulysses", **shape)

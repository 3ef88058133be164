"""distattn: long-context attention over many ranks, as plans you can read, prove and run.

Names are loaded when first used, so that planning and verifying never import torch.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from distattn.ir.renamed import MovedModules, current_name

if TYPE_CHECKING:
    from distattn.batch.recurrent_span import RecurrentSpan as RecurrentSpan
    from distattn.batch.recurrent_span import recurrent_span as recurrent_span
    from distattn.cluster.topology import Cluster as Cluster
    from distattn.driver.context_parallel import ContextParallel as ContextParallel
    from distattn.driver.overlap import OverlapSchedule as OverlapSchedule
    from distattn.driver.servers import serve as serve
    from distattn.ir.errors import DamagedDataError as DamagedDataError
    from distattn.ir.errors import DistattnError as DistattnError
    from distattn.ir.errors import LostRankError as LostRankError
    from distattn.ir.errors import PlanError as PlanError
    from distattn.ir.export import block_mask as block_mask
    from distattn.ir.export import cu_seqlens as cu_seqlens
    from distattn.ir.layout import Layout as Layout
    from distattn.ir.mask import Mask as Mask
    from distattn.ir.op import Op as Op
    from distattn.ir.op import latent_op as latent_op
    from distattn.ir.plan import Call as Call
    from distattn.ir.plan import Payload as Payload
    from distattn.ir.plan import Plan as Plan
    from distattn.ir.plan import Table as Table
    from distattn.ops.attention import attention as attention
    from distattn.ops.attention import save_attention as save_attention
    from distattn.ops.convolution import causal_conv1d as causal_conv1d
    from distattn.ops.convolution import token_shift as token_shift
    from distattn.ops.executable import Executable as Executable
    from distattn.ops.executable import prepare as prepare
    from distattn.ops.latent import latent_attention as latent_attention
    from distattn.ops.prefix_max import prefix_max as prefix_max
    from distattn.ops.prefix_softmax import PrefixSoftmaxState as PrefixSoftmaxState
    from distattn.ops.prefix_softmax import prefix_softmax as prefix_softmax
    from distattn.ops.recurrence import recurrence as recurrence
    from distattn.parallel.analysis.explain import Explanation as Explanation
    from distattn.parallel.analysis.explain import explain as explain
    from distattn.parallel.analysis.quality import quality as quality
    from distattn.parallel.analysis.simulate import simulate as simulate
    from distattn.parallel.analysis.timeline import Timeline as Timeline
    from distattn.parallel.analysis.verify import Proof as Proof
    from distattn.parallel.analysis.verify import verify as verify
    from distattn.parallel.attention_config import AttentionConfig as AttentionConfig
    from distattn.parallel.latent_plan import make_latent_plan as make_latent_plan
    from distattn.parallel.make_plan import make_plan as make_plan
    from distattn.parallel.prefix_softmax_plans import PrefixSoftmaxPlans as PrefixSoftmaxPlans
    from distattn.parallel.prefix_softmax_plans import make_prefix_softmax_plans as make_prefix_softmax_plans
    from distattn.parallel.recurrent_plan import make_recurrent_plan as make_recurrent_plan

_HOME = {
    "AttentionConfig": "distattn.parallel.attention_config",
    "Call": "distattn.ir.plan",
    "Cluster": "distattn.cluster.topology",
    "ContextParallel": "distattn.driver.context_parallel",
    "DamagedDataError": "distattn.ir.errors",
    "DistattnError": "distattn.ir.errors",
    "Explanation": "distattn.parallel.analysis.explain",
    "Layout": "distattn.ir.layout",
    "Mask": "distattn.ir.mask",
    "Payload": "distattn.ir.plan",
    "OverlapSchedule": "distattn.driver.overlap",
    "Op": "distattn.ir.op",
    "Plan": "distattn.ir.plan",
    "PrefixSoftmaxPlans": "distattn.parallel.prefix_softmax_plans",
    "PrefixSoftmaxState": "distattn.ops.prefix_softmax",
    "LostRankError": "distattn.ir.errors",
    "PlanError": "distattn.ir.errors",
    "RecurrentSpan": "distattn.batch.recurrent_span",
    "Executable": "distattn.ops.executable",
    "Proof": "distattn.parallel.analysis.verify",
    "Table": "distattn.ir.plan",
    "Timeline": "distattn.parallel.analysis.timeline",
    "attention": "distattn.ops.attention",
    "block_mask": "distattn.ir.export",
    "causal_conv1d": "distattn.ops.convolution",
    "cu_seqlens": "distattn.ir.export",
    "explain": "distattn.parallel.analysis.explain",
    "latent_attention": "distattn.ops.latent",
    "latent_op": "distattn.ir.op",
    "make_latent_plan": "distattn.parallel.latent_plan",
    "make_plan": "distattn.parallel.make_plan",
    "make_prefix_softmax_plans": "distattn.parallel.prefix_softmax_plans",
    "prefix_max": "distattn.ops.prefix_max",
    "prefix_softmax": "distattn.ops.prefix_softmax",
    "make_recurrent_plan": "distattn.parallel.recurrent_plan",
    "prepare": "distattn.ops.executable",
    "quality": "distattn.parallel.analysis.quality",
    "recurrence": "distattn.ops.recurrence",
    "recurrent_span": "distattn.batch.recurrent_span",
    "save_attention": "distattn.ops.attention",
    "serve": "distattn.driver.servers",
    "simulate": "distattn.parallel.analysis.simulate",
    "token_shift": "distattn.ops.convolution",
    "verify": "distattn.parallel.analysis.verify",
}
_RENAMED = {"RecurrentRun": "RecurrentSpan", "recurrent_run": "recurrent_span"}
# old and new names of moved modules that documentation and examples import
_MOVED = {
    "data.byte_corpus": "data.files.text",
    "data.indexed_file": "data.files.indexed_file",
    "data.make_pack_plan": "data.packing.make_pack_plan",
    "data.pack_config": "data.packing.pack_config",
    "data.pack_rule": "data.packing.pack_rule",
    "data.streams": "data.streaming.streams",
    "data.text": "data.files.text",
    "training.loss_by_position": "training.reporting.loss_by_position",
    "training.metrics": "training.reporting.metrics",
    "training.model_flops": "training.reporting.model_flops",
    "training.numerics_watch": "training.watch.numerics_watch",
    "training.replay_check": "training.watch.replay_check",
    "training.schedule": "training.learning_rate",
    "training.step_clock": "training.reporting.step_clock",
}
sys.meta_path.append(MovedModules({f"distattn.{old}": f"distattn.{new}" for old, new in _MOVED.items()}))
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    name = current_name(name, _RENAMED, "distattn")
    if name not in _HOME:
        raise AttributeError(f"module 'distattn' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])

"""distattn: long-context attention over many ranks, as plans you can read, prove and run.

Names are loaded when first used, so that planning and verifying never import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distattn.cluster.topology import Cluster as Cluster
    from distattn.context import ContextParallel as ContextParallel
    from distattn.errors import DamagedDataError as DamagedDataError
    from distattn.errors import DistattnError as DistattnError
    from distattn.errors import PlanError as PlanError
    from distattn.exporters import block_mask as block_mask
    from distattn.exporters import cu_seqlens as cu_seqlens
    from distattn.functional import attention as attention
    from distattn.functional import save_attention as save_attention
    from distattn.layout import Layout as Layout
    from distattn.mask import Mask as Mask
    from distattn.parallel.explain import Explanation as Explanation
    from distattn.parallel.explain import explain as explain
    from distattn.parallel.make_plan import make_plan as make_plan
    from distattn.parallel.quality import quality as quality
    from distattn.parallel.simulate import simulate as simulate
    from distattn.parallel.timeline import Timeline as Timeline
    from distattn.parallel.verify import Proof as Proof
    from distattn.parallel.verify import verify as verify
    from distattn.pingpong import PingPong as PingPong
    from distattn.pipeline import Pipeline as Pipeline
    from distattn.plan import Call as Call
    from distattn.plan import Payload as Payload
    from distattn.plan import Plan as Plan
    from distattn.plan import Table as Table
    from distattn.pool import Pool as Pool
    from distattn.programs import Prepared as Prepared
    from distattn.programs import prepare as prepare
    from distattn.serving import serve as serve

_HOME = {
    "Call": "distattn.plan",
    "Cluster": "distattn.cluster.topology",
    "ContextParallel": "distattn.context",
    "DamagedDataError": "distattn.errors",
    "DistattnError": "distattn.errors",
    "Explanation": "distattn.parallel.explain",
    "Layout": "distattn.layout",
    "Mask": "distattn.mask",
    "Payload": "distattn.plan",
    "PingPong": "distattn.pingpong",
    "Pipeline": "distattn.pipeline",
    "Plan": "distattn.plan",
    "PlanError": "distattn.errors",
    "Pool": "distattn.pool",
    "Prepared": "distattn.programs",
    "Proof": "distattn.parallel.verify",
    "Table": "distattn.plan",
    "Timeline": "distattn.parallel.timeline",
    "attention": "distattn.functional",
    "block_mask": "distattn.exporters",
    "cu_seqlens": "distattn.exporters",
    "explain": "distattn.parallel.explain",
    "make_plan": "distattn.parallel.make_plan",
    "prepare": "distattn.programs",
    "quality": "distattn.parallel.quality",
    "save_attention": "distattn.functional",
    "serve": "distattn.serving",
    "simulate": "distattn.parallel.simulate",
    "verify": "distattn.parallel.verify",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'distattn' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])

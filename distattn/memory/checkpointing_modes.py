"""The modes of activation checkpointing. Needs no torch, so that a run's configuration can be read without it."""

# no layer is checkpointed; a layer keeps its input; it keeps attention's outputs as well
CHECKPOINTING = ("none", "full", "save_attention")

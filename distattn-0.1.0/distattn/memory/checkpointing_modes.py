"""Names of what checkpointed layers keep. No torch: a run's configuration is read without it."""

# nothing is checkpointed; a layer keeps its input; it keeps what attention has computed as well
CHECKPOINTING = ("none", "full", "save_attention")

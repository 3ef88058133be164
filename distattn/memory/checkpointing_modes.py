"""The modes of activation checkpointing. This module does not need torch, so that a run file can be read without it."""

# respectively: layers keep all activations, only their input, or their input and attention's outputs
CHECKPOINTING = ("none", "full", "save_attention")

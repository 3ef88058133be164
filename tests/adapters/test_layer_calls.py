"""The way from a model's layer to a kernel stays short."""

from layer_calls import Layer, count_calls


def test_few_frames_and_calls_lie_between_transformers_and_the_kernel():
    counted = count_calls(Layer())
    # a call more is a reason to look at what was added, not to raise the limit
    assert counted.own_frames <= 8 and counted.own_calls <= 70, counted

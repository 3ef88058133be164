"""Checks that there are few calls between a model's layer and a kernel."""

from layer_calls import Layer, count_calls


def test_few_frames_and_calls_lie_between_transformers_and_the_kernel():
    counted = count_calls(Layer())
    # if this fails, look at what was added rather than raise the limit
    assert counted.own_frames <= 8 and counted.own_calls <= 70, counted

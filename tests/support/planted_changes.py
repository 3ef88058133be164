"""Faults in a model: a module whose output, or the gradient of its output, is changed in some of its calls."""

import itertools

import torch


class ChangedGradient(torch.autograd.Function):
    """The identity, whose gradient is `change(gradient)`."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


def with_number(x, place, value):
    """Return a copy of a tensor with one number changed."""
    x = x.clone()
    x.view(-1)[place] = value
    return x


def change_output(module, change, calls=None):
    """Change a module's output in all of its calls, or in these. Return the handle of the hook."""
    numbers = itertools.count()

    def hook(_, __, out):
        number = next(numbers)
        return change(out) if calls is None or number in calls else out

    return module.register_forward_hook(hook)

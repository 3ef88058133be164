"""Faults planted in a model: hooks that change a module's output, or the output's gradient, in some of its calls."""

import itertools

import torch


class ChangedGradient(torch.autograd.Function):
    """The identity function with the gradient `change(gradient)`."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


def with_number(x, place, value):
    """Return a copy of `x` with the element at flat index `place` set to `value`."""
    x = x.clone()
    x.view(-1)[place] = value
    return x


def change_output(module, change, calls=None):
    """Change a module's output in every call, or only in the calls numbered in `calls`. Return the hook's handle."""
    numbers = itertools.count()

    def hook(_, __, out):
        number = next(numbers)
        return change(out) if calls is None or number in calls else out

    return module.register_forward_hook(hook)

"""A tiled loss and its gradients equal those of the full logits. What it cannot compute is refused by name."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distattn.adapters import pytorch
from distattn.ir.errors import DistattnError
from distattn.memory.tiled_loss import TiledLoss, tiled_loss

TOKENS, WIDTH, VOCABULARY = 23, 16, 40


def tensors(dtype, has_bias, weight_dtype=None):
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, WIDTH), (VOCABULARY, WIDTH)] + [(VOCABULARY,)] * has_bias
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    # the first and third tiles have some labels, the second tile has no labels
    labels[[0, 5, 6, 7, 8, 9, 10, 11]] = -100
    return [x.to(weight_dtype or dtype if i else dtype).requires_grad_() for i, x in enumerate(values)], labels


def dense(inputs, labels, z_loss, soft_cap, logit_scale):
    logits = F.linear(inputs[0], *inputs[1:])
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32) * logit_scale
    logits = soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits
    squares = logits.logsumexp(1)[labels != -100].square().sum()
    losses = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    return losses.sum() + z_loss * squares, losses


@pytest.mark.parametrize("changes", [(0.0, 0.0, 1.0), (1e-2, 3.0, 0.5)], ids=["plain", "all"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("tile_tokens", [1, 4, TOKENS, 100])
def test_loss_and_gradients_match_those_of_all_logits(tile_tokens, has_bias, changes):
    inputs, labels = tensors(torch.float64, has_bias)
    names = dict(zip(("z_loss", "soft_cap", "logit_scale"), changes, strict=True))
    bias = inputs[2] if has_bias else None
    loss, losses = tiled_loss(*inputs[:2], labels, tile_tokens=tile_tokens, bias_V=bias, **names)
    wanted, wanted_losses = dense(inputs, labels, *changes)
    torch.testing.assert_close(loss, wanted, rtol=1e-13, atol=0)
    torch.testing.assert_close(losses, wanted_losses, rtol=1e-12, atol=1e-14)
    assert not losses.requires_grad
    # use a factor other than 1, like a loss scale
    for a, b in zip(torch.autograd.grad(loss * 0.3, inputs), torch.autograd.grad(wanted * 0.3, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_a_weight_in_half_precision_has_a_gradient_summed_in_single():
    inputs, labels = tensors(torch.bfloat16, False)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(dense(exact, labels, 0.0, 0.0, 1.0)[0], exact[1])[0]

    def error(loss):
        return float((torch.autograd.grad(loss, inputs[1])[0].double() - wanted).norm() / wanted.norm())

    whole = error(dense(inputs, labels, 0.0, 0.0, 1.0)[0])
    assert error(tiled_loss(*inputs, labels, tile_tokens=1)[0]) < 1.2 * whole < 0.02


@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16])
def test_autocast_computes_as_it_does_for_a_linear_layer(hidden):
    inputs, labels = tensors(hidden, True, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, losses = tiled_loss(*inputs[:2], labels, tile_tokens=4, bias_V=inputs[2])
        wanted, _ = dense(inputs, labels, 0.0, 0.0, 1.0)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=5e-3, atol=0)
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).norm() / b.norm()) < 2e-2


@pytest.mark.parametrize("tokens", [0, 5])
def test_without_labels_the_loss_is_zero_and_has_a_gradient(tokens):
    hidden, weight = torch.randn(tokens, WIDTH, requires_grad=True), torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    loss, losses = tiled_loss(hidden, weight, torch.full((tokens,), -100), tile_tokens=2, z_loss=1.0)
    loss.backward()
    assert float(loss.detach()) == 0 and not losses.any() and not weight.grad.any() and not hidden.grad.any()


def test_logits_of_all_tokens_never_exist_at_once(monkeypatch):
    products = []
    right = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (products.append(right(a, b)), products[-1])[1])
    inputs, labels = tensors(torch.float32, False)
    tiled_loss(*inputs, labels, tile_tokens=4)[0].backward()
    assert max(x.shape[0] for x in products if x.shape[-1] == VOCABULARY) == 4


class Model(nn.Module):
    """A model that transforms its logits with `change`."""

    def __init__(self, head=None, change=lambda logits: logits, **config):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), head or nn.Linear(WIDTH, VOCABULARY)
        self.change, self.config = change, SimpleNamespace(**config)

    def forward(self, input_ids, context_parallel):
        return self.change(self.head(self.embed(input_ids)))


def batch_of(tokens=9):
    ids = torch.arange(tokens)[None] % VOCABULARY
    labels = ids.clone()
    labels[:, :4] = -100
    batch = dict(input_ids=ids, labels=labels, loss_scale=0.25, context_parallel=SimpleNamespace(used=True))
    return batch | dict(position_ids=torch.arange(tokens)[None])


@pytest.mark.parametrize(
    ("change", "config"),
    [
        (lambda x: x, {}),
        (lambda x: 5 * torch.tanh(x / 5), dict(final_logit_softcapping=5.0)),
        (lambda x: x / 3, dict(logits_scaling=3.0)),
        (lambda x: x * 0.125, dict(logit_scale=0.125)),
        (lambda x: x.float(), {}),
    ],
)
def test_changes_of_logits_are_known_from_the_models_configuration(change, config):
    torch.manual_seed(0)
    model, batch = Model(change=change, **config), batch_of()
    loss = pytorch.local_loss(model, batch, loss=TiledLoss(tile_tokens=2))
    wanted = pytorch.local_loss(model, batch)
    torch.testing.assert_close(loss, wanted)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(a, b)


class Headless(nn.Module):
    def forward(self, input_ids, context_parallel):
        return input_ids


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Headless(), "the layer of Headless that makes logits is unknown"),
        (Model(change=lambda x: 7 * torch.tanh(x / 7)), "Model changes logits after its output layer"),
        (Model(change=lambda x: x * 2, final_logit_softcapping=5.0), "Model changes logits after its output layer"),
        (Model(change=lambda x: torch.cat([x, x], 1)), "Model changes logits after its output layer"),
    ],
)
def test_calls_that_cannot_be_computed_are_refused_by_name(model, message):
    with pytest.raises(DistattnError, match=message):
        pytorch.local_loss(model, batch_of(), loss=TiledLoss())
    # the layer is unchanged for other callers
    if hasattr(model, "head"):
        assert model.head(torch.zeros(1, WIDTH)).shape == (1, VOCABULARY)


def test_an_output_layer_that_is_not_linear_or_not_called_is_refused():
    loss, labels, model = TiledLoss(), torch.zeros(3, dtype=torch.int64), Model()
    with (
        pytest.raises(DistattnError, match="the output layer is a Embedding"),
        loss.instead_of_logits(model.embed, labels, pytorch.logit_change(model)),
    ):
        pass
    with loss.instead_of_logits(model.head, labels, pytorch.logit_change(model)) as output:
        pass
    with pytest.raises(DistattnError, match="Model did not call its output layer"):
        output.loss_sum(torch.zeros(1), model)
    with loss.instead_of_logits(model.head, labels, pytorch.logit_change(model)):
        with pytest.raises(DistattnError, match="was given 5 tokens, the batch has 3"):
            model.head(torch.zeros(5, WIDTH))
        model.head(torch.zeros(3, WIDTH))
        with pytest.raises(DistattnError, match="called twice"):
            model.head(torch.zeros(3, WIDTH))
    with pytest.raises(DistattnError, match="compile the layers, not the whole model"):
        pytorch.local_loss(torch.compile(model), batch_of(), loss=loss)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(tile_tokens=0), "tile_tokens must be at least 1, not 0"),
        (dict(z_loss=-1.0), "z_loss must be a positive number"),
        (dict(soft_cap=float("nan")), "soft_cap must be a positive number"),
        (dict(labels=torch.zeros(3, dtype=torch.int64)), "labels have shape"),
        (dict(weight=torch.zeros(4, 3)), "do not fit"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(wrong, message):
    inputs, labels = tensors(torch.float32, False)
    arguments = dict(labels=labels, weight=inputs[1], tile_tokens=4) | wrong
    with pytest.raises(DistattnError, match=message):
        tiled_loss(inputs[0], arguments.pop("weight"), arguments.pop("labels"), **arguments)

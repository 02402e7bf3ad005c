"""Fused expressions give the values and gradients of the plain ones and keep nothing but their inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flextok.model.layers.fused import gated_add, is_plain, norm_modulate, swiglu_mlp
from flextok.model.layers.mlp import GatedMlp
from flextok.model.layers.modulation import modulate
from flextok.model.layers.norm import plain_norm

TOKENS, WIDTH, HIDDEN, ROWS = 12, 8, 10, 3
EPS = 1e-5
INDEX = torch.arange(TOKENS) * ROWS // TOKENS


def leaves(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def linears(biases=False):
    torch.manual_seed(0)
    shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    return [nn.Linear(dim_in, dim_out, bias=biases) for dim_in, dim_out in shapes]


def plain_norm_modulate(x, shift, scale):
    return modulate(plain_norm(WIDTH)(x), shift[INDEX], scale[INDEX])


EXPRESSIONS = {
    "norm_modulate": (
        lambda x, shift, scale: norm_modulate(x, shift, scale, INDEX, EPS),
        plain_norm_modulate,
        ((1, TOKENS, WIDTH), (ROWS, WIDTH), (ROWS, WIDTH)),
    ),
    "gated_add": (
        lambda x, gate, branch: gated_add(x, gate, branch, INDEX),
        lambda x, gate, branch: x + gate[INDEX] * branch,
        ((1, TOKENS, WIDTH), (ROWS, WIDTH), (1, TOKENS, WIDTH)),
    ),
}
every_expression = pytest.mark.parametrize(("fused", "plain", "shapes"), EXPRESSIONS.values(), ids=EXPRESSIONS)


def values_and_gradients(fn, inputs):
    out = fn(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def assert_same(mine, theirs, tol):
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), i
        difference = float((a.detach().double() - b.detach().double()).abs().max())
        assert difference <= tol * max(1.0, float(b.detach().abs().max())), f"{i}: {difference}"


@every_expression
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float64, 1e-6)])
def test_values_and_gradients(fused, plain, shapes, dtype, tol):
    inputs = leaves(*shapes, dtype=dtype)
    assert_same(values_and_gradients(fused, inputs), values_and_gradients(plain, inputs), tol)


@every_expression
@pytest.mark.parametrize("rest", [torch.float32, torch.bfloat16], ids=["x_bf16", "rest_bf16"])
def test_a_row_of_one_dtype_with_modulations_of_another(fused, plain, shapes, rest):
    """As under autocast: the residual row stays float32, what linear maps return does not."""
    first = torch.bfloat16 if rest == torch.float32 else torch.float32
    x, *others = leaves(*shapes)
    inputs = [x.detach().to(first).requires_grad_(), *(t.detach().to(rest).requires_grad_() for t in others)]
    assert_same(values_and_gradients(fused, inputs), values_and_gradients(plain, inputs), 0.02)


@every_expression
def test_rows_that_no_token_reads_get_no_gradient(fused, plain, shapes):
    inputs = leaves(*(((ROWS + 2, WIDTH) if shape[0] == ROWS else shape) for shape in shapes))
    for x, gradient in zip(inputs, values_and_gradients(fused, inputs)[1:], strict=True):
        assert gradient.isfinite().all()
        if len(x) == ROWS + 2:
            assert (gradient[ROWS:] == 0).all()
            assert (gradient[:ROWS] != 0).any(-1).all()


def test_norm_modulate_of_rows_of_one_value():
    """The norm's variance is 0: eps decides."""
    x = torch.full((1, TOKENS, WIDTH), 3.0, requires_grad=True)
    _, shift, scale = leaves(*EXPRESSIONS["norm_modulate"][2])
    fused = values_and_gradients(EXPRESSIONS["norm_modulate"][0], [x, shift, scale])
    assert_same(fused, values_and_gradients(plain_norm_modulate, [x, shift, scale]), 1e-4)


# --- linear maps ------------------------------------------------------------------------------------------------------


def fused_mlp(x, *weights):
    return swiglu_mlp(x, *(linear_of(weight) for weight in weights))


def linear_of(weight):
    linear = nn.Linear(*reversed(weight.shape), bias=False)
    del linear.weight
    linear.weight = weight
    return linear


def plain_mlp(x, gate, value, out):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, value), out)


MLP_SHAPES = ((2, TOKENS, WIDTH), (HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN))
MAPS = {
    "swiglu_mlp": (fused_mlp, plain_mlp, MLP_SHAPES),
}
every_map = pytest.mark.parametrize(("fused", "plain", "shapes"), MAPS.values(), ids=MAPS)


@every_map
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float64, 1e-13)])
def test_values_and_gradients_of_linear_maps(fused, plain, shapes, dtype, tol):
    inputs = leaves(*shapes, dtype=dtype)
    assert_same(values_and_gradients(fused, inputs), values_and_gradients(plain, inputs), tol)


@every_map
def test_gradients_of_linear_maps_by_finite_differences(fused, plain, shapes):
    assert torch.autograd.gradcheck(fused, leaves(*shapes, dtype=torch.float64))


@every_map
def test_linear_maps_under_autocast(fused, plain, shapes):
    inputs = leaves(*shapes)
    by_form = []
    for fn in (fused, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = fn(*inputs)
        assert out.dtype == torch.bfloat16
        by_form.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    assert_same(*by_form, 0.03)


@every_map
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_inputs_and_weights(fused, plain, shapes, frozen):
    """Only what wants a gradient gets one, and it does not depend on what else is frozen."""
    inputs = leaves(*shapes)
    inputs[frozen].requires_grad_(False)
    wanted = [x for x in inputs if x.requires_grad]
    by_form = [torch.autograd.grad(fn(*inputs).square().sum(), wanted) for fn in (fused, plain)]
    assert_same(*by_form, 1e-5)


def test_layers_take_the_fused_path_only_where_it_is_right():
    gate, value, out = linears()
    assert is_plain(gate, value, out)
    assert not is_plain(gate, *linears(biases=True)[:1])

    class Adapted(nn.Linear):
        """Linear with something added, as adapters are."""

    assert not is_plain(gate, Adapted(WIDTH, HIDDEN, bias=False))


@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlp_is_the_plain_expression(bias):
    mlp, (x,) = GatedMlp(WIDTH, 12, bias=bias), leaves((1, TOKENS, WIDTH))
    mlp.load_state_dict({name: torch.randn_like(tensor) for name, tensor in mlp.state_dict().items()})
    expected = mlp.fc2(F.silu(mlp.fc1(x)) * mlp.fc3(x))
    inputs = [x, *mlp.parameters()]
    by_form = [[out, *torch.autograd.grad(out.square().sum(), inputs)] for out in (mlp(x), expected)]
    assert_same(*by_form, 1e-5)


def test_a_replaced_linear_map_is_called():
    """What is put around one of the maps, an adapter for instance, stays in force."""
    mlp, (x,) = GatedMlp(WIDTH, 12, bias=False), leaves((1, TOKENS, WIDTH))
    before = mlp(x)
    mlp.fc2 = nn.Sequential(mlp.fc2, nn.ReLU())
    torch.testing.assert_close(mlp(x), before.relu())


def test_hooks_of_a_linear_map_run():
    """Spectral norm and profilers live in hooks."""
    seen, mlp, (x,) = [], GatedMlp(WIDTH, 12, bias=False), leaves((1, TOKENS, WIDTH))
    for linear in (mlp.fc1, mlp.fc2, mlp.fc3):
        linear.register_forward_hook(lambda module, inputs, output: seen.append(module))
    mlp(x)
    assert seen == [mlp.fc1, mlp.fc3, mlp.fc2]


# --- what is kept -----------------------------------------------------------------------------------------------------


def kept(fn):
    """Addresses and shapes of what the graph of `fn()` holds on to."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = fn()
    addresses = {t.untyped_storage().data_ptr() for t in saved}
    return saved, addresses, out


@every_expression
def test_no_intermediate_result_is_kept(fused, plain, shapes):
    inputs = leaves(*shapes)
    own = {t.untyped_storage().data_ptr() for t in [*inputs, INDEX]}
    saved, addresses, _out = kept(lambda: fused(*inputs))
    extra = [t for t in saved if t.untyped_storage().data_ptr() not in own]
    # The norm's mean and standard deviation: one number per token each.
    assert sum(t.numel() for t in extra) <= 2 * TOKENS
    plain_saved, plain_addresses, _plain_out = kept(lambda: plain(*inputs))
    assert len(addresses - own) < len(plain_addresses - own)


def test_of_the_mlp_the_two_first_products_are_kept_and_nothing_else():
    inputs = leaves(*MLP_SHAPES)
    own = {t.untyped_storage().data_ptr() for t in inputs}
    saved, _, _out = kept(lambda: fused_mlp(*inputs))
    products = [t for t in saved if t.untyped_storage().data_ptr() not in own]
    assert sum(t.numel() for t in products) == 2 * TOKENS * 2 * HIDDEN

"""Compiled blocks: the same numbers, few graphs however `keep_k` and image sizes vary, the same names of weights.

They run in a process of their own: functions whose annotations are checked cannot be traced.
"""

import json

import pytest

from tests.support import FORMS, python_output

PROGRAM = """
import json, sys
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from flextok.model.trunks.transformers import compile_blocks
from tests.support import max_difference, small_tokenizer

form, backend, num_steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
plain, compiled = small_tokenizer(form).train(), small_tokenizer(form).train()
names = list(compiled.state_dict())
counters = {}
for name in ("encoder", "decoder"):
    counters[name] = CompileCounterWithBackend(backend)
    compile_blocks(getattr(compiled, name), backend=counters[name], fullgraph=True)
assert list(compiled.state_dict()) == names

EQUAL, MIXED = [(8, 8)] * 9, [(8, 8), (4, 8), (6, 2), (8, 8), (2, 2), (5, 7), (3, 3), (1, 8), (4, 4)]


def step(model, index):
    generator = torch.Generator().manual_seed(index)
    sizes = MIXED if index % 3 == 1 else EQUAL
    latents = [torch.randn(1, 3, h, w, generator=generator) for h, w in sizes]
    data = model({"vae_latents": latents, "rng": torch.Generator().manual_seed(index)})
    velocity = list(data["vae_latents_reconst"])
    loss = sum(v.square().mean() for v in velocity)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return data["train_keep_k"], velocity, torch.autograd.grad(loss, parameters, materialize_grads=True)


graphs, keep_ks = [], []
for index in range(num_steps):
    (drawn, expected, wanted), (_, velocity, gradients) = step(plain, index), step(compiled, index)
    assert max(map(max_difference, velocity, expected)) < 1e-5
    for mine, theirs in zip(gradients, wanted, strict=True):
        assert max_difference(mine, theirs) < 1e-4 * max(1.0, float(theirs.abs().max()))
    keep_ks.append(drawn)
    graphs.append({name: counter.frame_count for name, counter in counters.items()})

compiled.eval()
plain.eval()
quants = list(torch.randn(6, 16, 6).split(1))
decoded = []
for model in (plain, compiled):
    data = {"enc_registers_quant": quants, "eval_keep_k": [1, 4, 16, 0, 2, 9], "rng": torch.Generator().manual_seed(0)}
    options = {"timesteps": 2, "vae_image_sizes": 8, "guidance_scale": 2.0, "verbose": False}
    decoded.append(model.pipeline(data, **options)["vae_latents_reconst"].tensor)
assert max_difference(*decoded) < 1e-4
after = {name: counter.frame_count for name, counter in counters.items()}
print(json.dumps({"graphs": graphs, "keep_ks": keep_ks, "after_decoding": after}))
"""


def compile_and_train(form, backend="aot_eager", num_steps=10):
    return json.loads(python_output("-W", "ignore", "-c", PROGRAM, form, backend, num_steps).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_ten_steps_of_training_compile_a_few_graphs(form):
    """That the numbers are the same is asserted by the program."""
    seen = compile_and_train(form)
    assert len({tuple(drawn) for drawn in seen["keep_ks"]}) == 10, "each step has other numbers of tokens"
    last = seen["graphs"][-1]
    assert 1 <= last["encoder"] <= 5
    assert 1 <= last["decoder"] <= 5
    # All kinds of step have been seen by then: what is new in the others is keep_k alone.
    assert seen["graphs"][4] == last


@pytest.mark.slow
def test_with_the_default_compiler():
    assert compile_and_train("packed", "inductor", num_steps=3)["graphs"][-1]["decoder"] <= 4

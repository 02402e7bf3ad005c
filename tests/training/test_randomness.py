import random

import numpy as np
import torch
from torch import nn

from flextok.training.random_states import collect_random_states, restore_random_states
from flextok.training.randomness import training_generator


def draw(generator):
    return torch.rand(3, generator=generator).tolist()


def test_a_training_step_draws_the_same_numbers_whatever_came_before():
    place = {"step": 7, "micro_batch": 0, "rank": 0}
    first = draw(training_generator(0, **place))
    torch.rand(100)
    assert draw(training_generator(0, **place)) == first


def test_seed_step_micro_batch_and_rank_all_count():
    place = {"step": 1, "micro_batch": 1, "rank": 1}
    draws = [draw(training_generator(1, **place))]
    draws += [draw(training_generator(1, **{**place, name: 2})) for name in ("step", "micro_batch", "rank")]
    draws.append(draw(training_generator(2, **place)))
    assert len({tuple(values) for values in draws}) == 5


def test_draws_that_python_sees_do_not_wait_for_a_device():
    assert training_generator(0, step=1, micro_batch=0, rank=0).device.type == "cpu"


def test_restored_random_states_repeat_every_generator(tmp_path):
    # Through a file, for what does not load with `weights_only` is of no use.
    torch.save(collect_random_states(), tmp_path / "states.pt")
    expected = [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002
    restore_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert [random.random(), np.random.rand(), torch.rand(()).item()] == expected  # noqa: NPY002


def test_dropout_layers_are_reproducible_by_step():
    from types import SimpleNamespace

    from flextok.training.random_states import RandomStates

    def output(step):
        trainer = SimpleNamespace(global_step=step, global_rank=0, accumulate_grad_batches=1)
        module = SimpleNamespace(device=torch.device("cpu"))
        RandomStates(seed=0).on_train_batch_start(trainer, module, None, 0)
        return nn.Dropout(0.5)(torch.ones(32)).tolist()

    assert output(3) == output(3)
    assert output(3) != output(4)

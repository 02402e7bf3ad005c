"""What the options of `MinRFPipeline` cost and mean, with a model that writes down every call."""

import inspect
import re
from typing import Any

import pytest
import torch

from flextok.flextok_wrapper import FlexTok
from flextok.flow_matching.cfg_utils import MomentumBuffer, normalized_guidance
from flextok.flow_matching.pipelines import MinRFPipeline
from flextok.flow_matching.sampling import APG_MOMENTUM, check_sampling
from tests.support import max_difference, recorded_model

EQUAL, MIXED = ((4, 4),) * 3, ((4, 4), (2, 4), (6, 2))
BATCH = len(EQUAL)
DEFAULTS = {"sampler": "euler", "timestep_shift": 1.0, "guidance_interval": (0.0, 1.0), "guidance_every": 1}


class CountingModel:
    """Velocities that depend on sample, time and condition."""

    device = torch.device("cpu")

    def __init__(self):
        self.batches, self.times = [], []

    @staticmethod
    def velocity(x, t, *, condition, absent):
        return torch.sin(x) * (0.3 if absent else condition) + float(t) * (x if absent else 1 - x.flip(-1))

    def __call__(self, data):
        samples, times = list(data["noised"]), data["times"]
        absent = data.get("eval_dropout_mask", [False] * len(samples))
        assert len(times) == len(data["condition"]) == len(absent) == len(samples)
        self.batches.append(len(samples))
        self.times.append(round(times[0].item(), 6))
        rows = zip(samples, times, data["condition"], absent, strict=True)
        return {**data, "velocity": [self.velocity(x, t, condition=c, absent=a) for x, t, c, a in rows]}


def sample(sizes=EQUAL, **options):
    model = CountingModel()
    keys = {"latents_read_key": "condition", "timesteps_read_key": "times", "noised_images_read_key": "noised"}
    pipeline = MinRFPipeline(model, noise_read_key="noise", reconst_write_key="velocity", out_channels=2, **keys)
    options = {"timesteps": 4, "verbose": False} | options
    return list(pipeline(start(sizes), **options)["velocity"]), model


def start(sizes):
    generator = torch.Generator().manual_seed(2)
    noise = [torch.randn(1, 2, h, w, generator=generator) for h, w in sizes]
    return {"condition": [0.5, -1.0, 2.0], "noise": noise}


def previous(sizes, num_steps, scale, *, apg):
    """The sampler as it was before it had options: Euler, equal steps, guidance always or never."""
    data = start(sizes)
    x, buffers = data["noise"], [MomentumBuffer(APG_MOMENTUM) for _ in sizes]
    for step in range(num_steps, 0, -1):
        t, moved = torch.tensor(step / num_steps), []
        for sample, condition, buffer in zip(x, data["condition"], buffers, strict=True):
            c = CountingModel.velocity(sample, t, condition=condition, absent=False)
            u = CountingModel.velocity(sample, t, condition=condition, absent=True)
            strength = scale(step / num_steps) if callable(scale) else scale
            if scale == 1.0:
                v = c
            elif apg:
                v = normalized_guidance(c, u, strength, momentum_buffer=buffer)
            else:
                v = u + strength * (c - u)
            moved.append(sample + -1.0 / num_steps * v)
        x = moved
    return x


@pytest.mark.parametrize("options", [{}, DEFAULTS], ids=["left out", "given"])
@pytest.mark.parametrize("num_steps", [1, 7, 25])
@pytest.mark.parametrize(
    ("scale", "apg"),
    [(1.0, False), (3.0, False), (7.5, True), (lambda t: 1.5 + t, False), (lambda t: 1.5 + t, True)],
    ids=["off", "plain", "apg", "plain schedule", "apg schedule"],
)
@pytest.mark.parametrize("sizes", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_the_defaults_give_the_previous_bits(sizes, scale, apg, num_steps, options):
    guidance = {"guidance_scale": scale, "perform_norm_guidance": apg}
    actual, model = sample(sizes, timesteps=num_steps, **guidance, **options)
    assert all(map(torch.equal, actual, previous(sizes, num_steps, scale, apg=apg)))
    assert model.batches == [BATCH if scale == 1.0 else 2 * BATCH] * num_steps


# Options, and at which evaluations both branches run.
COSTS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "guidance": ({}, [1, 1, 1, 1]),
    "interval": ({"guidance_interval": (0.3, 0.8)}, [0, 1, 1, 0]),
    "ends of the interval": ({"guidance_interval": (0.25, 0.75)}, [0, 1, 1, 1]),
    "interval without times": ({"guidance_interval": (0.8, 0.9)}, [0, 0, 0, 0]),
    "every 2": ({"guidance_every": 2}, [1, 0, 1, 0]),
    "every 3": ({"guidance_every": 3}, [1, 0, 0, 1]),
    "every 100": ({"guidance_every": 100}, [1, 0, 0, 0]),
    "every 2 in an interval": ({"guidance_every": 2, "guidance_interval": (0.0, 0.8)}, [0, 1, 0, 1]),
    "schedule that becomes 1": ({"guidance_scale": lambda t: 3.0 if t > 0.6 else 1.0}, [1, 1, 0, 0]),
    "schedule of 1": ({"guidance_scale": lambda t: 1.0}, [0, 0, 0, 0]),
    "scale 1": ({"guidance_scale": 1.0}, [0, 0, 0, 0]),
    "scale 1 and the rest": (
        {"guidance_scale": 1.0, "guidance_every": 2, "guidance_interval": (0.2, 0.9)},
        [0, 0, 0, 0],
    ),
    "heun": ({"sampler": "heun"}, [1, 1, 1, 1, 1, 1, 1]),
    "heun, every 2": ({"sampler": "heun", "guidance_every": 2}, [1, 0, 1, 0, 1, 0, 1]),
    # Times 1, 3/4, 3/4, 1/2, 1/2, 1/4, 1/4: both ends of a step are guided for themselves.
    "heun, interval": ({"sampler": "heun", "guidance_interval": (0.6, 0.8)}, [0, 1, 1, 0, 0, 0, 0]),
    "shift, interval": ({"timestep_shift": 3.0, "guidance_interval": (0.0, 0.8)}, [0, 0, 1, 1]),
}


@pytest.mark.parametrize(("options", "guided"), COSTS.values(), ids=COSTS)
@pytest.mark.parametrize("apg", [False, True], ids=["plain", "apg"])
@pytest.mark.parametrize("sizes", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_an_evaluation_runs_both_branches_or_only_the_conditional_one(sizes, apg, options, guided):
    _, model = sample(sizes, **{"guidance_scale": 3.0, "perform_norm_guidance": apg, **options})
    assert model.batches == [BATCH * (1 + both) for both in guided]


@pytest.mark.parametrize("num_steps", [1, 2, 25])
def test_heun_asks_the_model_twice_per_step_but_once_in_the_last(num_steps):
    _, model = sample(timesteps=num_steps, sampler="heun")
    assert len(model.times) == 2 * num_steps - 1
    assert min(model.times) == pytest.approx(1 / num_steps)


def test_the_shift_moves_the_times_the_model_sees():
    _, model = sample(timestep_shift=3.0)
    assert model.times == pytest.approx([1.0, 0.9, 0.75, 0.5])


@pytest.mark.parametrize("apg", [False, True], ids=["plain", "apg"])
@pytest.mark.parametrize("sizes", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_an_interval_is_a_schedule_that_is_one_elsewhere(sizes, apg):
    options = {"perform_norm_guidance": apg, "timesteps": 7}
    interval, _ = sample(sizes, guidance_scale=3.0, guidance_interval=(0.3, 0.8), **options)
    schedule, _ = sample(sizes, guidance_scale=lambda t: 3.0 if 0.3 <= t <= 0.8 else 1.0, **options)
    assert all(map(torch.equal, interval, schedule))
    everywhere, _ = sample(sizes, guidance_scale=3.0, **options)
    assert not any(map(torch.equal, interval, everywhere))


def test_an_interval_without_a_time_of_the_grid_turns_guidance_off():
    off, _ = sample(guidance_scale=3.0, guidance_interval=(0.8, 0.9))
    assert all(map(torch.equal, off, sample()[0]))


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 3.0}], ids=["plain", "guided"])
@pytest.mark.parametrize("sizes", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_heun_with_few_steps_is_closer_to_many_steps(sizes, options):
    def errors(**sampler):
        exact, _ = sample(sizes, timesteps=400, sampler="heun", **options)
        return [max_difference(a, b) for a, b in zip(sample(sizes, **sampler, **options)[0], exact, strict=True)]

    for heun, euler in zip(errors(sampler="heun", timesteps=10), errors(timesteps=19), strict=True):
        assert heun < euler


def test_reused_differences_stay_close_to_fresh_ones():
    fresh, _ = sample(guidance_scale=3.0, timesteps=40)
    reused, _ = sample(guidance_scale=3.0, timesteps=40, guidance_every=2)
    unguided, _ = sample(timesteps=40)
    for a, b, c in zip(fresh, reused, unguided, strict=True):
        assert 0 < max_difference(a, b) < 0.1 * max_difference(a, c)


@pytest.mark.parametrize(
    ("option", "value", "valid"),
    [
        ("sampler", "ddim", "euler, heun"),
        ("sampler", ["euler"], "euler, heun"),
        ("timestep_shift", 0.0, "positive number"),
        ("timestep_shift", -1.0, "positive number"),
        ("timestep_shift", float("inf"), "positive number"),
        ("timestep_shift", float("nan"), "positive number"),
        ("timestep_shift", True, "positive number"),
        ("timestep_shift", "3", "positive number"),
        ("guidance_interval", (0.5,), "0 <= low <= high <= 1"),
        ("guidance_interval", (0.0, 0.5, 1.0), "0 <= low <= high <= 1"),
        ("guidance_interval", (0.8, 0.2), "0 <= low <= high <= 1"),
        ("guidance_interval", (-0.1, 0.5), "0 <= low <= high <= 1"),
        ("guidance_interval", (0.5, 1.1), "0 <= low <= high <= 1"),
        ("guidance_interval", (0.5, float("nan")), "0 <= low <= high <= 1"),
        ("guidance_interval", "01", "0 <= low <= high <= 1"),
        ("guidance_interval", None, "0 <= low <= high <= 1"),
        ("guidance_every", 0, "at least 1"),
        ("guidance_every", -1, "at least 1"),
        ("guidance_every", True, "at least 1"),
        ("guidance_every", 1.5, "at least 1"),
    ],
    ids=str,
)
def test_wrong_options_are_named_with_their_value_and_what_is_valid(option, value, valid):
    message = f"^{re.escape(f'{option}={value!r}')}: valid .*{valid}"
    with pytest.raises(ValueError, match=message):
        check_sampling(**{**DEFAULTS, option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("sampler", "ddim"),
        ("timestep_shift", 0.0),
        ("guidance_interval", (0.8, 0.2)),
        ("guidance_every", 0),
    ],
)
def test_the_pipeline_refuses_wrong_options(option, value):
    with pytest.raises(ValueError, match=f"{option}=.*valid"):
        sample(**{option: value})


@pytest.mark.parametrize("function", [MinRFPipeline.__call__, FlexTok.decode])
def test_the_options_are_named_and_off_by_default(function):
    parameters = inspect.signature(function).parameters
    named = [p for p in parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert {p.name: p.default for p in named} == DEFAULTS


@pytest.mark.parametrize(
    "option",
    [
        {"sampler": "heun"},
        {"timestep_shift": 3.0},
        {"guidance_interval": (0.2, 0.7)},
        {"guidance_every": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpoint", ["tiny_flextok/model.safetensors", "tiny_attn_masked.safetensors"])
def test_each_option_changes_the_images_of_a_tokenizer_and_is_not_ignored(checkpoint, option, recorded_folder, caplog):
    model = recorded_model(checkpoint)

    def images(**options):
        generator = torch.Generator().manual_seed(0)
        ids = [torch.arange(4)[None], torch.arange(9)[None]]
        fixed = {"timesteps": 4, "guidance_scale": 3.0, "vae_image_sizes": 8, "verbose": False}
        return model.detokenize(ids, generator=generator, **fixed, **options)

    changed = images(**option)
    assert torch.isfinite(changed).all()
    assert max_difference(changed, images()) > 1e-5
    assert torch.equal(images(**DEFAULTS), images())
    assert "ignores" not in caplog.text

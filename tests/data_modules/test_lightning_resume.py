"""Lightning stores the position by itself; training goes on with the batches it would have had."""

import pytest

from tests.data_modules.images import photos
from tests.data_modules.recorded_runs import assert_resumes_everywhere, fit

NUM_STEPS = 12  # five steps make an epoch


@pytest.mark.parametrize(
    ("num_workers", "every", "settings"),
    [
        (0, 1, {}),
        (0, None, {}),
        (0, 1, {"limit_train_batches": 3}),
        (0, None, {"limit_train_batches": 3}),
        (0, 1, {"val_check_interval": 2}),
        (0, None, {"max_steps": -1, "max_epochs": 3}),
        (2, 4, {}),
        (2, None, {"limit_train_batches": 3}),
    ],
)
def test_resuming_from_any_checkpoint_gives_the_remaining_batches(tmp_path, num_workers, every, settings):
    settings = {"max_steps": NUM_STEPS, "every": every, **settings}
    assert_resumes_everywhere(tmp_path, lambda: photos(num_workers=num_workers), **settings)


def test_overfit_batches_repeats_the_same_images(tmp_path):
    seen = fit(tmp_path, photos(), every=1, overfit_batches=2, max_steps=6)
    assert seen == seen[:2] * 3

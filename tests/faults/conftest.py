from tests.training.conftest import finished_run

__all__ = ["finished_run"]

"""What the modules about questions and answers load."""

from tests.support import python_output

LIGHT = (
    "items sources webqa myriadlama prompts rewording rewording_examples lemmas matching journal results result_file"
)


def test_questions_and_answers_are_read_without_waiting_for_torch():
    modules = ", ".join(f"flextok.fusion.{name}" for name in [*LIGHT.split(), "language_model"])
    heavy = {"torch", "transformers", "datasets", "pyarrow", "spacy", "hydra", "numpy"}
    assert python_output("-c", f"import sys, {modules}; print(sorted({heavy!r} & set(sys.modules)))").strip() == "[]"

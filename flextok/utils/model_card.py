"""The README of a model on the hub: what it is, how to use it, what was measured and how."""

import json
from collections.abc import Mapping
from math import log2
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

PAPER = "2502.13967"
_PARTS = {"protocol", "results", "vae", "tokens"}


def model_card(
    model: Any, *, metrics: Mapping[str, Any] | str | Path | None = None, license: str | None = None
) -> "ModelCard":
    """The card of a model.

    Args:
        model: A FlexTok.
        metrics: What `eval.py` wrote, or the path of that `metrics.json`; the card then has its table and protocol.
        license: The identifier of a licence as the hub lists them, such as `apache-2.0`.

    Raises:
        ValueError: `metrics` is no file of `eval.py`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    if isinstance(metrics, str | Path):
        metrics = read_metrics(Path(metrics))
    tags = ["flextok", "image-tokenizer", f"arxiv:{PAPER}"]
    data = ModelCardData(library_name="flextok", license=license, tags=tags)
    parts = [_description(model), _USE, _measured(metrics), _licence(license)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def read_metrics(path: Path) -> dict[str, Any]:
    """The content of a `metrics.json`.

    Raises:
        ValueError: The file is missing, damaged, or something else.
    """
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"metrics: {path} cannot be read ({error}); valid: a metrics.json that eval.py wrote"
        ) from error
    if not isinstance(metrics, dict) or not metrics.keys() >= _PARTS:
        raise ValueError(f"metrics: {path} is something else; valid: a metrics.json that eval.py wrote")
    return metrics


def _description(model: Any) -> str:
    bits = model.num_registers * log2(model.regularizer.codebook_size)
    return f"""# A FlexTok tokenizer

Turns an image into an ordered sequence of up to {model.num_registers} discrete tokens, and any prefix of it back
into an image: few tokens give the gist, every further one adds detail
([FlexTok](https://arxiv.org/abs/{PAPER})).

| | |
|---|---|
| tokens | up to {model.num_registers} |
| codebook | {model.regularizer.codebook_size:,} ids |
| bits of an image at full length | {bits:.0f} |
| parameters, encoder | {_num_parameters(model.encoder):,} |
| parameters, decoder | {_num_parameters(model.decoder):,} |"""


_USE = """## Use

```python
import torch
from flextok import FlexTokFromHub

model = FlexTokFromHub.from_pretrained("<this repository, or a folder with its files>")
with torch.no_grad():
    ids = model.tokenize(images)  # [batch, 3, height, width] in [-1, 1] -> one [1, tokens] per image
    latent_size = images.shape[-1] // model.downsample_factor
    few = model.detokenize([i[:, :4] for i in ids], vae_image_sizes=latent_size, timesteps=25)
```"""


def _measured(metrics: Mapping[str, Any] | None) -> str:
    if metrics is None:
        return "## Measured\n\nNothing yet: `python eval.py checkpoint=<the folder> data=<images>` measures it."
    protocol = dict(metrics["protocol"])
    return f"""## Measured

On {protocol.get("num_images")} images of the split `{protocol.get("split")}`:

{_table(metrics)}

`± se` is the standard error of the mean over images. The protocol holds what it takes to get these numbers again:

```json
{json.dumps(protocol, indent=1)}
```"""


def _table(metrics: Mapping[str, Any]) -> str:
    """What `eval.py` prints, in Markdown."""
    from flextok.evaluation.report import table_cells

    header, *rows = table_cells(metrics)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _licence(license: str | None) -> str:
    stated = f"`{license}`" if license else "None was stated: ask whoever published this model before you use it."
    return f"## Licence\n\n{stated}"


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

"""The device that an option names."""

import torch


def pick_device(name: str, *, field: str) -> torch.device:
    """`auto` is the first accelerator, else the CPU; anything else is a torch device name.

    Raises:
        ValueError: the device is not usable here; the message begins with `field`.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{field}={name!r}: not usable here; valid are auto, cpu, cuda, ...") from error
    return device

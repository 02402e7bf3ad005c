"""Finds sizes that give no model, named by the fields of `size`, where the modules could only name their arguments."""

from omegaconf import DictConfig

from flextok.config_fields import integer, is_integer, refuse, setting

KEEP_K_SAMPLING = ("uniform", "pow2", "uniform_pow2")
COUNTS = ("registers", "patch", "encoder_depth", "decoder_depth", "encoder_width", "decoder_width", "head_dim")


def check_sizes(cfg: DictConfig) -> None:
    """Raise `ValueError` for the first size that cannot work."""
    for name in COUNTS:
        integer(cfg, f"size.{name}", minimum=1)
    _check_widths(cfg)
    _check_intermediate_layer(cfg)
    _check_levels(cfg)
    _check_keep_k_sampling(cfg)
    _check_image_size(cfg)


def _check_widths(cfg: DictConfig) -> None:
    head_dim = setting(cfg, "size.head_dim")
    integer(cfg, "mup_base_width", minimum=1)
    for field in ("size.encoder_width", "size.decoder_width", "mup_base_width"):
        width = setting(cfg, field)
        if width is None:
            continue
        if head_dim is not None and width % head_dim:
            refuse(field, width, f"a multiple of size.head_dim={head_dim}")
        if width % 4:
            refuse(field, width, "a multiple of 4 (sine and cosine along both sides of the image)")


def _check_intermediate_layer(cfg: DictConfig) -> None:
    layer, depth = integer(cfg, "size.intermediate_layer", minimum=0), setting(cfg, "size.decoder_depth")
    if layer is not None and depth is not None and layer >= depth:
        numbers = f"0 to {depth - 1}" if depth > 1 else "0"
        refuse("size.intermediate_layer", layer, f"{numbers} (below size.decoder_depth={depth})")


def _check_levels(cfg: DictConfig) -> None:
    levels = setting(cfg, "size.levels")
    if levels is None:
        return
    if not isinstance(levels, list) or not levels or not all(is_integer(level) and level >= 2 for level in levels):
        refuse("size.levels", levels, "a non-empty list of integers of at least 2, such as [8,8,8,5,5,5]")


def _check_keep_k_sampling(cfg: DictConfig) -> None:
    sampling, num_registers = setting(cfg, "size.keep_k_sampling"), setting(cfg, "size.registers")
    if sampling is not None and sampling not in KEEP_K_SAMPLING:
        refuse("size.keep_k_sampling", sampling, ", ".join(KEEP_K_SAMPLING))
    if sampling == "pow2" and num_registers is not None and num_registers & (num_registers - 1):
        others = "uniform and uniform_pow2, or a power of two of registers"
        refuse("size.keep_k_sampling", sampling, f"{others} (size.registers={num_registers})")


def _check_image_size(cfg: DictConfig) -> None:
    size, downsample, patch = (setting(cfg, f) for f in ("data.image_size", "latent.downsample", "size.patch"))
    if size is None or downsample is None or patch is None:
        return
    if size % (downsample * patch):
        factors = f"latent.downsample={downsample} times size.patch={patch}"
        refuse("data.image_size", size, f"a multiple of {downsample * patch} ({factors})")

"""The least time that a request's forwards can take: bytes to be moved and operations to be done,
at the ceilings measured in the same run.
"""

from __future__ import annotations

from race.shapes import BLOCK, Cell, Way


def cache_bytes(config, dtype, cell: Cell, way: Way) -> int:
    """Keys and values of the whole canvas; nothing without a cache."""
    if way.cache == "none":
        return 0
    values = config.num_layers * 2 * config.num_kv_heads * config.head_dim
    return cell.rows * cell.canvas * values * dtype.itemsize


def floors(config, cell: Cell, way: Way, limits: dict | None) -> dict:
    """{"floor_ms_refresh", "floor_ms_step"}: milliseconds of a refresh and of a cached step at the
    limits; nothing without limits, and where a policy makes both differ from block to block.
    """
    if limits is None or not way.whole_refreshes:
        return {}
    weight_size = 1 if way.weights == "fp8" else 2
    cached = way.cache != "none"
    refresh = forward_seconds(
        config, cell, cell.canvas, stores=cached, limits=limits, weight_size=weight_size
    )
    found = {"floor_ms_refresh": 1e3 * refresh, "floor_ms_step": None}
    if cached:
        # A prefix cache's step is over the block and what follows it: on average over the blocks.
        width = (cell.gen_length + BLOCK) / 2 if way.cache == "prefix" else BLOCK
        step = forward_seconds(
            config, cell, width, stores=False, limits=limits, weight_size=weight_size
        )
        found["floor_ms_step"] = 1e3 * step
    return found


def forward_seconds(config, cell: Cell, width, *, stores, limits, weight_size) -> float:
    """The least time of one forward over `width` positions of every row.

    Of the last layer only keys and values are needed outside the block, and the head only in it.
    The keys and values of the other positions are read, and the forward's own stored or not.
    Products with weights of one byte run at twice the speed of bf16's.
    """
    heads, dim, hidden = config.num_heads, config.head_dim, config.hidden_size
    kv = 2 * config.num_kv_heads * dim * hidden
    q_and_out = 2 * heads * dim * hidden
    mlp = 3 * hidden * config.intermediate_size
    layer = kv + q_and_out + mlp
    head = config.vocab_size * hidden
    earlier = config.num_layers - 1

    everywhere = width * (earlier * layer + kv)
    in_block = BLOCK * (layer - kv + head)
    products = 2 * (everywhere + in_block) * weight_size / 2
    attention = 4 * heads * dim * cell.canvas * (earlier * width + BLOCK)
    operations = cell.rows * (products + attention)

    weights = weight_size * (config.num_layers * layer + head)
    a_position = 2 * config.num_layers * 2 * config.num_kv_heads * dim
    positions = cell.canvas - width + (width if stores else 0)
    moved = weights + cell.rows * positions * a_position
    return max(moved / limits["bytes_per_second"], operations / limits["operations_per_second"])

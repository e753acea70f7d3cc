"""The fields of a set: vectors of one width."""

from __future__ import annotations

from torch import Tensor

from embeddings.errors import ConfigError
from trainer.model.ops.precision import full


def count_fields(net: str, width: int, field: int) -> int:
    """How many fields a set of this width has.

    Raises:
        ConfigError: fields of this width do not fit into it, or there is only one.
    """
    if width % field or width < 2 * field:
        raise ConfigError(
            f'model.experts.net = "{net}" cuts a set into fields of model.experts.field = {field}, two at '
            f"least, but the branches give {width} numbers of a set; set field to the width of a table, or "
            "choose another net"
        )
    return width // field


def fields_of(x_ECW: Tensor, count: int, field: int) -> Tensor:
    """[E, C, width] -> [E, C, F, field], of the first columns; in single precision at least."""
    field_ECFK: Tensor = full(x_ECW[..., : count * field]).unflatten(2, (count, field))
    return field_ECFK

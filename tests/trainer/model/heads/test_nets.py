"""The nets of experts against their equations, number by number."""

from __future__ import annotations

import pytest
import torch

from embeddings.errors import ConfigError
from tests.helpers.models import draw, drawing
from trainer.model.heads.expert_settings import ExpertsConfig
from trainer.model.heads.nets.net import Net
from trainer.model.heads.nets.table import EXPERTS

FIELDS, FIELD, BESIDE, CANDIDATES = 3, 4, 2, 5
WIDTH = FIELDS * FIELD + BESIDE


def net_of(name: str) -> tuple[Net, torch.Tensor]:
    """A net of one expert, and what it reads, [1, C, width]."""
    settings = ExpertsConfig(net=name, field=FIELD, crosses=2, maps=(2, 3))
    net = EXPERTS[name].build(settings, 1, WIDTH, FIELDS * FIELD)
    draw(net, drawing(1))
    return net, torch.randn(1, CANDIDATES, WIDTH, generator=drawing(2))


@pytest.mark.parametrize("name", EXPERTS)
def test_a_net_gives_as_many_numbers_as_it_says(name: str) -> None:
    net, x_ECW = net_of(name)
    assert net(x_ECW).shape == (1, CANDIDATES, net.outputs)


def test_a_cross_network_multiplies_onto_what_it_read() -> None:
    """DCNv2: x_{l+1} = x_0 * (W_l x_l + b_l) + x_l."""
    net, x_ECW = net_of("cross")
    for x_0, found in zip(x_ECW[0], net(x_ECW)[0], strict=True):
        x = x_0
        for cross in net.crosses:  # type: ignore[union-attr]
            x = x_0 * (cross.weight[0] @ x + cross.bias[0]) + x
        assert torch.allclose(found, x, atol=1e-5)


def test_fm_adds_the_inner_product_of_every_pair_of_fields() -> None:
    net, x_ECW = net_of("fm")
    for x, found in zip(x_ECW[0], net(x_ECW)[0], strict=True):
        fields = [x[f * FIELD : (f + 1) * FIELD] for f in range(FIELDS)]
        products = [fields[i] @ fields[j] for i in range(FIELDS) for j in range(i + 1, FIELDS)]
        assert torch.allclose(found, torch.cat([x, torch.stack(products)]), atol=1e-6)


def test_cin_multiplies_every_map_by_every_field_element_by_element() -> None:
    """xDeepFM: X^k_h = sum_ij W^k_hij (X^{k-1}_i * X^0_j), summed up over elements."""
    net, x_ECW = net_of("cin")
    for x, found in zip(x_ECW[0], net(x_ECW)[0], strict=True):
        fields = [x[f * FIELD : (f + 1) * FIELD] for f in range(FIELDS)]
        maps, pooled = fields, []
        for layer in net.layers:  # type: ignore[union-attr]
            weight, after = layer.weight[0].view(-1, len(maps), FIELDS), []
            for h in range(len(weight)):
                pairs = [(i, j) for i in range(len(maps)) for j in range(FIELDS)]
                terms = [weight[h, i, j] * maps[i] * fields[j] for i, j in pairs]
                after.append(torch.stack(terms).sum(0) + layer.bias[0, h])
            maps = after
            pooled += [each.sum() for each in maps]
        assert torch.allclose(found, torch.cat([x, torch.stack(pooled)]), atol=1e-4)


@pytest.mark.parametrize("name", ["fm", "cin"])
@pytest.mark.parametrize("width", [10, 4])
def test_a_set_that_cannot_be_cut_into_fields_is_refused(name: str, width: int) -> None:
    with pytest.raises(
        ConfigError, match=rf'"{name}" cuts a set into fields of model.experts.field = 4, .* {width} '
    ):
        EXPERTS[name].build(ExpertsConfig(net=name, field=4), 1, width, width)

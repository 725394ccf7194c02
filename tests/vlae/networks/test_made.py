"""A MADE depends on exactly the inputs that it should, over vectors and maps, and is inverted."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vlae.networks.made import MADE, MapMADE

Randomize = Callable[..., None]
Shape = tuple[int, int, int]

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
BLIND_SPOT = (1, 3, 9)  # wide enough that layers miss positions on either side


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def jacobians(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """d function / d point at each point: (points, *outputs, size)."""
    return torch.stack([torch.autograd.functional.jacobian(function, point) for point in points])


def positive(made: MADE | MapMADE) -> MADE | MapMADE:
    """Set all weights to a positive value.

    With positive inputs no ReLU is zero and no two paths cancel, so every connection has a
    gradient above 0.
    """
    with torch.no_grad():
        for parameter in made.double().parameters():
            parameter.fill_(0.1)
    return made


def earlier(shape: Shape, num_layers: int | None = None) -> Tensor:
    """Whether output i may depend on input j, both in the flat vector of the maps.

    With ``num_layers``, whether that many 3x3 layers also reach it.
    """
    channels, height, width = shape
    channel, row, column = (
        grid.flatten()
        for grid in torch.meshgrid(
            torch.arange(channels), torch.arange(height), torch.arange(width), indexing="ij"
        )
    )
    position = row * width + column
    own = (position[:, None] == position) & (channel[:, None] > channel)
    before = position[:, None] > position
    if num_layers is not None:
        up, right = row[:, None] - row, column - column[:, None]
        before &= (up <= num_layers) & (right >= -num_layers) & (right <= up)
    return own | before


def naive_inverse(
    made: MADE | MapMADE, noise: Tensor, step: Callable[..., Tensor], context: Tensor | None
) -> Tensor:
    """x = step(noise, forward(x)), repeated once for each element."""
    x = torch.zeros_like(noise)
    for _ in range(noise.shape[-1]):
        x = step(noise, made(x, context))
    return x


def mix(noise: Tensor, outputs: Tensor) -> Tensor:
    """A step in which every output has a different effect."""
    return noise + sum(torch.sin((k + 1) * outputs[..., k, :]) for k in range(outputs.shape[-2]))


@given(
    st.integers(1, 7),
    st.integers(0, 20),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([0, 2]),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_an_output_of_made_has_zero_gradient_from_its_own_and_later_inputs(
    randomize: Randomize, size: int, extra: int, outputs: int, layers: int, context: int
) -> None:
    made = MADE(size, outputs, size + extra, layers, context).double()
    randomize(made, seed=extra)
    features = normal(context) if context else None
    jacobian = jacobians(lambda x: made(x, features), normal(4, size))
    assert jacobian.shape == (4, outputs, size, size)
    assert not jacobian[:, :, ~earlier((size, 1, 1))].any()


@given(
    st.integers(1, 7),
    st.integers(0, 20),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([0, 2]),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_an_output_of_made_depends_on_all_earlier_inputs_and_on_the_context(
    size: int, extra: int, outputs: int, layers: int, context: int
) -> None:
    fewest = size if context else max(1, size - 1)
    made = positive(MADE(size, outputs, fewest + extra, layers, context))
    ones = torch.ones(1, size, dtype=torch.float64)
    features = torch.ones(context, dtype=torch.float64) if context else None
    jacobian = jacobians(lambda x: made(x, features), ones)
    assert torch.equal(jacobian[0] > 0, earlier((size, 1, 1)).expand(outputs, -1, -1))
    if features is not None:
        assert (jacobians(lambda said: made(ones[0], said), features[None]) > 0).all()


@given(SHAPES, st.integers(0, 5), st.integers(1, 2), st.integers(1, 2), st.sampled_from([0, 2]))
@example(BLIND_SPOT, 0, 1, 1, 0)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_an_output_over_maps_has_zero_gradient_from_its_own_and_later_inputs(
    randomize: Randomize, shape: Shape, extra: int, outputs: int, layers: int, context: int
) -> None:
    made = MapMADE(shape, outputs, shape[0] + extra, layers, context).double()
    randomize(made, seed=extra)
    size = earlier(shape).shape[0]
    maps = normal(context * shape[1] * shape[2], seed=1) if context else None
    jacobian = jacobians(lambda x: made(x, maps), normal(2, size))
    assert jacobian.shape == (2, outputs, size, size)
    assert not jacobian[:, :, ~earlier(shape)].any()


@given(SHAPES, st.integers(0, 5), st.integers(1, 2), st.integers(1, 2))
@example(BLIND_SPOT, 0, 1, 1)
@example(BLIND_SPOT, 0, 2, 2)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_an_output_over_maps_depends_on_exactly_the_inputs_that_its_layers_reach(
    shape: Shape, extra: int, outputs: int, layers: int
) -> None:
    made = positive(MapMADE(shape, outputs, shape[0] + extra, layers))
    expected = earlier(shape, num_layers=layers + 1)
    jacobian = jacobians(made, torch.ones(1, len(expected), dtype=torch.float64))
    assert torch.equal(jacobian[0] > 0, expected.expand(outputs, -1, -1))


def test_an_output_over_maps_depends_on_the_context_at_its_position_and_those_it_sees() -> None:
    made = positive(MapMADE((2, 3, 6), 2, 4, layers=1, context=2))
    x, maps = torch.ones(36, dtype=torch.float64), torch.ones(36, dtype=torch.float64)
    jacobian = jacobians(lambda said: made(x, said), maps[None])
    # The context enters after the taps of the first layer, so one layer fewer carries it to other
    # positions.
    seen = earlier((1, 3, 6), num_layers=1) | torch.eye(18, dtype=torch.bool)
    assert torch.equal(jacobian[0] > 0, seen.repeat(2, 2).expand(2, -1, -1))


def test_the_blind_spot_of_maps_is_far_to_the_right_in_the_rows_above() -> None:
    """Three layers at row 2, column 4 of 3 x 9 positions.

    They see columns 1 to 5 of the row above, and columns 1 to 6 of the row above that.
    """
    reached = earlier(BLIND_SPOT, num_layers=3)[2 * 9 + 4].unflatten(0, (3, 9)).int().tolist()
    assert reached == [
        [0, 1, 1, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0, 0, 0],
    ]


@given(
    st.integers(1, 8),
    st.integers(0, 12),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([0, 3]),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_solving_a_vector_gives_the_naive_fixed_point(
    randomize: Randomize, size: int, extra: int, outputs: int, layers: int, context: int
) -> None:
    made = MADE(size, outputs, size + extra, layers, context).double()
    randomize(made, seed=extra)
    noise, features = normal(5, size), normal(5, context, seed=1) if context else None
    expected = naive_inverse(made, noise, mix, features)
    torch.testing.assert_close(made.solve(noise, mix, features), expected, rtol=1e-10, atol=1e-10)


@given(SHAPES, st.integers(0, 5), st.integers(1, 2), st.integers(1, 3), st.sampled_from([0, 3]))
@example(BLIND_SPOT, 2, 2, 2, 1)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_solving_maps_by_wavefronts_gives_the_naive_fixed_point(
    randomize: Randomize, shape: Shape, extra: int, outputs: int, layers: int, context: int
) -> None:
    made = MapMADE(shape, outputs, shape[0] + extra, layers, context).double()
    randomize(made, seed=extra)
    noise = normal(3, shape[0] * shape[1] * shape[2])
    maps = normal(3, context * shape[1] * shape[2], seed=1) if context else None
    expected = naive_inverse(made, noise, mix, maps)
    torch.testing.assert_close(made.solve(noise, mix, maps), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("made", "size"), [(MADE(9, 2, 16), 9), (MapMADE((3, 4, 5), 2, 8), 60)], ids=["vector", "maps"]
)
def test_solving_takes_no_more_arithmetic_than_a_forward_pass(
    made: MADE | MapMADE, size: int
) -> None:
    made.double()
    noise = normal(7, size)
    with FlopCounterMode(display=False) as forward:
        made(noise)
    with FlopCounterMode(display=False) as solve:
        made.solve(noise, mix)
    assert 0 < solve.get_total_flops() <= forward.get_total_flops()


@pytest.mark.parametrize(
    "made", [MADE(5, 2, 7, 2, 3), MapMADE((2, 2, 3), 2, 5, 2, 1)], ids=["vector", "maps"]
)
def test_gradients_agree_with_finite_differences(
    randomize: Randomize, made: MADE | MapMADE
) -> None:
    made.double()
    randomize(made)
    size, context = (5, 3) if isinstance(made, MADE) else (12, 6)
    x, said = normal(2, size).requires_grad_(), normal(2, context, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(made, (x, said))
    assert torch.autograd.gradcheck(lambda x, said: made.solve(x, mix, said), (x, said))
    weights = [made.hidden[0].weight, made.hidden[1].weight, made.head.weight, made.head.bias]
    assert torch.autograd.gradcheck(lambda *_: made(x, said), weights)


@pytest.mark.parametrize(("size", "hidden"), [(4, 2), (16, 14), (32, 8)])
def test_too_few_hidden_units_are_an_error(size: int, hidden: int) -> None:
    with pytest.raises(ValueError, match=str(hidden)):
        MADE(size, 2, hidden)


def test_a_context_or_maps_need_one_more_hidden_unit_for_the_first_output() -> None:
    MADE(4, 2, 3)
    with pytest.raises(ValueError, match="at least 4 hidden units, not 3"):
        MADE(4, 2, 3, context=1)
    with pytest.raises(ValueError, match="at least 4 hidden units, not 3"):
        MapMADE((4, 2, 2), 2, 3)

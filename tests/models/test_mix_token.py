import math

import pytest
import torch

from models.mix_token import TokenBox, TokenExchange, draw_box, exchange_tokens, mix_labels


def exchange(box: TokenBox) -> TokenExchange:
    """Return the exchange of a box on a grid of 4."""
    return box.exchange_on(4, torch.device("cpu"))


def test_a_box_is_scaled_by_integer_division() -> None:
    box = TokenBox(14, 3, 11, 2, 9)
    assert box.on_grid(10) == TokenBox(10, 2, 7, 1, 6)
    assert box.on_grid(8) == TokenBox(8, 1, 6, 1, 5)
    assert box.on_grid(14) == box
    assert box.share_outside == pytest.approx(1 - 56 / 196)


def test_boxes_depend_only_on_seed_and_step() -> None:
    first = [draw_box(14, 3, step) for step in range(50)]
    torch.manual_seed(99)
    assert first == [draw_box(14, 3, step) for step in range(50)]
    assert first != [draw_box(14, 4, step) for step in range(50)]


def test_boxes_have_the_distribution_of_cutmix() -> None:
    boxes = [draw_box(14, 0, step) for step in range(4000)]
    sizes = {(box.bottom - box.top, box.right - box.left) for box in boxes}
    assert all(0 <= box.top <= box.bottom <= 14 and 0 <= box.left <= box.right <= 14 for box in boxes)
    assert {rows for rows, _ in sizes} == set(range(13))  # half the side, 13 at most, is rounded down to 6
    whole = [box.bottom - box.top for box in boxes if 0 < box.top <= box.bottom < 14]
    assert {rows % 2 for rows in whole} == {0}  # half to either side of the centre, if the edges cut nothing off
    # The side is int(14 * sqrt(u)) rounded down to even, u uniform: 0 where u < (2 / 14)**2.
    empty = sum(box.top == box.bottom for box in boxes if 0 < box.top < 14) / len(boxes)
    assert empty == pytest.approx((2 / 14) ** 2 * 13 / 14, abs=0.01)
    # A row in the middle is covered if the centre is within half the side of it: for `side` of 14 centres.
    shares = {side: ((side + 2) / 14) ** 2 - (side / 14) ** 2 for side in range(0, 14, 2)}
    expected = sum(share * side / 14 for side, share in shares.items())
    assert sum(box.top <= 7 < box.bottom for box in boxes) / len(boxes) == pytest.approx(expected, abs=0.03)


def test_images_exchange_the_tokens_of_a_box_with_the_batch_in_reverse_order() -> None:
    tokens = (100 * torch.arange(3).view(3, 1, 1) + torch.arange(16).view(1, 16, 1)).expand(3, 16, 2)
    mixed = exchange_tokens(tokens, exchange(TokenBox(8, 2, 5, 4, 8)))  # on a grid of 4: row 1, columns 2 and 3
    for image in range(3):
        for place in range(16):
            source = 2 - image if place in (6, 7) else image
            assert mixed[image, place].tolist() == [100 * source + place] * 2
    assert torch.equal(exchange_tokens(mixed, exchange(TokenBox(8, 2, 5, 4, 8))), tokens)


def test_an_empty_box_exchanges_nothing_and_a_full_box_everything() -> None:
    tokens, labels = torch.randn(3, 16, 2), torch.rand(3, 5)
    assert torch.equal(exchange_tokens(tokens, exchange(TokenBox(4, 2, 2, 0, 4))), tokens)
    assert torch.equal(mix_labels(labels, exchange(TokenBox(4, 2, 2, 0, 4))), labels)
    assert torch.equal(exchange_tokens(tokens, exchange(TokenBox(4, 0, 4, 0, 4))), tokens.flip(0))
    assert torch.equal(mix_labels(labels, exchange(TokenBox(4, 0, 4, 0, 4))), labels.flip(0))


def test_labels_are_mixed_by_the_share_of_tokens_that_the_box_covers_on_its_own_grid() -> None:
    labels = torch.eye(3)
    mixed = mix_labels(labels, exchange(TokenBox(4, 0, 2, 1, 3)))  # a quarter
    assert mixed.tolist() == [[0.75, 0.0, 0.25], [0.0, 1.0, 0.0], [0.25, 0.0, 0.75]]
    assert math.isclose(TokenBox(4, 0, 2, 1, 3).share_outside, 0.75)

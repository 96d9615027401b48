"""Further views of images."""

import torch

from tpvprune.repairs.views import Views


def images(num=7, height=9, width=12):
    return torch.rand(num, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_one_view_is_the_input_whatever_its_shape():
    x = torch.rand(6, 4)
    views = Views(x.split(4), 1, 0)
    assert torch.equal(torch.cat(list(views)), x)
    assert views.num_images == 6


def test_every_image_is_followed_by_its_mirror_image_and_parts_of_it():
    x = images()
    views = torch.cat(list(Views([x], 5, 0))).unflatten(0, (7, 5))
    assert torch.equal(views[:, 0], x)
    assert torch.equal(views[:, 1], x.flip(3))
    # A plane keeps its slope where a part is enlarged: by 1 to 1 / sqrt(0.5), to either side.
    rows, columns = torch.arange(20.0), torch.arange(30.0)
    plane = torch.stack([rows[:, None] + 0 * columns, 0 * rows[:, None] + columns])
    parts = torch.cat(list(Views([plane.expand(200, 2, 20, 30)], 3, 0)))[2::3]
    down = (parts[:, 0, 12] - parts[:, 0, 8]).mean(1) / 4
    right = (parts[:, 1, :, 18] - parts[:, 1, :, 12]).mean(1) / 6
    assert ((down > 0.69) & (down <= 1.0001)).all()
    assert ((right.abs() > 0.69) & (right.abs() <= 1.0001)).all()
    assert 0.3 < float((right < 0).float().mean()) < 0.7
    inside = parts[:, 0].amax((1, 2)) - parts[:, 0].amin((1, 2))
    assert (inside <= 19).all()
    assert down.std() > 0.02
    assert parts[:, 0, 0, 0].std() > 0.5


def test_views_do_not_depend_on_how_images_are_cut_into_chunks_and_stay():
    x = images()
    wanted = torch.cat(list(Views([x], 4, 3)))
    for size in (1, 2, 3, 7):
        views = Views(x.split(size), 4, 3)
        assert torch.equal(torch.cat(list(views)), wanted)
        assert torch.equal(torch.cat(views[:]), wanted)
        sizes = [b - a for a, b in zip(views.starts, views.starts[1:], strict=False)]
        assert sizes == [len(chunk) for chunk in views]
        assert torch.equal(views[-1], wanted[-len(views[-1]) :])
    assert not torch.equal(torch.cat(list(Views([x], 4, 4))), wanted)

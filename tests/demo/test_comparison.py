"""The comparison picture: every pixel where it belongs, names that fit, mismatches refused."""

import io

import numpy as np
import pytest
import torch
from dit_quant.demo.comparison import (
    ENLARGE,
    FRAME,
    GAP,
    LABEL,
    MARGIN,
    NAME_LINES,
    Row,
    comparison_picture,
    enlarged,
    png,
    wrap,
)
from PIL import Image, ImageFont

NAMES = ["dog", "face with tears of joy", "smiling face with heart shaped eyes and a hat"]


def rows(count=3, columns=3):
    generator = torch.Generator().manual_seed(0)
    return [Row(f"row {i}", ("8.1 bits",), torch.rand(columns, 3, 32, 32, generator=generator)) for i in range(count)]


def as_bytes(picture):
    return (picture * 255).round().byte().permute(1, 2, 0).numpy()


def test_every_pixel_becomes_a_square():
    picture = torch.rand(3, 5, 7)
    big = np.asarray(enlarged(picture))
    assert np.array_equal(big, as_bytes(picture).repeat(ENLARGE, axis=0).repeat(ENLARGE, axis=1))


def test_out_of_range_is_clamped_not_wrapped():
    assert np.asarray(enlarged(torch.full((3, 1, 1), 1.2))).min() == 255
    assert np.asarray(enlarged(torch.full((3, 1, 1), -0.2))).max() == 0


def test_pictures_stand_in_rows_and_columns():
    parts = rows()
    canvas = np.asarray(comparison_picture(parts, NAMES, "caption"))
    side = 32 * ENLARGE
    pitch = side + 2 * FRAME + GAP
    wanted = [[np.asarray(enlarged(picture)) for picture in row.pictures] for row in parts]
    x = MARGIN + LABEL + FRAME
    # the head's height depends on the names: find the first picture, then all others follow from it
    top = next(
        y for y in range(canvas.shape[0] - side) if np.array_equal(canvas[y : y + side, x : x + side], wanted[0][0])
    )
    for i, row in enumerate(wanted):
        for j, picture in enumerate(row):
            y0, x0 = top + i * pitch, x + j * pitch
            assert np.array_equal(canvas[y0 : y0 + side, x0 : x0 + side], picture), (i, j)
            # the white frame is as wide on every side, the paper begins behind it
            for line in (canvas[:, x0 + side // 2], canvas[y0 + side // 2]):
                near = y0 if line.shape[0] == canvas.shape[0] else x0
                assert (line[near - FRAME + 1 : near] == 255).all()
                assert (line[near + side : near + side + FRAME - 1] == 255).all()
                assert (line[near - FRAME - 1] != 255).any()
                assert (line[near + side + FRAME] != 255).any()


def test_text_is_drawn_and_shows_the_names():
    parts = rows()
    plain, renamed = (np.asarray(comparison_picture(parts, names, "c")) for names in (NAMES, ["cat", *NAMES[1:]]))
    assert plain.shape == renamed.shape
    assert not np.array_equal(plain, renamed)
    assert not np.array_equal(plain, np.asarray(comparison_picture(parts, NAMES, "other")))
    relabelled = [Row("another", row.details, row.pictures) for row in parts]
    assert not np.array_equal(plain, np.asarray(comparison_picture(relabelled, NAMES, "c")))


@pytest.mark.parametrize("width", [40, 80, 140, 1000])
def test_names_are_wrapped(width):
    font = ImageFont.load_default(15)
    for name in NAMES:
        lines = wrap(name, font, width)
        assert 1 <= len(lines) <= NAME_LINES
        text = " ".join(lines)
        assert text == name or (text.endswith(" ...") and name.startswith(text.removesuffix(" ...")))
        assert all(font.getlength(line) <= width for line in lines[:-1] if " " in line)


def test_missing_pictures_are_refused():
    with pytest.raises(ValueError, match="'row 0' has 3 pictures for 2 prompts"):
        comparison_picture(rows(), NAMES[:2], "")


def test_png_is_lossless():
    image = comparison_picture(rows(1, 1), NAMES[:1], "caption")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(image)))), np.asarray(image))

"""The comparison picture: one row per model, one column per prompt, all from the same seeds."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ENLARGE = 4
GAP = 10
MARGIN = 24
FRAME = 6  # white border of a picture
LABEL = 172
LINE = 20
NAME_LINES = 3
PAPER, TILE, EDGE, INK, FAINT = "#f4f5f7", "#ffffff", "#dfe2e7", "#1d2129", "#69707d"
TITLE_SIZE, DETAIL_SIZE, NAME_SIZE = 20, 14, 15


@dataclass(frozen=True)
class Row:
    """pictures [B, 3, h, w] in 0..1; title and details stand to their left."""

    title: str
    details: tuple[str, ...]
    pictures: Tensor


def comparison_picture(rows: Sequence[Row], names: Sequence[str], caption: str) -> Image.Image:
    """rows x len(names) pictures, enlarged by a whole factor so that every pixel stays a square."""
    for row in rows:
        if len(row.pictures) != len(names):
            raise ValueError(f"row {row.title!r} has {len(row.pictures)} pictures for {len(names)} prompts")
    height, width = (side * ENLARGE + 2 * FRAME for side in rows[0].pictures.shape[-2:])
    name_font, caption_font = ImageFont.load_default(NAME_SIZE), ImageFont.load_default(DETAIL_SIZE)
    wrapped = [wrap(name, name_font, width) for name in names]
    head = max(map(len, wrapped)) * LINE + GAP
    left = MARGIN + LABEL
    canvas = Image.new(
        "RGB",
        (left + len(names) * (width + GAP) - GAP + MARGIN, MARGIN + head + len(rows) * (height + GAP) + LINE + MARGIN),
        PAPER,
    )
    pen = ImageDraw.Draw(canvas)
    for column, lines in enumerate(wrapped):
        centre = left + column * (width + GAP) + width / 2
        top = MARGIN + head - GAP - len(lines) * LINE
        for i, line in enumerate(lines):
            pen.text((centre, top + i * LINE), line, fill=INK, font=name_font, anchor="ma")
    for i, row in enumerate(rows):
        top = MARGIN + head + i * (height + GAP)
        _label(pen, row, MARGIN, top + height // 2)
        for column, picture in enumerate(row.pictures):
            x = left + column * (width + GAP)
            pen.rounded_rectangle((x, top, x + width - 1, top + height - 1), radius=10, fill=TILE, outline=EDGE)
            canvas.paste(enlarged(picture), (x + FRAME, top + FRAME))
    pen.text((left, canvas.height - MARGIN), caption, fill=FAINT, font=caption_font, anchor="lb")
    return canvas


def _label(pen: ImageDraw.ImageDraw, row: Row, x: int, middle: int) -> None:
    """Title and details, together centred on `middle`."""
    y = middle - (TITLE_SIZE + 8 + len(row.details) * LINE) // 2
    pen.text((x, y), row.title, fill=INK, font=ImageFont.load_default(TITLE_SIZE))
    for i, line in enumerate(row.details):
        pen.text((x, y + TITLE_SIZE + 8 + i * LINE), line, fill=FAINT, font=ImageFont.load_default(DETAIL_SIZE))


def enlarged(picture: Tensor) -> Image.Image:
    """[3, h, w] in 0..1 -> picture of ENLARGE times the size, nearest neighbour."""
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(np.ascontiguousarray(pixels), "RGB")
    return image.resize((image.width * ENLARGE, image.height * ENLARGE), Image.Resampling.NEAREST)


def wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Words broken into at most NAME_LINES lines of `width`; what does not fit ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > NAME_LINES:
        lines = [*lines[: NAME_LINES - 1], f"{lines[NAME_LINES - 1]} ..."]
    return lines


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()

"""contact_sheet.png of stage 01: look at it before training on anything."""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.images import read_image, write_png


def rows_of(groups: list[dict], rows: int = 8) -> list[dict]:
    """The groups that the sheet shows: evenly spaced."""
    return [groups[i] for i in np.unique(np.linspace(0, len(groups) - 1, rows).astype(int))]


def contact_sheet(folder: Path, groups: list[dict]) -> None:
    """PNG, a row per group: LR, HR, candidates with method, strength, rank (1 = best) and score per axis."""
    chosen = rows_of(groups)
    cell, text, gap = 160, 84, 6                                               # px
    width = (2 + len(groups[0]["candidates"])) * (cell + gap) + gap
    sheet = Image.new("RGB", (width, len(chosen) * (cell + text) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, group in enumerate(chosen):
        kind = group["degradation"].get("kind", "")
        cells = [(group["lr"], f"LR  {group['id']}\n{group['source'][-22:]}\n{kind}")]
        cells += [(group["hr"], "HR")] if group["hr"] else []
        for index, candidate in enumerate(group["candidates"]):
            lines = [candidate["method"]]
            lines += [f"strength {candidate['strength']:.2f}"] if "strength" in candidate else []
            for axis, label in group["labels"].items():
                score = f"  ({label['scores'][index]:.2f})" if label.get("scores") else ""      # people give ranks only
                lines.append(f"{axis} {label['ranks'][index]}{score}")
            cells.append((candidate["path"], "\n".join(lines)))
        for column, (path, caption) in enumerate(cells):
            x, y = gap + column * (cell + gap), gap + row * (cell + text)
            tile = Image.fromarray(read_image(folder / path)).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(tile, (x, y))
            draw.multiline_text((x, y + cell), caption, fill="black", font=font, spacing=0)
    write_png(folder / "contact_sheet.png", np.array(sheet))

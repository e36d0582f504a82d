"""Files of figures, PNG, SVG and CSV, and the HTML page that holds them."""

import base64
import csv
import html
import io
from collections.abc import Callable
from typing import NamedTuple

import matplotlib

from train import metrics
from train.drawn import style

PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{font: 15px/1.5 sans-serif; max-width: 76em; margin: 1.5em auto;
  padding: 0 1em; color: #222; background: #fff}}
main {{columns: 2 33em; column-gap: 2em}}
section {{break-inside: avoid; margin-bottom: 2em}}
h2 {{font-size: 1.1em; margin: 0 0 0.4em}}
img {{width: 100%; height: auto}}
pre {{background: #f4f4f4; padding: 1em; overflow-x: auto}}
</style>
<h1>{title}</h1>
{intro}
<main>
{sections}
</main>
</html>
"""


class Entry(NamedTuple):
  """A figure.

  Attributes:
    name: of its files.
    title: of its section.
    read: how to read it, a sentence or two.
    rows: gives its numbers: dicts with the same keys; or says why there are
      none, in a string.
    draw: makes a picture of the rows.
  """

  name: str
  title: str
  read: str
  rows: Callable
  draw: Callable


def add(folder, entry, *arguments):
  """Writes the files of a figure, and returns its section of the page.

  Args:
    folder: where they go.
    entry: an `Entry`.
    *arguments: of its `rows`.
  """
  rows = entry.rows(*arguments)
  title = html.escape(entry.title)
  if isinstance(rows, str):
    return (
      f'<section><h2>{title}</h2><p>Not drawn: {html.escape(rows)}.</p>'
      '</section>'
    )
  write_csv(folder / f'{entry.name}.csv', rows)
  with matplotlib.rc_context(style.STYLE):
    figure = entry.draw(rows)
    figure.savefig(folder / f'{entry.name}.svg', metadata={'Date': None})
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=200)
  (folder / f'{entry.name}.png').write_bytes(buffer.getvalue())
  image = base64.b64encode(buffer.getvalue()).decode()
  files = ' '.join(
    f'<a href="{entry.name}.{kind}">{kind.upper()}</a>'
    for kind in ('png', 'svg', 'csv')
  )
  return (
    f'<section><h2>{title}</h2>\n<img alt="{title}" '
    f'src="data:image/png;base64,{image}">\n'
    f'<p>{html.escape(entry.read)} {files}</p></section>'
  )


def write_csv(path, rows):
  """Writes rows, dicts with the same keys; None is an empty field."""
  text = io.StringIO()
  writer = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  metrics.replace(path, text.getvalue())


def write(path, title, intro, sections):
  """Writes the page.

  Args:
    path: of the file.
    title: its title.
    intro: what comes first, as HTML.
    sections: what `add` returned.
  """
  metrics.replace(
    path,
    PAGE.format(
      title=html.escape(title), intro=intro, sections='\n'.join(sections)
    ),
  )

"""What all figures share: colours, lines, and the names of the axes."""

import itertools

import numpy as np
from matplotlib import colors
from matplotlib.figure import Figure

from train import plots

# Of a column of the page: at this width text is legible on a phone too.
WIDE = 5.2
STYLE = plots.STYLE | {
  'font.size': 9,
  'legend.fontsize': 8,
  'axes.titlesize': 9,
  'svg.fonttype': 'none',
  'svg.hashsalt': 'dsatgo_jax',
}
# Of Okabe and Ito: told apart by the colour-blind; and by what comes with them
# where they are printed in grey.
COLOURS = (
  '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000',
)  # fmt: skip
LINES = (
  '-',
  '--',
  '-.',
  ':',
  (0, (5, 1, 1, 1, 1, 1)),
  (0, (1, 1)),
  (0, (8, 2)),
)
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')
HATCHES = ('', '////', '....', 'xxxx', '\\\\\\\\', '++++', 'oooo')
PAPER = {'color': '0.35', 'linewidth': 1, 'zorder': 1}  # Its own values.


def looks(names):
  """Returns `{name: {colour, line, marker, hatch}}`, in the order of names."""
  kinds = zip(COLOURS, LINES, MARKERS, HATCHES, strict=True)
  return {
    name: dict(
      zip(('color', 'linestyle', 'marker', 'hatch'), kind, strict=True)
    )
    for name, kind in zip(names, itertools.cycle(kinds), strict=False)
  }


def line(look):
  """The keywords of a line."""
  return {'markersize': 3.5, 'linewidth': 1.4} | {
    name: look[name] for name in ('color', 'linestyle', 'marker')
  }


def bar(look):
  """The keywords of a bar."""
  return {
    'color': look['color'],
    'hatch': look['hatch'],
    'edgecolor': 'white',
    'linewidth': 0.5,
  }


def values(rows, name):
  """The different values of a column, in their order."""
  return list(dict.fromkeys(row[name] for row in rows))


def where(rows, **known):
  """The rows with these values."""
  return [
    row
    for row in rows
    if all(row[name] == value for name, value in known.items())
  ]


def column(rows, name):
  """A column as an array, None as NaN."""
  return np.array([row[name] for row in rows], float)


def panels(count, columns, height, width=WIDE, **settings):
  """A figure of so many panels, and their axes; the others are left out.

  Args:
    count: of panels.
    columns: at most.
    height: of a panel, in inches.
    width: of the figure, in inches.
    **settings: of `Figure.subplots`.
  """
  columns = min(columns, count)
  rows = -(-count // columns)
  figure = Figure(figsize=(width, 0.45 + height * rows))
  axes = figure.subplots(rows, columns, squeeze=False, **settings)
  for axis in axes.flat[count:]:
    axis.set_axis_off()
  for axis in axes.flat[max(0, count - columns) : count]:
    axis.tick_params(labelbottom=True)  # The lowest one of its column.
  return figure, axes.flat[:count]


def legend(figure, axis, columns=3):
  """A legend above all panels."""
  # The paper's own last.
  told = sorted(
    zip(*axis.get_legend_handles_labels(), strict=True),
    key=lambda one: one[1].startswith(('paper', 'Theorem')),
  )
  figure.legend(
    *zip(*told, strict=True),
    loc='outside upper center',
    ncols=columns,
    frameon=False,
  )


def timesteps(axis, num_steps):
  """Names the timesteps, 1 to T, on the axis below."""
  every = -(-num_steps // 10)
  axis.set_xticks(range(1, num_steps + 1, every))
  axis.set_xlabel('timestep')


def table(axis, cells, rows, columns, form='{:.0f}', norm=None):
  """Draws numbers as a coloured table, each written into its cell.

  Args:
    axis: to draw on.
    cells: [rows, columns]; NaN for none.
    rows: their names, the first on top.
    columns: their names.
    form: of a number.
    norm: of the colours; None for a linear one.
  """
  cells = np.asarray(cells, float)
  image = axis.imshow(
    np.ma.masked_invalid(cells), aspect='auto', cmap='viridis',
    norm=norm or colors.Normalize(np.nanmin(cells), np.nanmax(cells)),
  )  # fmt: skip
  if cells.shape[1] <= 10:
    size = 7 if cells.shape[1] <= 6 else 5.5
    for (row, number), value in np.ndenumerate(cells):
      dark = image.norm(value) <= 0.5
      if np.isfinite(value):
        axis.text(
          number, row, form(value) if callable(form) else form.format(value),
          color='white' if dark else 'black', fontsize=size, ha='center',
          va='center',
        )  # fmt: skip
  axis.set_xticks(range(len(columns)), columns)
  axis.set_yticks(range(len(rows)), rows, fontsize=7)
  axis.grid(False)
  return image

"""What docs/findings.md counts that no other command does."""

import pathlib

from absl import flags

RUNS = flags.DEFINE_multi_string(
  'runs', None, 'A folder of runs seed_0, seed_1 and so on, as often as wanted.'
)


def seeds(folder):
  """Returns `{seed: folder of its run}` of a folder of runs.

  Raises:
    ValueError: there is none.
  """
  found = {
    int(run.name.removeprefix('seed_')): run
    for run in pathlib.Path(folder).glob('seed_*')
  }
  if not found:
    raise ValueError(f'expected runs seed_0 and so on in {folder}, got none')
  return dict(sorted(found.items()))

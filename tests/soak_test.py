"""A short run of benchmarks/soak.py: nothing piles up."""

import pytest

from benchmarks import soak


@pytest.mark.sample
def test_nothing_piles_up(tmp_path):
  samples = soak.run(9, tmp_path, 30)
  assert len(samples) == soak.SAMPLES
  start, _, end = soak.thirds(samples).values()
  assert end['arrays'] == start['arrays'] > 0
  assert end['files'] <= start['files']
  assert end['threads'] <= start['threads']
  assert end['MiB'] < start['MiB'] + 16

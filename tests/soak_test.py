"""A short run of benchmarks/soak.py: nothing piles up."""

import pytest

from benchmarks import soak


@pytest.mark.sample
def test_nothing_piles_up(tmp_path, monkeypatch):
  monkeypatch.setattr(soak, 'SAMPLES', 20)
  samples = soak.run(0, tmp_path, 20)
  assert len(samples) == 20
  start, _, end = soak.thirds(samples).values()
  assert end['arrays'] == start['arrays'] > 0
  assert end['files'] == start['files'] > 0
  assert end['MiB'] < start['MiB'] + 16

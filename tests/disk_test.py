"""A full disk, and a read-only one: the job says so, and harms nothing."""

import pathlib
import subprocess
import sys

import chex
import pytest

from tests import kill_test, tiny
from train import checkpoints, metrics

ROOT = pathlib.Path(__file__).parent.parent
# When the second epoch is to be saved, the first one's checkpoint is there.
STOP = (
  'train.journal:Journal.save:2>train.checkpoints:save:1'
  '>train.checkpoints:checksum:1'
)
# A small disk, in a mount namespace of its own: that takes no rights, and ends
# with the script. It fills up, then allows reading only, and then grows.
SCRIPT = """
set -eu
mount -t tmpfs -o size=2m none "$WORKDIR"
"$PYTHON" -m tests.killed --at="$STOP" "$@" > "$LOGS/first.log" 2>&1
attempt() {
  code=0
  "$PYTHON" -m train.main "$@" > "$LOGS/$name.log" 2>&1 || code=$?
  echo "$name $code"
  mkdir "$LOGS/$name"
  cp -r "$WORKDIR/checkpoints" "$WORKDIR/metrics.jsonl" "$LOGS/$name"
}
for name in $FREE; do
  rm -f "$WORKDIR/filler"
  room=$(df -k --output=avail "$WORKDIR" | tail -1)
  head -c $(((room - name) * 1024)) /dev/zero > "$WORKDIR/filler"
  attempt "$@"
done
rm "$WORKDIR/filler"
mount -o remount,ro "$WORKDIR"
name=read-only; attempt "$@"
mount -o remount,rw,size=16m "$WORKDIR"
name=roomy; attempt "$@"
cp "$WORKDIR/result.json" "$LOGS/roomy"
"""


def check(folder, *free):
  """Runs the job with so many KiB of room, one after the other.

  Returns:
    What each printed, by name.
  """
  flags = kill_test.tiny_flags(
    tiny.save(folder / 'data.npz', train=128, test=21)
  )
  whole, workdir, logs = (folder / name for name in ('whole', 'disk', 'logs'))
  workdir.mkdir()
  logs.mkdir()
  assert kill_test.run([''], *flags, f'--workdir={whole}')[0] == [0]
  script = subprocess.run(
    [
      'unshare', '--mount', '--map-root-user',
      'bash', '-c', SCRIPT, 'script', *flags, f'--workdir={workdir}',
    ],
    cwd=ROOT, text=True, capture_output=True,
    env=kill_test.environment() | {
      'PYTHON': sys.executable,
      'STOP': STOP,
      'WORKDIR': str(workdir),
      'LOGS': str(logs),
      'FREE': ' '.join(free),
    },
  )  # fmt: skip
  texts = {path.stem: path.read_text() for path in logs.glob('*.log')}
  print(texts, script.stderr)
  assert script.stdout.splitlines() == [
    *(f'{name} 1' for name in free), 'read-only 1', 'roomy 0'
  ]  # fmt: skip
  lines = metrics.read(whole)
  for name in *free, 'read-only':
    message = {
      'read-only': 'error: expected a workdir that can be written, got '
    }.get(name, 'error: [Errno 28] No space left on device')
    last = texts[name].strip().splitlines()[-1]
    assert last.startswith(message)
    assert texts[name].count('error: ') == 1
    assert 'Traceback' not in texts[name]
    state, info = checkpoints.restore(logs / name)
    step = info['step']
    assert state['step'] == step and step in (12, 24)
    read = metrics.read(logs / name)
    assert [line for line in read if line['step'] <= step] == lines[:step]
  (one, info), (other, told) = (
    checkpoints.restore(path) for path in (whole, logs / 'roomy')
  )
  chex.assert_trees_all_equal(one, other)
  assert info == told
  assert lines == metrics.read(logs / 'roomy')
  results = [
    metrics.read_json(path / 'result.json') for path in (whole, logs / 'roomy')
  ]
  assert all(result.pop('seconds') for result in results)
  assert results[0] == results[1]
  return texts


@pytest.mark.sample
def test_a_disk_that_is_full_within_a_save(tmp_path):
  texts = check(tmp_path, '40')
  assert 'going on from step 12' in texts['roomy']


@pytest.mark.slow
def test_a_disk_that_is_full_anywhere(tmp_path):
  check(tmp_path, '0', '4', '8', '16', '24', '32', '64', '96', '128')

"""A profiler trace of a few steps, and what it says in a few lines."""

import collections
import itertools

import jax
import tqdm

FIRST, COUNT = 5, 10
# What the host does in the loop.
HOST = {
  'np.asarray(jax.Array)': 'waiting for the metrics of the step before',
  'next batch': 'waiting for the next batch, and sending it',
  'start': 'starting the step',
}


def trace(batches, workdir):
  """Yields the batches, and traces `COUNT` steps after the first `FIRST`.

  A run of fewer steps leaves no summary.

  Args:
    batches: an iterator over device batches, without end.
    workdir: gets `profile/`, for TensorBoard or Perfetto, with `summary.txt`.
  """
  folder = workdir / 'profile'
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # Slow enough to hide the rest.
  for index in itertools.count():
    if index == FIRST:
      jax.profiler.start_trace(str(folder), profiler_options=options)
    if index == FIRST + COUNT:
      jax.profiler.stop_trace()
      text = summary(max(folder.rglob('*.xplane.pb')))
      (folder / 'summary.txt').write_text(text)
      tqdm.tqdm.write(text)
    with jax.profiler.TraceAnnotation('next batch'):
      batch = next(batches)
    yield batch


def summary(path, top=12):
  """Returns what host and devices did in a trace, in milliseconds a step."""
  planes = jax.profiler.ProfileData.from_file(str(path)).planes
  lines = [
    (plane.name, line.name, [e for e in line.events if e.duration_ns > 0])
    for plane in planes
    for line in plane.lines
  ]
  host, device, busy = collections.Counter(), collections.Counter(), []
  for plane, line, events in lines:
    if plane.startswith('/device:') or line.startswith('tf_XLA'):
      busy += [(e.start_ns, e.start_ns + e.duration_ns) for e in events]
      device.update(_durations(e for e in events if '::' not in e.name))
    elif any(e.name == 'next batch' for e in events):
      host.update(_durations(e for e in events if e.name in HOST))
      begin = min(e.start_ns for e in events)
      end = max(e.start_ns + e.duration_ns for e in events)
  worked, until = 0, begin
  for start, stop in sorted(busy):
    worked += max(0, min(stop, end) - max(start, until))
    until = max(until, stop)
  text = [
    f'{(end - begin) / 1e6 / COUNT:.2f} ms a step while traced, the devices at '
    f'work {worked / (end - begin):.1%} of the time',
    'Host, ms a step:',
  ]
  text += [f'{ms:9.2f}  {HOST[name]}' for name, ms in host.most_common()]
  text += ['Devices, all threads together, ms a step:']
  text += [f'{ms:9.2f}  {name}' for name, ms in device.most_common(top)]
  return '\n'.join(text) + '\n'


def _durations(events):
  durations = collections.Counter()
  for event in events:
    durations[event.name] += event.duration_ns / 1e6 / COUNT
  return durations

"""How the commands of this folder run: whatever goes wrong is one line."""

import asyncio.log
import sys

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The settings of a run, as configs/digits.py.'
)
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run: checkpoints, metrics, report.'
)
JSON = flags.DEFINE_bool('json', False, 'Print one JSON object and no more.')


def keep_compiled():
  """Keeps compiled programs in the workdir, unless JAX was told otherwise."""
  import jax  # Late: a misspelt flag is answered without it.

  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', f'{WORKDIR.value}/compiled')


def hush():
  """Lets an error of Orbax be told once, by the command.

  It also logs it, with the stack of each thread and task that it passes, and
  its other reads and writes then find their loop closed.
  """
  asyncio.log.logger.setLevel('CRITICAL')
  logging.get_absl_logger().addFilter(
    lambda record: not (record.exc_info and '/orbax/' in record.pathname)
  )
  before = sys.unraisablehook
  sys.unraisablehook = lambda found: (
    None if str(found.exc_value) == 'Event loop is closed' else before(found)
  )


def run(main, *required):
  """Runs `main()` with the flags parsed; the `required` ones must be given.

  `-v=0` shows the libraries' own log, `-v=1` the traceback of an error.
  """

  def parse(argv):
    try:
      rest = app.parse_flags_with_usage(argv)[1:]
      if rest:
        raise ValueError(f'expected flags only, got {" ".join(rest)}')
      for name in required:
        value = flags.FLAGS[name].value
        if value is None:
          raise ValueError(f'expected --{name}')
        getattr(value, 'keys', None)  # Raises for a file that was not read.
    except Exception as error:  # A config file may raise anything.
      end(error)
    if flags.FLAGS['verbosity'].using_default_value:
      logging.set_verbosity(logging.WARNING)
    return argv[:1]

  def guarded(_):
    hush()
    try:
      main()
    except (ValueError, FloatingPointError, OSError) as error:
      logging.debug('', exc_info=True)
      end(error)
    except RuntimeError as error:
      if hint := advice(error):
        logging.debug('', exc_info=True)
        end(RuntimeError(f'{hint} ({str(error).splitlines()[0]})'))
      raise

  for name in required:  # For --help, wherever it was defined.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
  app.run(guarded, flags_parser=parse)


def advice(error):
  """What to do about an error of JAX's runtime; '' where nobody knows."""
  import jax

  if not isinstance(error, jax.errors.JaxRuntimeError):
    return ''
  if 'RESOURCE_EXHAUSTED' in str(error):
    return (
      'the memory is not enough: take a smaller config.batch_size, or '
      "config.model_args of {'pack': True} or {'remat': 'layer'}, of which "
      'train.plan tells what each needs'
    )
  if jax.process_count() > 1:
    return (
      'another process has ended, and says why: start all of them again, and '
      'they go on from the last checkpoint'
    )
  return ''


def end(error):
  """Ends the process with an error in one line."""
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]
  message = str(error)
  if isinstance(error, KeyError):
    message = f'expected a field of the config, got {error.args[0]}'
  sys.exit(f'error: {" ".join(message.split())}')

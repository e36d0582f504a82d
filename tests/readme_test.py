"""What the README shows runs as it stands there."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent


def test_python_blocks_run():
  text = (ROOT / 'README.md').read_text()
  blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  assert len(blocks) == 7
  namespace = {}
  for block in blocks:
    if 'train.load' in block:  # See evaluate_test, where there is a run.
      continue
    exec(block, namespace)
    if 'class Layer' in block:  # NNX takes over the names after it.
      layer, frames = namespace['Layer'](), namespace['images'][None]
      key = namespace['jax'].random.key(0)
      spikes, _ = layer.init_with_output(key, frames, train=True)
      assert set(spikes.ravel().tolist()) == {0, 1}
  assert namespace['logits'].shape == (8, 10)
  assert namespace['sown']['spiking']['SpikingNeuron_0']['theta'].shape == (4,)
  nnx, net = namespace['nnx'], namespace['Net']
  assert net(nnx.Rngs(0))(namespace['images']).shape == (8, 10)


def test_layout_names_what_is_there():
  text = (ROOT / 'README.md').read_text()
  layout = text.split('## Layout')[1].split('```')[1]
  names = re.findall(r'[a-z_]+(?:\.py|/)', layout)
  for name in names:
    assert any(
      any(ROOT.glob(folder + name)) for folder in ('', 'dsatgo_jax/', 'train/')
    ), name

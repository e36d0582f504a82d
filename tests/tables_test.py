"""Tables of an evaluation, as they are printed."""

import numpy as np

from train import tables


def test_tables_of_gradients():
  layers = {
    'conv0': {'u': [3e-7, 4e-7]}, 'a/very/deep/layer': {'u': [None, 0.0]}
  }  # fmt: skip
  paths = 'spatial', 'leak', 'reset'
  shares = {
    'conv0': dict(zip(paths, (0.5, 0.4, 0.1), strict=True)),
    'a/very/deep/layer': dict.fromkeys(paths),
  }
  lines = tables.flow_tables(
    {'num_examples': 8, 'layers': layers, 'shares': shares}
  )
  assert list(lines) == [
    'norm of dL/du, 8 examples       t=1       t=2       all',
    'conv0                      3.00e-07  4.00e-07  5.00e-07',
    'a/very/deep/layer               nan  0.00e+00       nan',
    '',
    'shares of the paths, %  spatial   leak  reset',
    'conv0                     50.00  40.00  10.00',
    'a/very/deep/layer             -      -      -',
  ]


def test_table_of_energy():
  layer = {
    'kind': 'AC', 'rate': 0.25, 'operations': 1.5e6, 'energy': 1.35e6,
    'relu_operations': 6e6, 'relu_energy': 27.6e6,
  }  # fmt: skip
  found = {
    'layers': {'conv0': layer}, 'accumulates': 1.5e6,
    'multiply_accumulates': 5e5, 'energy': 3.65e6, 'relu_operations': 6e6,
    'relu_energy': 27.6e6,
  }  # fmt: skip
  *rows, last = tables.energy_table(found)
  assert [row.split('  ')[0] for row in rows] == [
    'operations, an example', 'conv0', 'total'
  ]  # fmt: skip
  assert rows[1].split() == [
    'conv0', 'AC', '25.00', '1,500.0', '1,350.0', '6,000.0', '27,600.0'
  ]  # fmt: skip
  assert rows[2].split() == [
    'total', '2,000.0', '3,650.0', '6,000.0', '27,600.0'
  ]  # fmt: skip
  assert last == (
    '1,500,000 accumulates (AC) and 500,000 multiply-accumulates (MAC): '
    '13.2% of the energy with ReLU'
  )


def test_table_of_few_classes():
  confusion = [[8, 0, 2], [0, 0, 0], [1, 0, 119]]
  assert list(tables.class_tables(confusion)) == [
    'class, taken for  0  1    2  examples  right, %',
    '0                 8  .    2        10     80.00',
    '1                 .  .    .         0         -',
    '2                 1  .  119       120     99.17',
  ]


def test_of_many_classes_the_worst_and_their_confusions_are_told():
  confusion = 4 * np.eye(30, dtype=int)
  confusion[12] = 0  # Without an example.
  confusion[7, [7, 3, 20]] = 1, 5, 2
  confusion[28, [28, 7]] = 3, 1
  confusion[29, [29, 0]] = 6, 2
  assert list(tables.class_tables(confusion)) == [
    'worst classes  examples  right, %  mostly taken for (times)',
    '7                     8     12.50                     3 (5)',
    '29                    8     75.00                     0 (2)',
    '28                    4     75.00                     7 (1)',
    '',
    'most frequent confusions  times  of the class, %',
    '7 taken for 3                 5            62.50',
    '7 taken for 20                2            25.00',
    '29 taken for 0                2            25.00',
    '28 taken for 7                1            25.00',
  ]
  confusion = np.ones((21, 21), int)
  worst, pairs = '\n'.join(tables.class_tables(confusion)).split('\n\n')
  assert len(worst.splitlines()) == len(pairs.splitlines()) == 11
  confusion = np.eye(30, dtype=int)
  confusion[5] = 0
  (line,) = tables.class_tables(confusion)
  assert line == 'every example of 29 classes is right'

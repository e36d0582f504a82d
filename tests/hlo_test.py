"""What is read off compiled programs, beside programs counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu
from train import hlo

LOOP = """HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%inner (p: f32[4,2]) -> f32[4,2] {
  %p = f32[4,2]{1,0} parameter(0)
  ROOT %all-reduce.1 = f32[4,2]{1,0} all-reduce(%p), to_apply=%sum
}

%body.2_spmd (state: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  %g = f32[4,2]{1,0} get-tuple-element(%state), index=1
  %gather = bf16[8]{0} all-gather(%h), dimensions={0}
  ROOT %call = f32[4,2]{1,0} call(%g), to_apply=%inner
}

%condition (state: (s32[], f32[4,2])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main.9_spmd (x: f32[4,2]) -> (f32[3]) {
  %while = (s32[], f32[4,2]{1,0}) while(%t), condition=%condition, \
body=%body.2_spmd, backend_config={"known_trip_count":{"n":"5"}}
  %all-reduce.3 = (f32[3]{0}, /*index=1*/pred[7]{0}, f64[]) \
all-reduce(%a, %b, %c), to_apply=%sum
  ROOT %tuple = (f32[3]{0}) tuple(%get-tuple-element(%all-reduce.3))
}
"""


GPU = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%half (p0: bf16[8,4], p1: f32[4]) -> (f32[4,4], bf16[4,4]) {
  %p0 = bf16[8,4]{1,0} parameter(0)
  %p1 = f32[4]{0} parameter(1)
  %slice.1 = bf16[4,4]{1,0} slice(%p0), slice={[0:4], [0:4]}
  %wide = f32[4,4]{1,0} convert(%slice.1)
  %b = f32[4,4]{1,0} broadcast(%p1), dimensions={1}
  %product = f32[4,4]{1,0} multiply(%wide, %b)
  %narrow = bf16[4,4]{1,0} convert(%product)
  ROOT %both = (f32[4,4]{1,0}, bf16[4,4]{1,0}) tuple(%product, %narrow)
}

ENTRY %main (x: bf16[8,4], g: f32[4]) -> f32[4,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %g = f32[4]{0} parameter(1)
  %fusion = (f32[4,4]{1,0}, bf16[4,4]{1,0}) fusion(%x, %g), kind=kLoop, \
calls=%half, metadata={op_name="jit(f)/transpose(jvp(Net))/norm.affine/mul"}
  %first = f32[4,4]{1,0} get-tuple-element(%fusion), index=0
  %start = f32[4,4]{1,0} all-reduce-start(%first), to_apply=%add
  %cublas = (f32[4,4]{1,0}, s8[64]{0}) custom-call(%first, %first), \
custom_call_target="__cublas$gemm"
  ROOT %done = f32[4,4]{1,0} all-reduce-done(%start)
}
"""


def test_kernels_and_traffic_of_a_program_by_hand():
  fusion = 4 * 4 * 2 + 4 * 4 + 4 * 4 * (4 + 2)  # Half of x is read.
  assert hlo.kernels(GPU) == [
    ('fusion', fusion, 1, 'jit(f)/transpose(jvp(Net))/norm.affine/mul'),
    ('all-reduce-start', 2 * 64, 1, ''),
    ('library', 64 + 64 + 2 * 64, 1, ''),
  ]
  assert hlo.sources(GPU) == {
    ('backward', 'norm'): (1, fusion),
    ('', ''): (1, 2 * 64),
  }
  assert hlo.summary(GPU) == {
    'kernels': 3,
    'moved_bytes': fusion + 2 * 64,
    'collectives': {'all-reduce': 1},
    'collective_bytes': 64,
  }


def test_a_kernel_of_our_own_reads_a_part_of_x():
  text = GPU.replace(
    '  ROOT %done',
    '  %ours = f32[4,4]{1,0} custom-call(%x, %g), '
    'custom_call_target="__gpu$xla.gpu.triton", '
    'metadata={op_name="jit(f)/neuron/custom_partitioning"}, '
    'backend_config={grid_x = 1 : i32, name = "neuron_measures_1_of_4"}\n'
    '  ROOT %done',
  ).replace('bf16[8,4]', 'bf16[16,4]')
  assert hlo.sources(text)['forward', 'neuron_measures'] == (
    1, 16 * 4 * 2 / 4 + 4 * 4 + 4 * 4 * 4,
  )  # fmt: skip


def test_collectives_of_a_program_by_hand():
  found = [(each.bytes, each.times) for each in hlo.collectives(LOOP)]
  assert found == [(16, 5), (32, 5), (12 + 7 + 8, 1)]
  summary = hlo.summary(LOOP)
  assert summary['collectives'] == {'all-gather': 5, 'all-reduce': 6}
  assert summary['collective_bytes'] == 5 * (16 + 32) + 27


def test_collectives_of_a_compiled_program():
  def function(x):
    def body(carry, _):
      return jax.lax.psum(jnp.sin(carry), 'batch'), None

    x = jax.lax.scan(body, x, length=6)[0]
    return jax.lax.pmean(x[:2].astype(jnp.bfloat16), 'batch')

  step = jax.pmap(function, axis_name='batch')
  compiled = step.lower(jax.ShapeDtypeStruct((4, 3), jnp.float32)).compile()
  found = hlo.summary(compiled.as_text())
  assert found['collectives'] == {'all-reduce': 7}
  assert 6 * 12 < found['collective_bytes'] <= 6 * 12 + 8


@pytest.mark.parametrize(
  ('now', 'told'),
  [
    ({'kernels': 109, 'MiB moved': 5.0}, []),
    ({'kernels': 112, 'MiB moved': 5.0}, ['kernels 112, kept 100']),
    ({'kernels': 1, 'all-gather': 1}, ['all-gather 1, kept 0']),
  ],
)
def test_what_has_grown(now, told):
  case = dict.fromkeys(gpu.COLUMNS, 'x')
  lines = gpu.grown([case | now], [case | {'kernels': 100, 'MiB moved': 5.0}])
  assert [line.partition(': ')[2] for line in lines] == told

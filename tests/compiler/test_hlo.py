"""The text of compiled programs, read: trips, cycles, kernels, traffic."""

import jax
import jax.numpy as jnp
import pytest

from vjepa_jax.compiler import chips, estimate, hlo, kernels

# Cut from programs that libtpu compiled for v4:2x2x4; kept as it writes them: line
# breaks within the metadata of a kernel, layouts, counters of either sign, a fusion
# whose settings mention a kernel, a loop unrolled by two, a pair that is started and
# waited for.
TEXT = '''HloModule jit_step, is_scheduled=true, num_partitions=16

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%fused (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %inner = bf16[8,128]{1,0:T(8,128)(2,1)} add(%p, %p), backend_config={"estimated_cycles":"999999"}
}

%layer_cond (s: (s32[], bf16[8,128])) -> pred[] {
  %s = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(12)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%ring_cond (r: (bf16[8,128], u32[])) -> pred[] {
  %r = (bf16[8,128]{1,0:T(8,128)(2,1)}, /*index=1*/u32[]{:T(128)}) parameter(0)
  %eight = u32[]{:T(128)} constant(8)
  %j = u32[]{:T(128)} get-tuple-element(%r), index=1
  ROOT %before = pred[]{:T(512)} compare(%j, %eight), direction=LT
}

%ring (r.1: (bf16[8,128], u32[])) -> (bf16[8,128], u32[]) {
  %r.1 = (bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) parameter(0)
  %block = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%r.1), index=0
  %send = (bf16[8,128]{1,0:T(8,128)(2,1)S(3)}, bf16[8,128]{1,0:T(8,128)(2,1)S(3)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%block), channel_id=18, source_target_pairs={{0,15},{1,0}}
  %sent = bf16[8,128]{1,0:T(8,128)(2,1)S(3)} collective-permute-done(%send)
  %j.1 = u32[]{:T(128)} get-tuple-element(%r.1), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%j.1, %two)
  ROOT %state = (bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) tuple(%sent, %next)
}

%layer (s.1: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %s.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%s.1), index=1
  %work = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/mlp/fc1"}, frontend_attributes={custom_call_target="tpu_custom_call"}, backend_config={"estimated_cycles":"1000"}
  %q = bf16[2,3,1024,64]{3,2,1,0:T(8,128)(2,1)} broadcast(%work), backend_config={"estimated_cycles":"10"}
  %splash_mha_fwd_residuals.1 = (f32[8,512,128]{2,1,0:T(8,128)}, bf16[2,3,1024,64]{3,2,1,0:T(8,128)(2,1)}) custom-call(%q, %q, %q), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,2,2]{2,1,0}, bf16[2,3,1024,64]{3,2,1,0}, bf16[2,3,1000,64]{3,2,1,0}, bf16[2,3,1000,64]{3,2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 512, \\"q_layout\\": 1, \\"k_layout\\": 1}"
}}, metadata={op_name="jit(step)/attn/splash_mha_fwd/pallas_call"}, backend_config={"custom_call_config":{"body":"TUzvUg"}}
  %first = u32[]{:T(128)} constant(0)
  %began = (bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) tuple(%work, %first)
  %turned = (bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) while(%began), condition=%ring_cond, body=%ring
  %y = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%turned), index=0
  %one = s32[]{:T(128)} constant(1)
  %i.2 = s32[]{:T(128)} add(%i.1, %one)
  ROOT %out = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%i.2, %y)
}

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %start = s32[]{:T(128)} constant(2)
  %in = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%start, %x.1)
  %layers = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%in), condition=%layer_cond, body=%layer
  %z = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%layers), index=1
  %gradients = f32[100]{0:T(128)} all-reduce(%z), channel_id=1, replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_1'}, use_global_device_ids=true, to_apply=%add
  %gathered = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%z), channel_id=2, replica_groups=[2,8]<=[16], dimensions={0}
  %handed = (bf16[8,128]{1,0}, bf16[8,128]{1,0}) collective-permute-start(%z), channel_id=3, source_target_pairs={{0,1}}
  ROOT %result = bf16[8,128]{1,0:T(8,128)(2,1)} copy(%z), backend_config={"estimated_cycles":"50"}
}
'''


@pytest.fixture(scope="module")
def module():
  return hlo.Module(TEXT)


def runs(module, name):
  return [run for run in module.runs if run.instruction.name == name]


def test_loops_run_from_their_start_by_their_step_to_their_limit(module):
  # 2, 3, .. 11; in each of these 0, 2, 4, 6.
  assert [run.trips for run in runs(module, "work")] == [10]
  assert [run.trips for run in runs(module, "send")] == [40]
  assert module.unknown_loops == []


def test_cycles_count_as_often_as_they_are_spent(module):
  cost = estimate.cost(TEXT, chips.TPUS["v4"])
  assert cost.non_kernel_ms == pytest.approx(1e3 * (10 * 1010 + 50) / 1.05e9)
  first = cost.largest_ops[0]
  assert (first["name"], first["trips"]) == ("work", 10)
  assert first["op_name"] == "jit(step)/mlp/fc1"


def test_large_operations_without_an_estimate_are_named():
  assert estimate.cost(TEXT, chips.TPUS["v4"]).unknown_ops == []
  text = TEXT.replace(
      "  %x.1 = ", "  %wide = f32[49152,768]{1,0:T(8,128)} fusion(%x.1), kind=kCustom\n"
      "  %sent.1 = f32[49152,768]{1,0:T(8,128)} copy-done(%wide)\n  %x.1 = ",
  )
  (found,) = estimate.cost(text, chips.TPUS["v4"]).unknown_ops
  assert (found["name"], found["mib"]) == ("wide", 144.0)


def test_a_kernel_is_told_from_a_fusion_that_mentions_one(module):
  found, unknown = kernels.find(module)
  assert [kernel.name for kernel in found] == ["splash_mha_fwd_residuals.1"]
  assert unknown == []


def test_a_kernels_time_is_that_of_whole_blocks_and_full_lanes(module):
  (kernel,), _ = kernels.find(module)
  assert (kernel.rows, kernel.queries, kernel.keys, kernel.width) == (6, 1024, 1024, 64)
  flops = 2 * 2 * 6 * 1024 * 1024 * 128 * 10
  assert kernel.seconds(chips.TPUS["v4"]) == pytest.approx(flops / 275e12)
  # A matrix unit of 256 x 256 is filled to a quarter.
  assert kernel.seconds(chips.TPUS["v6e"]) == pytest.approx(2 * flops / 918e12)


@pytest.mark.parametrize("name,results,products", [
    ("splash_mha_fwd_residuals", 1, 2), ("splash_mha_dq_no_residuals", 1, 3),
    ("splash_mha_dkv_no_residuals", 2, 4), ("splash_mha_dkv_no_residuals", 3, 5),
])
def test_each_kernel_forms_its_own_number_of_products(name, results, products):
  array = "bf16[2,3,1024,64]{3,2,1,0}"
  text = TEXT.replace("splash_mha_fwd_residuals", name).replace(
      "bf16[2,3,1024,64]{3,2,1,0:T(8,128)(2,1)}) custom-call",
      ", ".join([array] * results) + ") custom-call",
  )
  (kernel,), _ = kernels.find(hlo.Module(text))
  assert kernel.products == products


def test_a_kernel_that_is_not_understood_is_named(module):
  text = TEXT.replace("splash_mha_fwd", "mystery").replace("/attn/", "/")
  assert kernels.find(hlo.Module(text)) == ([], ["mystery_residuals.1"])


def test_traffic_is_counted_once_a_pair_by_kind_and_group(module):
  kinds = {(c.kind, c.group, c.trips): c for c in module.collectives()}
  block = 8 * 128 * 2
  assert kinds["all-reduce", 4, 1].bytes == block
  assert kinds["all-gather", 8, 1].bytes == 8 * block
  assert kinds["collective-permute", 16, 40].bytes == block
  assert kinds["collective-permute", 16, 1].bytes == block
  assert len(module.collectives()) == 4
  assert kinds["all-reduce", 4, 1].sent == pytest.approx(2 * 3 / 4 * block)
  cost = estimate.cost(TEXT, chips.TPUS["v4"])
  assert cost.collective_bytes == {
      "all-reduce": block, "all-gather": 8 * block, "collective-permute": 41 * block,
      "total": 50 * block,
  }


def test_a_loop_that_does_not_tell_its_length_counts_once_and_is_named():
  text = TEXT.replace("constant(12)", "parameter(1)")
  module = hlo.Module(text)
  assert [run.trips for run in module.runs if run.instruction.name == "work"] == [1]
  assert module.unknown_loops == ["layers"]


def test_a_program_that_xla_compiled_here_can_be_read():
  def loop(x):
    return jax.lax.fori_loop(0, 7, lambda i, c: jnp.sin(c) @ c + i, x)

  x = jax.ShapeDtypeStruct((16, 16), jnp.float32)
  module = hlo.Module(jax.jit(loop).lower(x).compile().as_text())
  loops = [run for run in module.runs if run.instruction.opcode == "while"]
  assert loops and {run.trips for run in loops} == {1}
  assert max(run.trips for run in module.runs) == 7
  assert any(array.shape == (16, 16) for array in module.arrays())


def test_what_is_no_compiled_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.Module("module @jit_f {}")


@pytest.mark.parametrize("message,needed,available", [
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 49.25G of 30.75G "
     "hbm. Exceeded hbm capacity by 18.50G.", 49.25 * 2**30, 30.75 * 2**30),
    ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
     "memory required for HLO temporaries (4.00T) exceeds available HBM (15.75G).",
     4 * 2**40, 15.75 * 2**30),
    ("RESOURCE_EXHAUSTED: something else", None, None),
])
def test_a_refusal_tells_the_bytes(message, needed, available):
  error = estimate.OutOfMemory(message)
  assert (error.needed, error.available) == (needed, available)

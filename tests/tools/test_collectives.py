"""Collectives read from HLO text: as TPUs' compiler writes it, and of a program compiled here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from latent_delib import mesh as mesh_lib
from tools import collectives

# Cut down from a program for v5e: a loop of 3 inside one of 4, the inner one's counter in steps of
# 2; an asynchronous gather in three fusions; sums of a tuple; a start that holds operand, result
# and counters.
TEXT = """HloModule jit_step, entry_computation_layout={()->f32[]}

%start.1 (p: bf16[1,16]) -> (bf16[1,16], bf16[1,64], u32[]) {
  %p = bf16[1,16]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[1,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=[4,4]<=[16], dimensions={1}
  ROOT %call.1 = (bf16[1,64]{1,0}, u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p: bf16[1,16]) -> bf16[1,64] {
  %p = bf16[1,16]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[1,64]{1,0} all-gather(%p), channel_id=7, replica_groups=[4,4]<=[16], dimensions={1}
}

%done.1 (p: bf16[1,16]) -> bf16[1,64] {
  %p = bf16[1,16]{1,0} parameter(0)
  %all-gather.3 = bf16[1,64]{1,0} all-gather(%p), channel_id=7, replica_groups=[4,4]<=[16], dimensions={1}
  ROOT %call.3 = bf16[1,64]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%inner_body (p: (u32[], f32[8])) -> (u32[], f32[8]) {
  %p = (u32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %two = u32[]{:T(128)} constant(2)
  %permute = (f32[8]{0}, f32[8]{0}, u32[]) collective-permute-start(%x), channel_id=8, source_target_pairs={{0,1}}
  %y = f32[8]{0} collective-permute-done(%permute)
  %next = u32[]{:T(128)} add(%i, %two), metadata={op_name="a(b), c"}
  ROOT %t = (u32[]{:T(128)}, f32[8]{0}) tuple(%next, %y)
}

%inner_cond (p: (u32[], f32[8])) -> pred[] {
  %p = (u32[]{:T(128)}, f32[8]{0}) parameter(0)
  %bound = u32[]{:T(128)} constant(5), metadata={op_name="x"}
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%outer_body (p: (f32[8], s32[])) -> (f32[8], s32[]) {
  %p = (f32[8]{0}, s32[]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=0
  %i = s32[] get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %w = bf16[1,16]{1,0} constant({...})
  %fusion.1 = (bf16[1,16]{1,0}, bf16[1,64]{1,0:S(1)}, u32[]{:S(2)}) fusion(%w), kind=kCustom, calls=%start.1
  %fusion.2 = bf16[1,64]{1,0} fusion(%w), kind=kCustom, calls=%async_collective_fusion.1
  %fusion.3 = bf16[1,64]{1,0} fusion(%w), kind=kCustom, calls=%done.1
  %init = (u32[]{:T(128)}, f32[8]{0}) tuple(%one, %x)
  %loop = (u32[]{:T(128)}, f32[8]{0}) while(%init), condition=%inner_cond, body=%inner_body
  %y = f32[8]{0} get-tuple-element(%loop), index=1
  %next = s32[] add(%i, %one)
  ROOT %t = (f32[8]{0}, s32[]) tuple(%y, %next)
}

%outer_cond (p: (f32[8], s32[])) -> pred[] {
  %p = (f32[8]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=1
  %bound = s32[] constant(4)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%x, %y)
}

ENTRY %main (a: f32[8]) -> f32[] {
  %a = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %init = (f32[8]{0}, s32[]) tuple(%a, %zero)
  %loop = (f32[8]{0}, s32[]) while(%init), condition=%outer_cond, body=%outer_body
  %sums = (f32[], bf16[16,2]{1,0}) all-reduce(%u, %v), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %scattered = bf16[4]{0} reduce-scatter(%s), channel_id=2, replica_groups=mesh['x'=2,'y'=4] {'x','y'}, dimensions={0}
  %both = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%s), channel_id=3, replica_groups=mesh['x'=2,'y'=4] {'y'}
  ROOT %r = f32[] get-tuple-element(%sums), index=0
}
"""  # noqa: E501


def test_every_kind_in_the_loops_that_hold_it():
    assert collectives.collectives(TEXT) == {
        "all-gather": collectives.Traffic(4 + 1, 4 * 128 * 3 / 4 + 32 * 3 / 4),
        "reduce-scatter": collectives.Traffic(1, 8 * 8 * 7 / 8),
        "all-reduce": collectives.Traffic(1, 2 * (4 + 64) * 3 / 4),
        "collective-permute": collectives.Traffic(4 * 3, 4 * 3 * 32),
    }


@pytest.mark.parametrize(
    "groups, size",
    [
        ("[4,4]<=[16]", 4),
        ("[2,16]<=[2,16]T(1,0), dimensions={0}", 16),
        ("{{0,1,2},{3,4,5}}", 3),
        ("mesh['a'=1,'b'=16,'c'=2] {'b'}, dimensions={1}", 16),
        ("mesh['a'=1,'b'=16,'c'=2], device_ids=([2,16]T(1,0)) {'b','c'}, dimensions={1}", 32),
        ("mesh['a'=4,'b'=16] {'b':(2)8}", 8),
    ],
)
def test_groups_in_every_form(groups, size):
    text = TEXT.replace("replica_groups=[4,4]<=[16]", f"replica_groups={groups}")
    assert collectives.collectives(text)["all-gather"].received == pytest.approx(
        4 * 128 * (size - 1) / size + 32 * 3 / 4
    )
    with pytest.raises(ValueError, match="cannot read the groups"):
        collectives.collectives(TEXT.replace("replica_groups=[4,4]<=[16]", "replica_groups=?"))


@pytest.mark.parametrize(
    "kind, shape, of_start",
    [
        ("all-gather", "f32[32]", "(f32[4], f32[32])"),
        ("reduce-scatter", "f32[4]", "((f32[32]), f32[4])"),
        ("reduce-scatter", "(f32[4], bf16[2])", "((f32[32], bf16[16]), (f32[4], bf16[2]))"),
        ("all-reduce", "f32[32]", "f32[32]"),
        ("all-to-all", "f32[32]", "((f32[32]), f32[32])"),
    ],
)
def test_an_asynchronous_collective_receives_as_much(kind, shape, of_start):
    """As the compiler for GPUs writes it: what starts one holds its operands too, or not."""
    whole = 32 * 4 + (16 * 2 if "bf16" in shape else 0)
    for name, result in ((kind, shape), (f"{kind}-start", of_start)):
        line = f"  %c = {result} {name}(%x), channel_id=1, replica_groups={{{{0,1,2,3,4,5,6,7}}}}"
        found = collectives.collectives("ENTRY %main (x: f32[32]) -> f32[] {\n" + line + "\n}\n")
        assert found == {kind: collectives.Traffic(1, whole * collectives.RECEIVED[kind](8))}


def test_a_loop_of_unknown_length_is_refused_where_it_holds_a_collective():
    with pytest.raises(ValueError, match="permute: is in a loop"):
        collectives.collectives(TEXT.replace("compare(%i, %bound)", "compare(%bound, %i)", 1))
    quiet = TEXT.replace("compare(%i, %bound)", "compare(%bound, %i)").replace(
        "permute-start", "copy-start"
    )
    quiet = quiet.replace("kind=kCustom, calls=%start.1", "")
    assert collectives.collectives(quiet).keys() == {"all-gather", "all-reduce", "reduce-scatter"}


def test_of_a_program_compiled_here():
    """A weight gathered in each of six turns of a scan, a sum after it."""
    mesh = mesh_lib.make({"data": 2, "fsdp": 4, "traces": 1, "tensor": 1})

    def run(w, x):
        def turn(x, i):
            return jnp.tanh(x @ jax.lax.all_gather(w * i, "fsdp", tiled=True)), None

        return jax.lax.psum(jax.lax.scan(turn, x, jnp.arange(1.0, 7.0))[0].sum(), "data")

    specs = PartitionSpec("fsdp"), PartitionSpec("data")
    run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    w, x = (
        jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, s)) for s in specs
    )
    found = collectives.collectives(jax.jit(run).lower(w, x).compile().as_text())
    assert found["all-gather"] == collectives.Traffic(6, 6 * 8 * 8 * 4 * 3 / 4)
    assert found["all-reduce"] == collectives.Traffic(1, 4 * 2 * 1 / 2)

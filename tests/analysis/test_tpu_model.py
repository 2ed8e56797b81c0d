"""The static cycle model on schedules written by hand: every number below can be counted."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from attnlab.analysis import tpu_model, tpu_program, tpu_schedule
from attnlab.analysis.targets import TARGETS, find
from attnlab.core.errors import ConfigError, DataError
from attnlab.ops.attention.shapes import Shape
from attnlab.ops.attention.tuning import Tile

SHAPE = Shape("tiny", 1, 512, 2, 1, 128, 128)
LEGEND = """= control target key start
LH: loop header
= control target key end
"""


def reports(length, branches, products=(), exits=()) -> tuple[str, str]:
    """The two reports of ``branches`` (from, to), ``products`` (where), ``exits`` (at, trips)."""
    lines, use = [], []
    for i in range(length):
        slots = [f"%s{i} = smov.u32 0"]
        slots += [f"%{i} = sbr.rel (%p1) target bundleno = {t} (0x{t:x})" for a, t in branches
                  if a == i]
        slots += [f"%p2 = scmp.ge.s32.totalorder %s9, {n} /* loop exit test */" for a, n in exits
                  if a == i]
        address = "0" if i == 0 else f"0x{i:x}"
        lines.append(f"{address:>6} {'PB' if i % 50 == 0 else '  '} : > {{ {' ;; '.join(slots)} }}")
        use.append(f"{int(i in products)} 0 {2 * int(i in products)} 1")
    head = "== CAPACTIY:\nMATMUL, VALU, VSTORE, VSTORE:SPILL\n 2 4 1 1\n== UTILIZATION:\n"
    return LEGEND + "\n".join(lines), head + "\n".join(use)


# A loop over [10, 490): init [60, 110), full tile [120, 220), partial tile [230, 350), flush
# [360, 410), a short region [420, 430) that is overhead.
LOOP = [(489, 10), (60, 110), (120, 220), (230, 350), (360, 410), (420, 430)]
PRODUCTS = {*range(130, 180), *range(240, 290)}
STEPS = 1 * 2 * 2 * 2  # B, N, rows, columns with tiles of 256


def schedule(exits=((480, STEPS + 2),)):
    return tpu_schedule.parse("x_fwd", *reports(500, LOOP, PRODUCTS, exits))


def test_tree():
    found = schedule()
    grid = found.grid()
    assert grid is not None and (grid.start, grid.end, grid.trips) == (10, 490, STEPS + 2)
    regions = [(n.start, n.end) for n in grid.walk() if not n.loop]
    assert regions == [(60, 110), (120, 220), (230, 350), (360, 410)]
    assert found.use("MATMUL", grid) == 100 and found.capacity["VALU"] == 4


def test_else_branches_do_not_overlap():
    text, use = reports(400, [(10, 150), (140, 300)])
    root = tpu_schedule.parse("x", text, use).root
    assert [(n.start, n.end) for n in root.children] == [(10, 150), (150, 300)]


def test_cycles_by_hand():
    launch = tpu_model.Launch("x_fwd", STEPS)
    work = tpu_model.work(SHAPE, "forward", Tile(256, 256))
    assert (work.full, work.partial, work.rows) == (2, 4, 4)
    work = dataclasses.replace(work, hbm_bytes=0.0)
    target = find("v5e")
    found = tpu_model.predict(schedule(), launch, work, target)
    overhead = 480 - 50 - 100 - 120 - 50
    assert (found.full, found.partial, found.row, found.overhead) == (100, 120, 100, overhead)
    cycles = STEPS * overhead + 2 * 100 + 4 * 120 + 4 * 100
    assert found.seconds == pytest.approx(cycles / 1.5e9)
    assert found.mxu == pytest.approx((2 * 50 + 4 * 50) / cycles / 2)
    assert found.spills == 500, "the last column of the report"
    slow = tpu_model.predict(schedule(), launch, work, find("v7x"))
    assert slow.seconds == pytest.approx(cycles / 2.2e9 / 0.85)


def test_two_cores_share_the_grid():
    launch = tpu_model.Launch("x_fwd", STEPS, parallel=True)
    work = dataclasses.replace(tpu_model.work(SHAPE, "forward", Tile(256, 256)), hbm_bytes=0.0)
    half = tpu_model.predict(schedule([(480, STEPS // 2 + 2)]), launch, work, find("v5p"))
    whole = tpu_model.predict(schedule(), launch, work, find("v5p"))
    assert (half.cores, whole.cores) == (2, 1)
    assert half.seconds == pytest.approx(whole.seconds / 2)
    with pytest.raises(DataError, match="they disagree"):
        tpu_model.predict(schedule([(480, 99)]), launch, work, find("v5p"))


def test_a_grid_that_depends_on_data_has_one_step_a_visible_tile():
    work = tpu_model.work(SHAPE, "forward", Tile(256, 256))
    found = tpu_model.predict(
        schedule(()), tpu_model.Launch("x_fwd", None, parallel=True), work, find("v4")
    )
    assert (found.steps, found.cores) == (6, 2)


def test_memory_bounds_the_time():
    work = tpu_model.Work(1, 0, 1, 819e9)
    found = tpu_model.predict(schedule(), tpu_model.Launch("x_fwd", STEPS), work, find("v5e"))
    assert found.seconds == found.hbm_seconds == 1.0


def test_inner_loops():
    """One of known length repeats inside its tile; one that depends on data is the tile."""
    inner = [(399, 10), (60, 360), (299, 100)]
    work = tpu_model.Work(4, 0, 4, 0.0)
    products = set(range(150, 200))
    launch = tpu_model.Launch("x_fwd", 4)
    known = tpu_schedule.parse("x", *reports(400, inner, products, [(290, 3), (390, 6)]))
    found = tpu_model.predict(known, launch, work, find("v5e"))
    assert found.full == 300 + 2 * 200 and found.overhead == 390 - 300
    traced = tpu_schedule.parse("x", *reports(400, inner, products, [(390, 6)]))
    found = tpu_model.predict(traced, launch, work, find("v5e"))
    assert found.full == 200 and found.overhead == 390 - 200


def test_no_products_no_answer():
    empty = tpu_schedule.parse("x", *reports(100, [(90, 10)]))
    launch, work = tpu_model.Launch("x_fwd", 1), tpu_model.Work(1, 0, 1, 0.0)
    with pytest.raises(DataError, match="no matrix product"):
        tpu_model.predict(empty, launch, work, find("v5e"))
    with pytest.raises(DataError, match="holds no bundle"):
        tpu_schedule.parse("x", "", "")
    with pytest.raises(DataError, match="names no units"):
        tpu_schedule.parse("x", reports(9, [])[0], "")


def test_reports_on_disk(tmp_path):
    bundles, use = reports(500, LOOP, PRODUCTS)
    for stamp, name in ((1, "jvp_x_fwd.2"), (2, "y_dkv"), (3, "y_dkv.1"), (4, "copy.3")):
        (tmp_path / f"{stamp}-{name}-07-packed-bundles-post-ra.txt").write_text(bundles)
        path = tmp_path / f"{stamp}-{name}-06-schedule-analysis_packed-bundles-post-ra.txt"
        path.write_text("")
        path = tmp_path / f"{stamp}-{name}-08-pre-delay_hlo-static-per-bundle-utilization.txt"
        path.write_text(use)
    names = ["x_fwd", "y_dkv", "y_dkv", "y_dkv"]
    assert [s.name for s in tpu_schedule.read(tmp_path, names)] == names
    with pytest.raises(DataError, match="kernel z_fwd: the compiler wrote no schedule"):
        tpu_schedule.read(tmp_path, ["z_fwd"])


@pytest.mark.parametrize("causal, window", [(True, None), (True, 100), (False, None), (True, 300)])
@pytest.mark.parametrize("q, kv", [(128, 128), (128, 256), (256, 128), (512, 512)])
def test_tiles_are_counted_right(causal, window, q, kv):
    shape = Shape("tiny", 2, 512, 4, 2, 64, 64, causal=causal, window=window)
    i, j = np.arange(512)[:, None], np.arange(512)[None]
    seen = np.ones((512, 512), bool)
    seen &= (j <= i) | (not causal)
    seen &= (window is None) | (j > i - (window or 0))
    tiles = seen.reshape(512 // q, q, 512 // kv, kv).swapaxes(1, 2)
    some, every = tiles.any((2, 3)), tiles.all((2, 3))
    found = tpu_model.work(shape, "forward", Tile(q, kv))
    assert found.full == 8 * every.sum() and found.partial == 8 * (some & ~every).sum()
    assert found.rows == 8 * 512 // q
    assert tpu_model.work(shape, "dkv", Tile(q, kv)).rows == 4 * 512 // kv
    assert tpu_model.work(shape, "dq", Tile(q, kv, heads=2)).full == found.full / 2
    assert tpu_model.visible_pairs(shape) == seen.sum()
    assert tpu_model.flops(shape, "forward") == 2 * 8 * seen.sum() * 128
    assert tpu_model.flops(shape, "backward") == 2 * 8 * seen.sum() * (128 + 5 * 64)


def test_launches_in_a_jaxpr():
    def kernel(x, y):
        y[...] = x[...]

    def call(x):
        return pl.pallas_call(
            kernel, grid=(2, 3), out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            in_specs=[pl.BlockSpec((8, 128), lambda i, j: (0, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i, j: (0, 0)), name="thing_fwd",
        )(x)

    def f(x):
        return jax.lax.scan(lambda x, _: (jax.jit(call)(x), None), x, None, length=5)[0]

    jaxpr = jax.jit(f).trace(jnp.zeros((8, 128))).jaxpr
    assert tpu_model.launches(jaxpr.jaxpr) == [tpu_model.Launch("thing_fwd", 6, 5)]


def test_roles_are_names():
    for name, role in (("splash_mha_fwd", "forward"), ("my_dq", "dq"), ("bwd", "dkv")):
        assert tpu_model.Launch(name, 1).role == role
    with pytest.raises(DataError, match="its name tells no role"):
        _ = tpu_model.Launch("thing", 1).role


PROGRAM = """HloModule m

ENTRY %main (q: bf16[8,64]) -> bf16[8,64] {
  %q = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %copy.1 = f32[8,64]{1,0:T(8,128)} copy(%q), backend_config={"used_scoped_memory_configs":[]}
  %start = (f32[8,64]{1,0:T(8,128)S(1)}, f32[8,64]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%copy.1)
  %done = f32[8,64]{1,0:T(8,128)S(1)} copy-done(%start)
  %k = f32[8,64]{1,0:T(8,128)} custom-call(%done), custom_call_target="tpu_custom_call", metadata={
}, backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}
  ROOT %c = bf16[8,64]{0,1:T(8,128)(2,1)} convert(%k)
}
"""


def test_bytes_around_kernels(tmp_path):
    half, whole = 8 * 128 * 2, 8 * 128 * 4  # 64 columns are padded to 128
    turned = 64 * 128 * 2  # 8 columns to 128
    # The copy to VMEM touches HBM on one side only, and padding there does not count.
    moved = whole
    assert tpu_program.traffic(PROGRAM) == (half + whole) + moved + (whole + turned)
    assert tpu_program.kernel_vmem(PROGRAM) == 4096
    (tmp_path / "1-TLP-hlo.txt").write_text(PROGRAM)
    assert tpu_program.read(tmp_path) == PROGRAM
    with pytest.raises(DataError, match="hold no program"):
        tpu_program.read(tmp_path / "nowhere")


def test_slices_fetched_in_advance():
    """A slice on its way to VMEM moves its own bytes, not those of the array it is cut from."""
    start = ("((s8[4096]{0:T(1024)(128)(4,1)}), s8[1024]{0:T(1024)(128)(4,1)S(1)}, s32[]{:S(2)}) "
             "slice-start(%q), slice={[0:1024]}")
    program = PROGRAM.replace("  %k =", f"  %part = {start}\n  %k =")
    assert tpu_program.traffic(program) == tpu_program.traffic(PROGRAM) + 1024


def test_targets():
    assert json.dumps([t.name for t in TARGETS.values()])
    with pytest.raises(ConfigError, match="use one of v4, v5e, v5p, v6e, v7x, h200"):
        find("v9")

"""Training on 8 virtual devices is training on one."""

from __future__ import annotations

import json

import eight
import jax
import pytest

from attnlab.core.errors import ConfigError, MeshError
from attnlab.parallel import rules
from attnlab.parallel.mesh import make_mesh, parse


def results(name: str) -> dict:
    return json.loads(eight.run("sharded_training.py", name, timeout=580).splitlines()[-1])


def assert_close(got, want, rel):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=rel)


@pytest.mark.devices8
@pytest.mark.parametrize("name", ["gqa", "mqa", "sqa", "mla", "cca", "short conv"])
def test_meshes(name):
    found = results(name)
    assert found["devices"] == 8
    single, product = found["single"], "data=2,fsdp=2,tensor=2"
    assert single[-1][0] < single[0][0]
    meshes = [key[4:] for key in found if key.startswith("cut ")]
    assert product in meshes and (name != "gqa" or len(meshes) == 5)
    for mesh in meshes:
        assert_close(found[mesh], single, 1e-5)
        here, everywhere = found[f"opt {mesh}"]
        if mesh == "data=8":
            assert found[f"cut {mesh}"] == 0 and here == everywhere, "dp replicates"
        else:
            assert found[f"cut {mesh}"] > 0.6
        if mesh == "fsdp=8":
            assert here < everywhere / 7, "the optimizer state is cut as the parameters are"
    want = found["rest on the same mesh"]
    assert want == found[product][3:], "saving disturbs nothing"
    assert found[f"rest on {product}, 8"] == want and found["bitwise"]
    others = [key for key in found if key.startswith("rest on ") and product not in key]
    assert "rest on fsdp=4,tensor=2, 8" in others and (name != "gqa" or len(others) == 4)
    for key in others:
        assert_close(found[key], want, 1e-5)
    if name == "gqa":
        # Activations of one chunk, two rows a device, may be summed; no part of the table is.
        assert 0 < found["in loop"] <= 2 * 6 * 16 < 128 * 16 / 8
        kept = found["kept"]
        assert kept["none"] > kept["dots"] > kept["attention"] > kept["full"], kept
        for label in ("muon", "accumulate"):
            assert_close(*found[label], 2e-5)


@pytest.mark.devices8
@pytest.mark.parametrize("name", ["gqa", "sqa", "mla", "cca"])
def test_sums_over_devices_are_fp32(name, tmp_path):
    """Activations are bf16, yet nothing is added up over devices in it, forward or backward."""
    out = eight.run(
        "bf16_sums.py", name, "data=2,fsdp=2,tensor=2", str(tmp_path), timeout=300, cached=False,
        flags=f"--xla_dump_to={tmp_path} --xla_dump_hlo_pass_re=spmd.* --xla_dump_hlo_as_text",
    )
    found = json.loads(out.splitlines()[-1])
    assert len(found.get("f32", [])) > 20, "the program was not found"
    assert "bf16" not in found, found["bf16"]


# The tables and the arithmetic of meshes need no devices.


def test_rules():
    assert rules.RULES == rules.combine(["dp", "fsdp", "tp"])
    assert rules.RULES["batch"] == ("data", "fsdp") and rules.RULES["embed"] == ("fsdp",)
    assert rules.RULES["heads"] == ("tensor",) and "latent" not in rules.RULES
    assert rules.combine(["tp", "dp"]) == rules.combine(["dp", "tp"])
    assert rules.combine(["dp"]) == {"batch": ("data",)}
    with pytest.raises(MeshError, match="'pp'"):
        rules.combine(["pp"])


@pytest.mark.parametrize("text", ["data", "data=0", "data=x", "rows=2", "data=2,data=2", "data=-2"])
def test_bad_mesh_texts(text):
    with pytest.raises(MeshError, match="AXIS=SIZE"):
        parse(text)


def test_make_mesh():
    one = jax.devices()[:1]
    for sizes in (None, "data=1", "fsdp=-1", "data=1,fsdp=-1,tensor=1", {"tensor": 1}):
        mesh = make_mesh(sizes, one)
        assert mesh.axis_names == rules.MESH_AXES and mesh.size == 1
    for sizes, rule in (
        ("data=2", "needs 2 devices"),
        ("data=2,fsdp=-1", "a multiple of 2 devices"),
        ("data=-1,fsdp=-1", "only one axis can take the rest"),
    ):
        with pytest.raises(MeshError, match=rule):
            make_mesh(sizes, one)
    assert issubclass(MeshError, ValueError) and not issubclass(MeshError, ConfigError)

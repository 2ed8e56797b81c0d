"""The console script: help, errors, list, explain, check, and the table in the README."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import cli
from attnlab.analysis import check, explain, listing, printing
from attnlab.commands import convert, generate, parsing, train
from attnlab.core.dispatch import Device
from attnlab.core.errors import ConfigError
from attnlab.core.registry import VARIANTS, build_config, name_of
from attnlab.core.types import Precision
from attnlab.tasks import TASKS
from attnlab.train import recipe as recipes

NAMES = list(VARIANTS)


def parse(argv: list[str]):
    return parsing.parse(argv, cli.COMMANDS)


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    out = capsys.readouterr()
    return code, out.out, out.err


# Help.


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_help_shows_an_example(command, capsys):
    code, out, err = run(capsys, *filter(None, [command]), "--help")
    assert code == 0 and not err
    assert "example:\n  attnlab " in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_examples_parse(command):
    for line in cli.COMMANDS[command].example.splitlines():
        words = re.findall(r"'[^']*'|\S+", line)
        args = parse([word.strip("'") for word in words[1:]])
        assert args.run is cli.COMMANDS[command].run and not args.debug


def test_no_command_prints_help_and_fails(capsys):
    code, out, _ = run(capsys)
    assert code == 2 and "commands" in out


def test_version(capsys):
    code, out, _ = run(capsys, "--version")
    assert code == 0 and out.startswith("attnlab ")


# Errors: exit code 2, one line that names the value, the rule and the fix.


@pytest.mark.parametrize(
    "argv, wanted",
    [
        ("trian", ("attnlab trian", "not a command", "use train")),
        ("train --stpes 3", ("--stpes", "not a flag of attnlab train", "use --steps")),
        ("train --step=3", ("--step", "not a flag", "use --steps")),
        ("train --steps abc", ("--steps", "'abc' is not a whole number", "train --help")),
        ("train --steps 0", ("steps = 0", "at least 1", "use 1 or more")),
        ("train --packing tight", ("'tight'", "invalid choice", "--help")),
        ("train --profile 9:3", ("'9:3'", "START:STOP", "--help")),
        ("train quickstart 350m", ("'350m'", "unexpected argument", "--help")),
        ("train nope", ("recipe = 'nope'", "neither", "quickstart")),
        ("train nope.json --out x", ("nope.json", "does not exist", "check the path")),
        ("train --attention gqaa", ("'gqaa'", "not registered", "use gqa")),
        ("train --set train.stpes=3", ("train.stpes", "not a field", "use steps")),
        ("train --set steps", ("'steps'", "is not NAME=VALUE", "--set train.steps=100")),
        ("train --resume --attention gqa", ("--attention", "as it was started", "drop")),
        ("train --resume --overwrite", ("--overwrite", "not allowed with", "--help")),
        ("generate runs/x", ("--prompt", "is required", "--help")),
        ("tokenize --out x", ("--train", "is required", "--help")),
        ("explain --shape Q=3", ("--shape Q=3", "B, T, D, N, K, H", "write --shape")),
        ("explain --shape D=30,N=16,K=3", ("num_kv_heads = 3", "must divide", "use one of")),
        ("explain gqaa", ("'gqaa'", "not registered", "use gqa")),
        ("explain --shape B=²", ("--shape B=²", "LETTER=NUMBER", "write --shape")),
        ("explain mla --recipe 1b", ("mla with --recipe 1b", "its own layers", "--shape")),
        ("train --mesh =", ("mesh = '='", "is not AXIS=SIZE", "data=2,fsdp=2")),
        ("train --profile ²:3", ("'²:3'", "START:STOP", "--help")),
        ("train --set model.period.²=1", ("model.period.²", "there are 1 entries", "use 0")),
        ("generate x --prompt a --seed -1", ("--seed -1", "[0, 2**32)", "--seed 0")),
        (f"generate x --prompt a --seed {2**80}", ("--seed 1208", "[0, 2**32)", "--seed 0")),
        ("generate x --prompt a\udcff", (r"--prompt 'a\udcff'", "not valid UTF-8", "pass UTF-8")),
        ("generate x --prompt a --stop=", ("--stop ''", "every text", "token id")),
        ("bench train --steps 0", ("--steps 0", "at least 1", "use 1 or more")),
        ("bench train --warmup -1", ("--warmup -1", "at least 0", "use 0 or more")),
        ("bench train --batch 0", ("--batch 0", "at least 1", "use 1 or more")),
        ("bench attention --shape ci", ("--shape", "needs --target", "leave it out")),
        ("bench attention --target v5e --case t5", ("--case", "measures", "leave it out")),
        ("bench attention --target v9", ("target = 'v9'", "unknown", "v5p, v6e, v7x, h200")),
        ("bench attention --target v5e --all-targets", ("asks for one and for all", "drop one")),
        ("bench nothing", ("'nothing'", "invalid choice", "--help")),
        ("bench train --seq-len 0", ("seq_len = 0", "at least 2", "use 2 or more")),
        ("bench train --case t5", ("--case", "not a flag of attnlab bench")),
        ("bench attention --case t6", ("--case t6", "not a case", "use causal-128")),
        ("bench attention --impl gpus", ("--impl gpus", "not timed here", "use gpu")),
        ("bench attention --seq-len 100", ("--seq-len 100", "multiple of 128", "use 16384")),
        ("bench attention --case decode --impl flex", ("--case decode", "no cell", "for ours")),
        ("bench attention --seconds 0", ("--seconds 0", "must be positive", "use 480")),
        ("list --jsn", ("--jsn", "not a flag of attnlab list", "use --json")),
    ],
)
def test_wrong_command_lines(argv, wanted, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv.split())
    assert code == 2 and not out, (code, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and "Fix: " in err
    for part in wanted:
        assert part in err, (part, err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv, wanted",
    [
        ("convert x --to npz --overwrite --out {}", ("--out {}", "is a folder", "name a file")),
        ("tokenize --data {0}/a.json {0}/b.json --train 270 --overwrite --out {0}",
         ("file {}: is a folder", "name a file")),
        ("train {}/a.json --out {}/x", ("recipe: lacks ", "model", "train", "add what is missing")),
        ("bench train --out {}/a.json", ("--out {}/a.json", "not a JSON list", "another file")),
        ("bench train --out {}/b.json", ("--out {}/b.json", "cannot be read", "another file")),
        ("bench train --out {}", ("--out {}", "cannot be read", "another file")),
    ],
)
def test_wrong_files(argv, wanted, capsys, tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("[1,")
    code, _, err = run(capsys, *(word.replace("{0}", "{}").replace("{}", str(tmp_path))
                                 for word in argv.split()))
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    for part in wanted:
        assert part.replace("{}", str(tmp_path)) in err, (part, err)


def test_process_numbers(monkeypatch):
    from attnlab.core.errors import MeshError
    from attnlab.parallel import processes

    values = {"COORDINATOR_ADDRESS": "127.0.0.1:1", "NUM_PROCESSES": "x", "PROCESS_ID": "0"}
    for name, value in values.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    with pytest.raises(MeshError, match="JAX_NUM_PROCESSES = 'x': is not a whole number"):
        processes.start()


def test_exit_codes_and_debug(capsys, monkeypatch):
    from attnlab.core.errors import CheckpointError, NonFiniteError

    raised: dict[str, BaseException] = {}

    def fail(args):
        raise raised["error"]

    broken = parsing.Command("Fail.", "attnlab list", lambda parser: None, fail)
    monkeypatch.setitem(cli.COMMANDS, "list", broken)
    for error, code in (
        (ConfigError("a = 1", "is bad", "use 2"), 2),
        (CheckpointError("a", "is\nbad", "b"), 1),
        (NonFiniteError("a", "is bad", "b"), 1),
        (KeyboardInterrupt(), 130),
        (RuntimeError("two\nlines"), 1),
    ):
        raised["error"] = error
        found, _, err = run(capsys, "list")
        assert found == code and err.count("\n") == 1 and "Traceback" not in err
        with pytest.raises(type(error)):
            cli.main(["list", "--debug"])


# train: a flag is a shorthand for --set.


def test_flags_become_overrides():
    args = parse(
        "train --data a b --steps 3 --seed 7 --mesh data=2,fsdp=-1 --tokenizer 12 "
        "--set train.steps=5".split()
    )
    recipe = recipes.load("quickstart", train.overrides(args))
    assert recipe.data.data == ("a", "b") and recipe.data.tokenizer == "12"
    assert recipe.train.seed == recipe.data.seed == 7
    assert recipe.train.mesh == "data=2,fsdp=-1"
    assert recipe.train.steps == 5, "--set wins"
    assert recipes.load("350m", train.overrides(parse(["train"]))) == recipes.load("350m")


def test_every_short_names_real_fields():
    from attnlab.core.config import flat, to_dict

    known = flat(to_dict(recipes.load("quickstart")))
    for short in (short for shorts in train.SHORTS.values() for short in shorts):
        assert set(short.fields) <= known.keys(), short


def test_set_help_lists_fields(capsys):
    code, out, _ = run(capsys, "train", "350m", "--set", "help")
    lines = out.splitlines()
    assert code == 0 and lines == sorted(lines, key=lambda line: line.partition(" = ")[0])
    assert "train.steps = 30000" in lines and "model.period.0.num_kv_heads = 4" in lines


def test_train_calls_the_loop(monkeypatch):
    from attnlab.train import loop

    seen = {}

    def fake(recipe, out, overrides, **options):
        seen.update(options, recipe=recipe, out=out, overrides=overrides)
        return 7

    monkeypatch.setattr(loop, "run", fake)
    assert cli.main("train 350m --attention mla --steps 2 --tb --profile 3:5".split()) == 7
    assert name_of(type(seen["recipe"].model.period[0])) == "mla"
    assert seen["out"] == "runs/350m-mla" and seen["overrides"] == ["train.steps=2"]
    assert seen["trackers_wanted"] == ("tb",) and seen["profile"] == (3, 5)
    assert cli.main("train --resume --out runs/x --set train.steps=9".split()) == 7
    assert seen["recipe"] is None and seen["resume"] and seen["overrides"] == ["train.steps=9"]
    assert cli.main("train 350m --attention mla --resume --out runs/x".split()) == 7
    assert seen["resume"] and seen["recipe"].name == "350m", "for a restart before the first start"
    assert name_of(type(seen["recipe"].model.period[0])) == "mla"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preset", ["quickstart", "350m"])
def test_swapping_attention(name, preset):
    layer = recipes.load(preset).model.period[0]
    swapped = listing.swap(layer, name)
    assert name_of(type(swapped)) == name
    assert swapped.dim == layer.dim and swapped.precision == layer.precision
    assert (getattr(swapped, "num_heads_total", None) or swapped.num_heads) == layer.num_heads
    assert listing.shape_of(swapped).num_heads == layer.num_heads
    assert getattr(swapped, "rope_theta", layer.rope_theta) == layer.rope_theta
    assert listing.swap(swapped, name) is swapped


def test_swapping_does_not_lose_the_mask():
    layer = build_config("gqa", dim=64, num_heads=4, window=8)
    assert listing.swap(layer, "mla").window == 8
    sinks = build_config("gqa", dim=64, num_heads=4, window=8, sink_tokens=2)
    with pytest.raises(ConfigError, match="sink_tokens = 2: variant mla has no such field"):
        listing.swap(sinks, "mla")


# list and the README.


def test_list_names_everything(capsys):
    code, out, _ = run(capsys, "list")
    assert code == 0
    for word in (*NAMES, *recipes.RECIPES, *TASKS, "Ainslie", "xla"):
        assert word in out
    assert max(map(len, out.splitlines())) <= printing.PLAIN_WIDTH and "…" not in out


def test_list_json(capsys):
    code, out, _ = run(capsys, "list", "--json")
    found = json.loads(out)
    assert code == 0 and [row["name"] for row in found["variants"]] == NAMES
    gqa = found["variants"][NAMES.index("gqa")]
    assert gqa["cache_bytes_per_token_bf16"] == 2 * 4 * (128 + 128)
    assert gqa["implementations"]["cpu"] == ["xla"]
    assert [row["name"] for row in found["tasks"]] == list(TASKS)


@pytest.mark.parametrize("name", NAMES)
def test_rows_say_everything(name):
    row = listing.rows()[NAMES.index(name)]
    assert "not stated" not in str(row), f"the docstring of {name} lacks Cache: or Parallel forms:"
    assert row["cache_numbers_per_token"] > 0 and all(row["implementations"].values())


def test_readme_holds_the_generated_table(root):
    section = listing.readme_section((root / "README.md").read_text(encoding="utf-8"))
    assert section is not None, f"README.md needs {listing.MARK} and {listing.END_MARK}"
    assert section.strip() == listing.variant_table().strip(), "paste `attnlab list --readme`"


def test_readme_flag_and_marks(capsys):
    code, out, _ = run(capsys, "list", "--readme")
    assert code == 0 and out == listing.variant_table()
    assert "](https://arxiv.org/abs/2305.13245)" in out
    assert listing.readme_section(f"a\n{listing.MARK}\n{out}{listing.END_MARK}\nb") == out
    assert listing.readme_section("no marks") is None


# explain


def test_explain_covers_every_variant_and_pass(capsys):
    code, out, _ = run(capsys, "explain", "--shape", "T=64,D=64,N=4,K=2,H=16")
    assert code == 0
    for name in NAMES:
        for mode in explain.MODES:
            assert re.search(rf"^{name} +{mode} ", out, re.M), (name, mode)
    assert "reference: runs only when asked for" in out and "T = 64" in out


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_explain_answers_for_other_devices(platform):
    config = build_config("gqa", dim=64, num_heads=4, precision=Precision.named("bfloat16"))
    rows = explain.explain([("gqa", config)], tokens=64, on=explain.device(platform))
    for row in rows:
        op = explain.operator(row.op)
        assert row.chosen in op.order[platform]
        assert {row.chosen} | {name for name, _ in row.others} == set(op.implementations)
        assert all(why for _, why in row.others)


def test_explain_agrees_with_what_runs():
    config = build_config("gqa", dim=64, num_heads=4)
    for mode in explain.MODES:
        for op, call in explain.calls(config, mode, 2, 32):
            assert call.device == Device.default()
            (row,) = (
                r for r in explain.explain([("x", config)], batch=2, tokens=32) if r.mode == mode
            )
            assert row.chosen == explain.operator(op).choose(call).name


def test_explain_recipe_json(capsys):
    code, out, _ = run(capsys, "explain", "--recipe", "quickstart", "--json")
    rows = json.loads(out)
    assert code == 0 and {row["layer"] for row in rows} == {"cca (period.0)"}
    assert [row["mode"] for row in rows] == list(explain.MODES)


# check


def test_check_is_good_here(capsys):
    code, out, err = run(capsys, "check")
    assert code == 0, out + err
    assert "all good" in out.splitlines()[-1]
    for name in NAMES:
        assert f"kernels  {name}: " in out
        assert re.search(rf"^test     {name}, .*: (ok|not run)", out, re.M)


def test_check_reports_one_fix(capsys, monkeypatch):
    monkeypatch.setattr(check, "nvidia_gpu", lambda: "NVIDIA H200")
    monkeypatch.delenv("JAX_PLATFORMS")
    code, out, _ = run(capsys, "check")
    assert code == 1 and 'fix: pip install -U "attnlab[gpu]"' in out and out.count("fix: ") == 1
    monkeypatch.setattr(check, "installed", lambda name: "0.4.38" if name == "jax" else "99.0")
    code, out, _ = run(capsys, "check")
    assert code == 1 and 'fix: pip install -U "jax>=0.10.2"' in out


def test_check_names_the_failing_variant(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(check, "_tests", lambda: iter([("gqa, decode", lambda: 1 / 0)]))
    assert check._self_test(said.append, False, []).what.startswith("the self-test of gqa, decode")
    assert said == ["test     gqa, decode: FAILED"]
    with pytest.raises(ZeroDivisionError):
        check._self_test(said.append, True, [])


def test_check_minimums_are_those_of_the_package(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    bounds = dict(item.split(">=") for item in project["dependencies"])
    assert {n: bounds[n] for n in check.MINIMUM if n != "jaxlib"} == {
        n: v for n, v in check.MINIMUM.items() if n != "jaxlib"
    }
    assert check.EXTRAS.keys() <= project["optional-dependencies"].keys()


def test_version_order():
    assert check.too_old("0.10.1", "0.10.2") and check.too_old("0.9", "0.10.2")
    for version in ("0.10.2", "0.10.2.dev3+cuda", "0.11", "1"):
        assert not check.too_old(version, "0.10.2")


# eval, generate, convert: a run as load_run returns it, without the training.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from attnlab.data.tokenizer import load_tokenizer
    from attnlab.train.setup import make_trainer, read_data

    text = tmp_path_factory.mktemp("corpus")
    for i in range(4):
        (text / f"{i}.txt").write_text(f"document {i} is short\n" * 8)
    recipe = recipes.load("quickstart", [
        f"data.data={[str(text)]!r}", "model.repeats=2", "model.mlp_dim=16", "train.seq_len=16",
        "train.batch=2",
    ])
    trainer = make_trainer(recipe)
    return types.SimpleNamespace(
        recipe=recipe, trainer=trainer, params=trainer.init(0).params, layers=None, step=3,
        tokenizer=load_tokenizer("bytes"), corpus_fingerprint=read_data(recipe)[3],
    )


@pytest.fixture
def run_folder(trained, monkeypatch):
    """Every folder is the run ``trained``."""
    from attnlab.train import restore

    monkeypatch.setattr(restore, "load_run", lambda path, step=None: trained)
    return "runs/x"


def test_eval(run_folder, trained, capsys, monkeypatch, tmp_path):
    code, out, err = run(capsys, "eval", run_folder, "--json")
    row = json.loads(out.splitlines()[-1])
    assert code == 0 and not err and "nats/token" in out
    assert 4 < row["nats_per_token"] < 8 and row["step"] == 3 and row["on"] == "validation"
    bits = row["nats_per_token"] / np.log(2)  # a token is a byte, or the end of 160 of them
    assert row["bits_per_byte"] == pytest.approx(bits * 161 / 160, rel=1e-6)
    (tmp_path / "book.txt").write_text("x" * 40)
    code, out, _ = run(
        capsys, "eval", run_folder, "--data", str(tmp_path / "book.txt"), "--json", "--batch", "1"
    )
    assert code == 0 and json.loads(out.splitlines()[-1])["tokens"] == 41
    monkeypatch.setattr(trained, "corpus_fingerprint", "other")
    code, _, err = run(capsys, "eval", run_folder)
    assert code == 0 and "is not the one of the run (other)" in err


def test_generate(run_folder, capsys):
    argv = ["generate", run_folder, "--prompt", "doc", "--tokens", "5", "--seed", "1"]
    code, out, _ = run(capsys, *argv)
    assert code == 0 and out.startswith("doc")
    assert run(capsys, *argv)[1] == out, "the same seed gives the same text"
    code, out, _ = run(capsys, *argv[:4], "--prompt", "is", "--tokens", "2", "--greedy")
    assert code == 0 and out.startswith("--- prompt 1\ndoc") and "--- prompt 2\nis" in out
    code, _, err = run(capsys, *argv, "--top-p", "2")
    assert code == 2 and "top_p = 2.0" in err
    assert run(capsys, *argv, "--stop", "²", "--seed", str(2**32 - 1))[0] == 0


def test_convert(run_folder, trained, capsys, tmp_path):
    out = tmp_path / "sub" / "model.npz"
    argv = ["convert", run_folder, "--to", "npz", "--layout", "unstacked", "--out", str(out)]
    code, said, _ = run(capsys, *argv)
    assert code == 0 and "arrays" in said
    with np.load(out) as file:
        w_q = trained.params["blocks"]["0"]["attn"]["w_q"]
        np.testing.assert_array_equal(file["blocks.1.attn.w_q"], w_q[1])
        assert json.loads(str(file["__attnlab_recipe__"]))["name"] == "quickstart"
    code, _, err = run(capsys, *argv)
    assert code == 2 and "exists" in err and "--overwrite" in err


# Small parts of the other commands.


def test_generated_text_is_cut_at_stop_words():
    assert generate.cut("abc def", ["def", "c"]) == "ab" and generate.cut("abc", ["x"]) == "abc"
    assert generate.cut("abc", []) == "abc"


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_cuts_the_text_of_the_bar_only(width):
    from rich.console import Console
    from rich.progress import Progress

    from attnlab.train import progress

    console = Console(width=width, force_terminal=True, no_color=True, soft_wrap=True)
    bar = Progress(*progress.columns(), console=console)
    row = {"loss": 3.14, "val_loss": 3.2, "val_bits_per_byte": 1.3, "tokens_per_s": 1e6}
    bar.add_task("train", total=1_000_000, completed=12_345, text=progress.describe(row))
    with console.capture() as captured:
        console.print(bar.get_renderable())
    line, rest = captured.get().split("\n", 1)
    assert " 12345/1000000" in line and "-:--:--" in line and "loss 3.1400" in line
    assert "…" in line and not rest


@pytest.mark.parametrize("layout", ["stacked", "unstacked"])
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_convert_writes_parameters(kind, layout, tmp_path):
    params = {"embedding": np.ones((4, 2), np.float32),
              "blocks": {"0": {"attn": {"w": np.arange(6.0, dtype=np.float32).reshape(3, 2)}}}}
    arrays = convert.named_arrays(params, layout)
    names = {f"blocks.{i}.attn.w" for i in range(1 if layout == "stacked" else 3)}
    assert arrays.keys() == {"embedding"} | names
    out = str(tmp_path / f"model.{kind}")
    write = {"npz": convert.write_npz, "safetensors": convert.write_safetensors}[kind]
    if kind == "safetensors":
        flax_file = pytest.importorskip("safetensors.flax")
        arrays["half"] = np.asarray(jnp.full((2,), 0.5, jnp.bfloat16))
        read = flax_file.load_file
    else:
        read = np.load
    write(arrays, out, {"step": "3"})
    back = read(out)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(back[name]), array)


def test_npz_refuses_bfloat16(tmp_path):
    half = {"w": np.asarray(jnp.ones(2, jnp.bfloat16))}
    with pytest.raises(ConfigError, match="use --to safetensors"):
        convert.write_npz(half, str(tmp_path / "x.npz"), {})


def test_tokenize_and_read_back(tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(3):
        (text / f"{i}.txt").write_text(f"document {i}\n" * 4)
    argv = ["tokenize", "--data", str(text), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]
    code, out, _ = run(capsys, *argv)
    assert code == 0 and "next: attnlab train --data" in out
    code, _, err = run(capsys, *argv)
    assert code == 2 and "exists" in err
    assert cli.main([*argv, "--overwrite"]) == 0


# Import time and weight.


def probe(code: str, root: Path) -> str:
    """The output of a fresh Python process."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_importing_attnlab_is_light(root):
    heavy = "sorted({'jax', 'flax', 'numpy', 'optax', 'grain', 'rich'} & set(sys.modules))"
    assert probe(f"import sys, attnlab, attnlab.cli; print({heavy})", root) == "[]"


def test_help_imports_nothing_heavy(root):
    code = "import sys; from attnlab import cli; [cli.main([c, '--help']) for c in cli.COMMANDS]; "
    assert probe(code + "print('jax' in sys.modules)", root).endswith("False")


def test_names_import_fast_and_without_extras(root):
    """Everything the table of contents names: below 1 s of processor time beyond jax and flax."""
    extras = "tokamax jax_triton safetensors tokenizers tensorboardX wandb gcsfs fsspec torch"
    code = (
        "import sys, time, jax, jax.numpy, flax.nnx, flax.linen; "
        "before = set(sys.modules); start = time.process_time(); "
        "import attnlab; [getattr(attnlab, n) for n in attnlab.__all__]; "
        "print(time.process_time() - start, "
        f"sorted(set('{extras}'.split()) & (set(sys.modules) - before)))"
    )
    seconds, _, found = probe(code, root).partition(" ")
    assert found == "[]"
    assert float(seconds) < 1.0, seconds

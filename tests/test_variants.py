"""Every variant as a job: trained, resumed, evaluated, loaded, used; and what it refuses."""

import shutil

import jax
import numpy as np
import pytest
import workdirs
from naive_perplexity import naive_rows

import latent_delib as ld
from latent_delib import convert, evaluate, train
from latent_delib import mesh as mesh_lib
from latent_delib.data import batches
from latent_delib.delib import augment
from latent_delib.delib.step import TrainState
from latent_delib.errors import UserError
from latent_delib.job import build, experiment, parameters
from latent_delib.job import plan as planning
from latent_delib.lm.load import decoder_of, read_record
from latent_delib.measure.text import read_validation_text
from latent_delib.weights import folder
from tests.shared_steps import shared_steps

pytestmark = pytest.mark.usefixtures("shared_steps")

HALF = {
    "num_layers": 2,
    "embed_dim": 24,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "ffn_dim": 20,
}
VARIANTS = {
    "last_layer": {},
    "static_tokens": {},
    "latent_tokens": {"method.placement": "shared", "method.every": 2},
    "inserted": {"method.placement": "overlay"},
    "joint": {},
    "unified": {},
    "sequential": {},
    "cartridge": {"method.placement": "overlay"},
    "feedback": {},
    "resized": {"method.coprocessor": HALF},
    "assistant": {"method.assistant": "HERE", "method.placement": "overlay"},
    "assistant lora": {
        "method.name": "assistant",
        "method.assistant": "HERE",
        "method.lora_rank": 2,
    },
    "lora": {"method.name": "cache_augmentation", "method.lora_rank": 2},
    "decoder lora": {"method.name": "decoder", "method.lora_rank": 2},
    "delayed": {
        "method.name": "cache_augmentation",
        "method.max_delay": 3,
        "method.placement": "overlay",
    },
}
TRAINS_DECODER = ("joint", "unified", "feedback", "decoder lora")


def changes(variant):
    return {"method.name": variant} | VARIANTS[variant]


FAST = "unified"  # it stands for all, since it trains both models; the others take minutes
PARAMS = [v if v == FAST else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS]


@pytest.fixture(scope="module", params=PARAMS)
def job(request, make_config, assistant_folder, tmp_path_factory):
    """The name of a variant, its config, and the workdir of its four steps."""
    workdir = tmp_path_factory.mktemp("variant") / "workdir"
    changed = changes(request.param)
    if "method.assistant" in changed:
        changed["method.assistant"] = str(assistant_folder)
    config = make_config(changed)
    with shared_steps():
        train.train(config, str(workdir))
    return request.param, config, workdir


@pytest.fixture(scope="module")
def plain_column(make_config, tmp_path_factory):
    """The decoder's column of an evaluation of the frozen decoder alone."""
    out = tmp_path_factory.mktemp("plain")
    rows = evaluate.evaluate(make_config({"method.name": "decoder"}), "nowhere", str(out))["rows"]
    return [row["decoder_ppl"] for row in rows]


def test_all_that_is_trained_moves_and_resumes(job, tmp_path):
    """Every leaf of the trainable tree; a run that begins again midway is the same bit for bit."""
    variant, config, workdir = job
    one, other = workdirs.weights_of(workdir, 2), workdirs.weights_of(workdir, 4)
    for path, leaf in jax.tree_util.tree_leaves_with_path(other):
        before = one
        for key in path:
            before = before[key.key]
        moves = np.any(np.asarray(before) != np.asarray(leaf))
        name = jax.tree_util.keystr(path)
        if variant == "last_layer" or "scale" not in name or "norm" not in name:
            assert moves, name
    assert ("decoder" in other) == (variant in TRAINS_DECODER)
    assert ("coprocessor" in other) == (variant != "decoder lora")

    shutil.copytree(workdir, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    train.train(config, str(tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, workdirs.weights_of(tmp_path / "again", 4), other)


def test_it_is_evaluated_against_the_decoder_that_was_frozen(
    job, plain_column, decoder_folder, tmp_path
):
    """The rows say what the loaded model says; the decoder's column is the same for all."""
    variant, config, workdir = job
    rows = evaluate.evaluate(config, str(workdir), str(tmp_path))["rows"]
    assert [row["decoder_ppl"] for row in rows] == plain_column
    assert abs(rows[0]["change_percent"]) > 1e-3
    lm = load(workdir, decoder_folder, variant)
    expected = naive_rows(lm, read_validation_text(experiment.read(config)).pieces)
    np.testing.assert_allclose(
        [row["augmented_ppl"] for row in rows], [row[3] for row in expected], rtol=1e-5
    )


def test_training_begins_with_all_that_another_run_has_trained(job, make_config):
    """The decoder too; with more latents, new soft tokens begin as the last one ended."""
    variant, config, workdir = job
    start = changes(variant) | {
        "method.assistant": config.method.assistant,
        "method.start": f"{workdir}/checkpoints/4",
    }
    L = config.method.num_latents
    more = {"method.num_latents": L + 1}
    if "lora" in variant:
        said = "a decoder's adapters are added|method.lora_rank is 2 there, expected 0"
        with pytest.raises(UserError, match=said):
            begun(make_config(start))
        return
    tree = workdirs.weights_of(workdir, 4)
    jax.tree.map(np.testing.assert_array_equal, begun(make_config(start)), tree)
    refused = pytest.raises(UserError, match="num_latents is . there, .* weights for each")
    of_more = make_config(start | more)
    if variant == "cartridge":
        with refused:
            begun(of_more)
        return
    if variant != "feedback":  # it has one soft token
        soft_tokens = tree["coprocessor"]["soft_tokens"]
        tree["coprocessor"]["soft_tokens"] = np.concatenate([soft_tokens, soft_tokens[-1:]])
        with refused:
            begun(make_config(start | {"method.num_latents": L - 1}))
    jax.tree.map(np.testing.assert_array_equal, begun(of_more), tree)


def begun(config):
    """The tree that a job trains, before its first step."""
    exp = experiment.read(config)
    plan = planning.make(exp)
    frozen = parameters.load_frozen(exp) if plan.frozen else {}
    trainable, _ = train.init_state(exp, plan, frozen)
    return trainable


def load(workdir, decoder_folder, variant):
    decoder = workdir / "decoder" if variant in TRAINS_DECODER else decoder_folder
    coprocessor = None if variant == "decoder lora" else ld.load_coprocessor(str(workdir))
    return ld.AugmentedLM(ld.load_decoder(str(decoder)), coprocessor)


def test_it_generates_what_it_scores(job, decoder_folder):
    """Greedy text is the likeliest, by the model's own scores; and again after three tokens."""
    variant, _, workdir = job
    lm = load(workdir, decoder_folder, variant)
    (found,) = lm.continuations(["the cat sat on"], 5)
    total, greedy = lm.logprobs(["the cat sat on"], [found.tokens.tolist()])
    assert greedy[0] and total[0] < 0
    joined = {"decoder lora": (), "latent_tokens": (0, 2, 4)}.get(variant, (0,))
    assert found.joined == joined
    if variant == "latent_tokens":
        return  # its rhythm is its own
    (again,) = lm.continuations(["the cat sat on"], 6, every=3)
    prompt = [lm.tokenizer.bos_id, *lm.tokenizer.encode("the cat sat on")]
    assert again.tokens[:3].tolist() == found.tokens[:3].tolist()
    _, greedy = lm.logprobs([prompt + again.tokens[:3].tolist()], [again.tokens[3:].tolist()])
    assert greedy[0]


def test_what_was_trained_together_stays_together(job, decoder_folder, tmp_path, capsys):
    """The decoder in a workdir is of its last step; called again, the job leaves it."""
    variant, config, workdir = job
    if variant not in TRAINS_DECODER:
        assert ld.load_coprocessor(str(workdir), 2).step == 2
        return
    if variant != "decoder lora":
        with pytest.raises(UserError, match="step 4.* step 2"):
            ld.load_coprocessor(str(workdir), 2)
    written = (workdir / "decoder" / "model.safetensors").stat().st_mtime_ns
    train.train(config, str(workdir))
    assert (workdir / "decoder" / "model.safetensors").stat().st_mtime_ns == written
    # killed before it was written; or trained on since
    again = shutil.copytree(workdir, tmp_path / "again")
    for damage in (
        lambda: shutil.rmtree(again / "decoder"),
        lambda: (again / "decoder/trained.json").write_text('{"step": 2}'),
    ):
        damage()
        train.train(config, str(again))
        assert folder.fingerprint(again / "decoder") == folder.fingerprint(workdir / "decoder")
        assert build.step_of_decoder(str(again)) == 4
    if variant != "decoder lora":
        convert.convert(str(workdir), str(tmp_path / "out"))
        exported = ld.load_coprocessor(str(tmp_path / "out"))
        ld.AugmentedLM(ld.load_decoder(str(workdir / "decoder")), exported)
        with pytest.raises(UserError, match="decoder"):
            ld.AugmentedLM(ld.load_decoder(str(decoder_folder)), exported)
        card = (tmp_path / "out" / "README.md").read_text()
        assert exported.fingerprint in card and f"{workdir}/decoder" in card
        out = str(tmp_path / "out")
        with pytest.raises(UserError, match="an export has no decoder"):
            decoder_of(out, read_record(out))
        with pytest.raises(UserError, match="an export has no decoder"):
            evaluate.read_checkpoint(experiment.read(config), out, None)


def test_adapters_are_written_into_the_decoder_they_adapt(make_config, decoder_folder, tmp_path):
    config = make_config(changes("decoder lora"))
    train.train(config, str(tmp_path))
    exp = experiment.read(config)
    original = folder.load(decoder_folder, exp.aug.transformer.config, np.float32)
    expected = augment.assemble({"decoder": original}, workdirs.weights_of(tmp_path, 4))["decoder"]
    found = folder.load(tmp_path / "decoder", exp.aug.transformer.config, np.float32)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), found, expected
    )
    assert np.any(found["layers"]["mlp"]["up"] != original["layers"]["mlp"]["up"])
    np.testing.assert_array_equal(found["embedding"], original["embedding"])


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 2])
@pytest.mark.usefixtures("shared_steps")
def test_a_coprocessor_to_start_from(make_config, trained, decoder_folder, tmp_path, rank):
    """In whole or under adapters: its own first loss, resumed bit for bit, loaded as evaluated."""
    begun = ld.load_coprocessor(str(trained))
    start = f"{shutil.copytree(trained, tmp_path / 's')}/checkpoints/4"
    config = make_config(
        {"method.start": start, "method.lora_rank": rank, "optimizer.warmup_steps": 0}
    )
    train.train(config, str(tmp_path / "w"))
    first = workdirs.rows_of(tmp_path / "w")[0]["loss"]
    np.testing.assert_allclose(first, first_loss(make_config(), begun.params), rtol=1e-5)
    done = workdirs.weights_of(tmp_path / "w", 4)
    if not rank:  # then what it began with is needed no longer
        shutil.rmtree(tmp_path / "s")
    shutil.rmtree(tmp_path / "w" / "checkpoints" / "4")
    train.train(config, str(tmp_path / "w"))
    jax.tree.map(np.testing.assert_array_equal, workdirs.weights_of(tmp_path / "w", 4), done)
    own = ld.load_coprocessor(str(tmp_path / "w"))
    assert jax.tree.structure(own.params) == jax.tree.structure(begun.params)
    assert (
        np.abs(own.params["layers"]["mlp"]["up"] - begun.params["layers"]["mlp"]["up"]).max() > 1e-5
    )

    def evaluated():
        return evaluate.evaluate(config, str(tmp_path / "w"), str(tmp_path / "out"))["rows"]

    rows = evaluated()
    lm = ld.AugmentedLM(ld.load_decoder(str(decoder_folder)), own)
    expected = naive_rows(lm, read_validation_text(experiment.read(config)).pieces)
    np.testing.assert_allclose(
        [row["augmented_ppl"] for row in rows], [row[3] for row in expected], rtol=1e-5
    )
    if rank:  # another training has put other weights at the place of those below the adapters
        shutil.rmtree(tmp_path / "s")
        train.train(make_config({"seed": 1}), str(tmp_path / "s"))
        with pytest.raises(UserError, match="its adapters belong to another checkpoint than"):
            ld.load_coprocessor(str(tmp_path / "w"))
        for again in (lambda: train.train(config, str(tmp_path / "w")), evaluated):
            with pytest.raises(UserError, match="start.fingerprint is"):
                again()


def first_loss(config, coprocessor):
    """Of a coprocessor on the first batch of a job."""
    exp = experiment.read(config)
    plan = planning.make(exp)
    found = {"coprocessor": jax.device_get(coprocessor)}
    trainable = jax.device_put(found, planning.shardings_of(plan.state.trainable))
    opt_state = jax.jit(
        plan.optimizer.tx.init, out_shardings=planning.shardings_of(plan.state.opt_state)
    )(trainable)
    step = jax.device_put(np.int32(0), plan.state.step.sharding)
    text = batches.Training(config.data, str(exp.tokenizer.path))
    rows = next(text.batches(batch_size=config.train.batch_size, seed=config.seed))
    batch = mesh_lib.place_rows(exp.mesh, rows, config.train.batch_size)
    compiled = planning.compile_step(exp, plan)
    _, values = compiled(TrainState(step, trainable, opt_state), parameters.load_frozen(exp), batch)
    return float(values["loss"])


def test_a_start_of_another_method_is_refused(make_config, trained, tmp_path):
    config = make_config({"method.name": "last_layer", "method.start": f"{trained}/checkpoints/4"})
    with pytest.raises(
        UserError, match="config.method.start=.*/checkpoints/4: method.name.*'cache_augmentation'"
    ):
        train.train(config, str(tmp_path / "w"))


@pytest.mark.slow
def test_exports(make_config, trained, tmp_path):
    """Adapters are exported multiplied out, a coprocessor of another size with its maps."""
    train.train(make_config(changes("lora")), str(tmp_path / "w"))
    convert.convert(str(tmp_path / "w"), str(tmp_path / "out"))
    found, expected = (
        ld.load_coprocessor(str(tmp_path / "out")),
        ld.load_coprocessor(str(tmp_path / "w")),
    )
    decoder = ld.load_decoder(make_config().decoder.path)
    below = jax.device_get(decoder.params)
    params = augment.assemble({"decoder": below}, {"coprocessor": jax.device_get(expected.params)})[
        "coprocessor"
    ]
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    train.train(make_config(changes("resized")), str(tmp_path / "r"))
    convert.convert(str(tmp_path / "r"), str(tmp_path / "resized"))
    text, at = np.arange(3, 23)[None], np.array([[2, 9]])
    exported, trained = (
        ld.AugmentedLM(decoder, ld.load_coprocessor(str(tmp_path / name))).latents(text, at)
        for name in ("resized", "r")
    )
    np.testing.assert_array_equal(exported, trained)
    # Only the decoder has adapters: the export has soft tokens alone.
    train.train(make_config(changes("unified") | {"method.lora_rank": 2}), str(tmp_path / "u"))
    convert.convert(str(tmp_path / "u"), str(tmp_path / "unified"))
    assert ld.load_coprocessor(str(tmp_path / "unified")).params.keys() == {"soft_tokens"}

"""Every variant as a job: trained, resumed, evaluated, loaded, used; and what it refuses."""

import shutil
from typing import NamedTuple

import jax
import numpy as np
import pytest
import workdirs
from naive_perplexity import naive_rows

import latent_delib as ld
from latent_delib import convert, evaluate, train
from latent_delib import mesh as mesh_lib
from latent_delib.data import batches
from latent_delib.delib import augment, lora
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


class Variant(NamedTuple):
    """Names a variant's changes of the config, and in what it differs from most variants."""

    changes: dict
    norms_move: bool = False  # every scale of a norm moves too
    adapts: bool = False  # trains adapters
    trains_decoder: bool = False
    has_coprocessor: bool = True
    one_soft_token: bool = False  # for all latents
    grows: bool = True  # begins with the weights of a run with fewer latents
    recurs: bool = False  # its latents join in a rhythm of their own
    joined: tuple[int, ...] = (0,)  # the tokens of an answer at which latents join


def method(name, **changes):
    """Returns the config's changes for a method."""
    return {"method.name": name} | {f"method.{key}": value for key, value in changes.items()}


VARIANTS = {
    "last_layer": Variant(method("last_layer"), norms_move=True),
    "static_tokens": Variant(method("static_tokens")),
    "latent_tokens": Variant(
        method("latent_tokens", placement="shared", every=2), recurs=True, joined=(0, 2, 4)
    ),
    "inserted": Variant(method("inserted", placement="overlay")),
    "joint": Variant(method("joint"), trains_decoder=True),
    "unified": Variant(method("unified"), trains_decoder=True),
    "sequential": Variant(method("sequential")),
    "cartridge": Variant(method("cartridge", placement="overlay"), grows=False),
    "feedback": Variant(method("feedback"), trains_decoder=True, one_soft_token=True),
    "resized": Variant(method("resized", coprocessor=HALF)),
    "assistant": Variant(method("assistant", assistant="HERE", placement="overlay")),
    "assistant lora": Variant(method("assistant", assistant="HERE", lora_rank=2), adapts=True),
    "lora": Variant(method("cache_augmentation", lora_rank=2), adapts=True),
    "decoder lora": Variant(
        method("decoder", lora_rank=2),
        adapts=True,
        trains_decoder=True,
        has_coprocessor=False,
        joined=(),
    ),
    "delayed": Variant(method("cache_augmentation", max_delay=3, placement="overlay")),
}
FAST = "unified"  # it stands for all, since it trains both models; the others take minutes
PROMPT = "the cat sat on"
OTHER_NUMBER = "num_latents is . there, .* weights for each"  # refused


def variants(**fields):
    """Runs a test on the job of every variant with these fields."""
    chosen = []
    for name, variant in VARIANTS.items():
        if all(getattr(variant, field) == value for field, value in fields.items()):
            chosen.append(pytest.param(name, marks=() if name == FAST else pytest.mark.slow))
    return pytest.mark.parametrize("job", chosen, indirect=True)


@pytest.fixture(scope="module")
def job(request, make_config, assistant_folder, tmp_path_factory):
    """A variant, its config, and the workdir of its four steps."""
    workdir = tmp_path_factory.mktemp("variant") / "workdir"
    variant = VARIANTS[request.param]
    changes = dict(variant.changes)
    if "method.assistant" in changes:
        changes["method.assistant"] = str(assistant_folder)
    config = make_config(changes)
    with shared_steps():
        train.train(config, str(workdir))
    return variant, config, workdir


@pytest.fixture(scope="module")
def lm(job, decoder_folder):
    """The model that the job has trained."""
    variant, _, workdir = job
    decoder = workdir / "decoder" if variant.trains_decoder else decoder_folder
    coprocessor = ld.load_coprocessor(str(workdir)) if variant.has_coprocessor else None
    return ld.AugmentedLM(ld.load_decoder(str(decoder)), coprocessor)


@pytest.fixture
def begun(job, make_config):
    """begun(more) -> the tree of a job that begins with this one's weights, and `more` latents."""
    variant, config, workdir = job
    start = variant.changes | {
        "method.assistant": config.method.assistant,
        "method.start": f"{workdir}/checkpoints/4",
    }

    def tree(more=0):
        changes = start | {"method.num_latents": config.method.num_latents + more}
        exp = experiment.read(make_config(changes))
        plan = planning.make(exp)
        frozen = parameters.load_frozen(exp) if plan.frozen else {}
        trainable, _ = train.init_state(exp, plan, frozen)
        return trainable

    return tree


@pytest.fixture(scope="module")
def plain_column(make_config, tmp_path_factory):
    """The decoder's column of an evaluation of the frozen decoder alone."""
    out = tmp_path_factory.mktemp("plain")
    rows = evaluate.evaluate(make_config({"method.name": "decoder"}), "nowhere", str(out))["rows"]
    return [row["decoder_ppl"] for row in rows]


@variants()
def test_all_that_is_trained_moves(job):
    """Every leaf of the trainable tree, and no other model has a leaf in it."""
    variant, _, workdir = job
    before, after = workdirs.weights_of(workdir, 2), workdirs.weights_of(workdir, 4)
    leaves = jax.tree_util.tree_leaves_with_path(after)
    for (path, leaf), old in zip(leaves, jax.tree.leaves(before), strict=True):
        name = jax.tree_util.keystr(path)
        if variant.norms_move or "scale" not in name or "norm" not in name:
            assert np.any(old != leaf), name
    assert ("decoder" in after) == variant.trains_decoder
    assert ("coprocessor" in after) == variant.has_coprocessor


@variants()
def test_it_resumes_bit_for_bit(job, tmp_path):
    _, config, workdir = job
    workdirs.copy_at_step_2(workdir, again := tmp_path / "again")
    train.train(config, str(again))
    found, expected = workdirs.weights_of(again, 4), workdirs.weights_of(workdir, 4)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@variants()
def test_it_is_evaluated_against_the_decoder_that_was_frozen(job, lm, plain_column, tmp_path):
    """The rows say what the loaded model says; the decoder's column is the same for all."""
    _, config, workdir = job
    rows = evaluate.evaluate(config, str(workdir), str(tmp_path))["rows"]
    assert [row["decoder_ppl"] for row in rows] == plain_column
    assert abs(rows[0]["change_percent"]) > 1e-3
    expected = naive_rows(lm, read_validation_text(experiment.read(config)).pieces)
    np.testing.assert_allclose(
        [row["augmented_ppl"] for row in rows], [row[3] for row in expected], rtol=1e-5
    )


@variants()
def test_it_generates_what_it_scores(job, lm):
    """Greedy text is the likeliest, by the model's own scores."""
    variant, _, _ = job
    (found,) = lm.continuations([PROMPT], 5)
    total, greedy = lm.logprobs([PROMPT], [found.tokens.tolist()])
    assert greedy[0] and total[0] < 0
    assert found.joined == variant.joined


@variants(recurs=False)
def test_latents_join_again_after_three_tokens(lm):
    """The first three tokens stay; what follows is the likeliest after them as a prompt."""
    (once,) = lm.continuations([PROMPT], 5)
    (again,) = lm.continuations([PROMPT], 6, every=3)
    first, rest = again.tokens[:3].tolist(), again.tokens[3:].tolist()
    assert first == once.tokens[:3].tolist()
    prompt = [lm.tokenizer.bos_id, *lm.tokenizer.encode(PROMPT)]
    _, greedy = lm.logprobs([prompt + first], [rest])
    assert greedy[0]


@variants(adapts=False)
def test_a_run_begins_with_anothers_weights(job, begun):
    """All that was trained there, the decoder too."""
    _, _, workdir = job
    jax.tree.map(np.testing.assert_array_equal, begun(), workdirs.weights_of(workdir, 4))


@variants(adapts=True)
def test_adapters_are_no_start(begun):
    said = "adapters of a decoder can be added|holds adapters, expected whole weights"
    with pytest.raises(UserError, match=said):
        begun()


@variants(adapts=False, grows=True, one_soft_token=False)
def test_more_latents_begin_as_the_last(job, begun):
    """A new soft token begins as the last one ended."""
    _, _, workdir = job
    tree = workdirs.weights_of(workdir, 4)
    soft_tokens = tree["coprocessor"]["soft_tokens"]
    tree["coprocessor"]["soft_tokens"] = np.concatenate([soft_tokens, soft_tokens[-1:]])
    jax.tree.map(np.testing.assert_array_equal, begun(more=1), tree)


@variants(one_soft_token=True)
def test_one_soft_token_begins_more_latents(job, begun):
    _, _, workdir = job
    jax.tree.map(np.testing.assert_array_equal, begun(more=1), workdirs.weights_of(workdir, 4))


@variants(adapts=False, grows=True, one_soft_token=False)
def test_fewer_are_refused(begun):
    with pytest.raises(UserError, match=OTHER_NUMBER):
        begun(more=-1)


@variants(grows=False)
def test_more_are_refused_where_none_can_be_added(begun):
    with pytest.raises(UserError, match=OTHER_NUMBER):
        begun(more=1)


@variants(trains_decoder=False)
def test_a_frozen_decoder_fits_an_earlier_step(job):
    _, _, workdir = job
    assert ld.load_coprocessor(str(workdir), 2).step == 2


@variants(trains_decoder=True, has_coprocessor=True)
def test_a_trained_decoder_fits_no_earlier_step(job):
    """The decoder in a workdir is of its last step."""
    _, _, workdir = job
    with pytest.raises(UserError, match="step 2.* step 4"):
        ld.load_coprocessor(str(workdir), 2)


@variants(trains_decoder=True)
def test_a_finished_job_leaves_the_decoder(job):
    """Called again, it writes nothing."""
    _, config, workdir = job
    weights = workdir / "decoder" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    train.train(config, str(workdir))
    assert weights.stat().st_mtime_ns == written


def make_older(decoder):
    """Lets a decoder say that it is of step 2."""
    (decoder / "trained.json").write_text('{"step": 2}')


@variants(trains_decoder=True)
@pytest.mark.parametrize("damage", [shutil.rmtree, make_older])
def test_a_lost_or_older_decoder_is_written_again(job, damage, tmp_path):
    """The job was killed before it was written, or has trained on since."""
    _, config, workdir = job
    again = shutil.copytree(workdir, tmp_path / "again")
    damage(again / "decoder")
    train.train(config, str(again))
    assert folder.fingerprint(again / "decoder") == folder.fingerprint(workdir / "decoder")
    assert build.step_of_decoder(str(again)) == 4


@variants(trains_decoder=True, has_coprocessor=True)
def test_an_export_takes_only_its_decoder(job, decoder_folder, tmp_path):
    """It names the decoder that was trained with it, and has none of its own."""
    _, config, workdir = job
    out = str(tmp_path / "out")
    convert.convert(str(workdir), out)
    exported = ld.load_coprocessor(out)
    ld.AugmentedLM(ld.load_decoder(str(workdir / "decoder")), exported)
    with pytest.raises(UserError, match="decoder"):
        ld.AugmentedLM(ld.load_decoder(str(decoder_folder)), exported)
    card = (tmp_path / "out" / "README.md").read_text()
    assert exported.fingerprint in card and f"{workdir}/decoder" in card
    with pytest.raises(UserError, match="an export has no decoder"):
        decoder_of(out, read_record(out))
    with pytest.raises(UserError, match="an export has no decoder"):
        evaluate.read_checkpoint(experiment.read(config), out, None)


def test_adapters_are_written_into_the_decoder_they_adapt(make_config, decoder_folder, tmp_path):
    config = make_config(VARIANTS["decoder lora"].changes)
    train.train(config, str(tmp_path))
    original = ld.load_decoder(decoder_folder).params
    whole = augment.assemble({"decoder": original}, workdirs.weights_of(tmp_path, 4))["decoder"]
    expected = lora.multiply_out(whole)
    found = ld.load_decoder(tmp_path / "decoder").params
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), found, expected
    )
    assert np.any(found["layers"]["mlp"]["up"] != original["layers"]["mlp"]["up"])
    np.testing.assert_array_equal(found["embedding"], original["embedding"])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
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
    text = batches.Training(config.data, exp.tokenizer)
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
    train.train(make_config(VARIANTS["lora"].changes), str(tmp_path / "w"))
    convert.convert(str(tmp_path / "w"), str(tmp_path / "out"))
    found, expected = (
        ld.load_coprocessor(str(tmp_path / "out")),
        ld.load_coprocessor(str(tmp_path / "w")),
    )
    decoder = ld.load_decoder(make_config().decoder.path)
    below = jax.device_get(decoder.params)
    trained = {"coprocessor": jax.device_get(expected.params)}
    params = lora.multiply_out(augment.assemble({"decoder": below}, trained)["coprocessor"])
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    train.train(make_config(VARIANTS["resized"].changes), str(tmp_path / "r"))
    convert.convert(str(tmp_path / "r"), str(tmp_path / "resized"))
    text, at = np.arange(3, 23)[None], np.array([[2, 9]])
    exported, trained = (
        ld.AugmentedLM(decoder, ld.load_coprocessor(str(tmp_path / name))).latents(text, at)
        for name in ("resized", "r")
    )
    np.testing.assert_array_equal(exported, trained)
    # Only the decoder has adapters: the export has soft tokens alone.
    train.train(
        make_config(VARIANTS["unified"].changes | {"method.lora_rank": 2}), str(tmp_path / "u")
    )
    convert.convert(str(tmp_path / "u"), str(tmp_path / "unified"))
    assert ld.load_coprocessor(str(tmp_path / "unified")).params.keys() == {"soft_tokens"}
